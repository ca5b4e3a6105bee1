"""Store every constant as the FP16 graph does, but compute in FP32."""

from __future__ import annotations

import onnx_ir as ir

from mpq_deploy.graph.fp16_region import (
    Fp16Region,
    is_stored_half,
    split_initializers,
    store_float16,
)
from mpq_deploy.graph.passes.base import GraphPass, cast_node, ensure, require_names


class Fp16StoragePass(GraphPass):
    """Store the constants that FP16 nodes of ``region`` read in FP16, and compute in FP32.

    With it ONNX Runtime on CPU computes in FP32 on the very bytes that TensorRT gets; the Casts of
    constants are folded when the session is made.

    1. Float initializers become FP16, unless only FP32 nodes read them; one that both read is split
       in two.
    2. A Cast to FP32 stands between each and its readers.
    """

    def __init__(self, region: Fp16Region) -> None:
        self.region = region

    def requires(self, model: ir.Model) -> None:
        """Nodes have unique names: the region names them."""
        require_names(model)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Store the constants and insert the Casts first in the graph."""
        values = split_initializers(model, self.region)
        first = model.graph[0] if len(model.graph) else None
        store_float16(values)
        for value in values:
            assert first is not None
            readers = [use for use in value.uses() if self.region.stores_fp16(*use)]
            name = value.name
            cast = cast_node(value, ir.DataType.FLOAT, f"{name}/to_fp32", f"{name}//as_fp32")
            model.graph.insert_before(first, cast)
            for node, index in readers:
                node.replace_input_with(index, cast.outputs[0])
        return ir.passes.PassResult(model, bool(values))

    def ensures(self, model: ir.Model) -> None:
        """No FP16 node reads a constant that is stored in FP32."""
        constants = model.graph.initializers.items()
        left = [name for name, value in constants if is_stored_half(value, self.region)]
        ensure(not left, f"Constants of FP16 nodes are stored in FP32: {', '.join(left[:3])}.")
