"""Pass: turn an FP32 graph into the FP16 graph that TensorRT builds, with an FP32 island for the timestep.

1. Float initializers become FP16, unless only FP32 nodes read them.
2. Graph inputs and outputs become FP16, the timestep and other positions excepted.
3. A Cast or ConstantOfShape that makes FP32 makes FP16.
4. Where the FP32 island meets the rest, a Cast is inserted; graph outputs are FP16.
"""

from __future__ import annotations

import onnx_ir as ir

from mpq_deploy.graph.passes.fp16_region import Fp16Region, split_initializers, store_float16

HALF = ir.TensorType(ir.DataType.FLOAT16)


def fp16_arithmetic(model: ir.Model, region: Fp16Region) -> tuple[ir.Model, bool]:
    """Rewrite ``model`` in place; return it and whether anything changed."""
    initializers = split_initializers(model, region)
    store_float16(initializers)
    changed = bool(initializers)
    for value in model.graph.inputs:
        if value.dtype == ir.DataType.FLOAT and value.name not in region.inputs32:
            value.type = HALF
            changed = True
    for node in list(model.graph):
        if node.name in region.nodes32:
            continue
        changed |= _halve_attributes(node)
        for output in node.outputs:
            if output.dtype == ir.DataType.FLOAT:
                output.type = HALF
                changed = True
    changed |= _insert_casts(model, region)
    return model, changed


def _halve_attributes(node: ir.Node) -> bool:
    if node.op_type == "Cast" and node.attributes["to"].as_int() == ir.DataType.FLOAT:
        node.attributes["to"] = ir.AttrInt64("to", int(ir.DataType.FLOAT16))
        return True
    if node.op_type == "ConstantOfShape":
        value = node.attributes["value"].as_tensor() if "value" in node.attributes else None
        if value is None or value.dtype == ir.DataType.FLOAT:
            import numpy as np

            array = np.zeros(1, np.float16) if value is None else value.numpy().astype(np.float16)
            node.attributes["value"] = ir.AttrTensor("value", ir.Tensor(array))
            return True
    return False


def _insert_casts(model: ir.Model, region: Fp16Region) -> bool:
    """Cast, once per value, every FP32 value that an FP16 node reads, and the other way round."""
    casts: dict[ir.Value, ir.Value] = {}
    for node in list(model.graph):
        for index, value in enumerate(node.inputs):
            # A Cast reads any type: leave it to convert by itself.
            if value is None or node.op_type == "Cast":
                continue
            wanted = ir.DataType.FLOAT16 if region.takes_fp16(node, index) else ir.DataType.FLOAT
            if value.dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16) and value.dtype != wanted:
                if value not in casts:
                    casts[value] = _cast(model, value, wanted)
                node.replace_input_with(index, casts[value])
    return bool(casts)


def _cast(model: ir.Model, value: ir.Value, dtype: ir.DataType) -> ir.Value:
    suffix = "fp16" if dtype == ir.DataType.FLOAT16 else "fp32"
    cast = ir.node("Cast", [value], {"to": int(dtype)}, name=f"{value.name}/to_{suffix}", num_outputs=1)
    output = cast.outputs[0]
    output.name = f"{value.name}//{suffix}"
    output.shape = value.shape
    output.type = ir.TensorType(dtype)
    producer = value.producer()
    if producer is None:
        model.graph.insert_before(model.graph[0], cast)
    else:
        model.graph.insert_after(producer, cast)
    return output
