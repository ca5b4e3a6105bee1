"""Pass: keep FP32 arithmetic, but store every constant as the FP16 graph does, each behind a Cast to FP32.

With it ONNX Runtime on CPU computes in FP32 on the very bytes that TensorRT gets; the Casts of constants are folded
when the session is made.
"""

from __future__ import annotations

import onnx_ir as ir

from mpq_deploy.graph.passes.fp16_region import Fp16Region, split_initializers, store_float16


def fp16_storage(model: ir.Model, region: Fp16Region) -> tuple[ir.Model, bool]:
    """Rewrite ``model`` in place; return it and whether anything changed."""
    values = split_initializers(model, region)
    first = model.graph[0] if len(model.graph) else None
    store_float16(values)
    for value in values:
        assert first is not None
        readers = [(node, index) for node, index in value.uses() if region.takes_fp16(node, index)]
        cast = ir.node("Cast", [value], {"to": int(ir.DataType.FLOAT)}, name=f"{value.name}/to_fp32", num_outputs=1)
        cast.outputs[0].name = f"{value.name}//as_fp32"
        cast.outputs[0].shape = value.shape
        cast.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        model.graph.insert_before(first, cast)
        for node, index in readers:
            node.replace_input_with(index, cast.outputs[0])
    return model, bool(values)
