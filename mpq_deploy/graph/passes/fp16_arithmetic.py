"""Pass: turn an FP32 graph into the FP16 graph that TensorRT builds, with an FP32 island for the timestep.

1. Float initializers become FP16, unless only FP32 nodes read them.
2. Graph inputs and outputs become FP16, the timestep and other positions excepted.
3. A Cast or ConstantOfShape that makes FP32 makes FP16.
4. Where the FP32 island meets the rest, a Cast is inserted.
"""

from __future__ import annotations

import onnx_ir as ir

from mpq_deploy.graph.passes.fp16_region import Fp16Region, split_initializers, to_float16

HALF = ir.TensorType(ir.DataType.FLOAT16)


def fp16_arithmetic(model: ir.Model, region: Fp16Region) -> tuple[ir.Model, bool]:
    """Rewrite ``model`` in place; return it and whether anything changed."""
    changed = False
    for value in split_initializers(model, region):
        assert value.const_value is not None
        value.const_value = to_float16(value.const_value, value.name or "")
        value.type = HALF
        changed = True
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
    """Cast every FP32 value that an FP16 node reads (once per value), and FP32 graph outputs."""
    casts: dict[ir.Value, ir.Value] = {}
    for node in list(model.graph):
        for index, value in enumerate(node.inputs):
            if value is None or value.dtype != ir.DataType.FLOAT or not region.takes_fp16(node, index):
                continue
            # A Cast reads any type: leave it to convert by itself.
            if node.op_type == "Cast":
                continue
            if value not in casts:
                cast = ir.node(
                    "Cast", [value], {"to": int(ir.DataType.FLOAT16)}, name=f"{value.name}/to_fp16", num_outputs=1
                )
                cast.outputs[0].name = f"{value.name}//fp16"
                cast.outputs[0].shape = value.shape
                cast.outputs[0].type = HALF
                producer = value.producer()
                if producer is None:
                    model.graph.insert_before(model.graph[0], cast)
                else:
                    model.graph.insert_after(producer, cast)
                casts[value] = cast.outputs[0]
            node.replace_input_with(index, casts[value])
    return bool(casts)
