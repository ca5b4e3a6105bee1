"""Turn an FP32 graph into the FP16 graph that TensorRT builds, but for an FP32 island."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from mpq_deploy.graph.fp16_region import (
    LARGEST,
    Fp16Region,
    makes_half,
    split_initializers,
    store_float16,
)
from mpq_deploy.graph.passes.base import GraphPass, cast_node, ensure, require_names

HALF = ir.TensorType(ir.DataType.FLOAT16)


class Fp16ArithmeticPass(GraphPass):
    """Compute in FP16 outside the FP32 island of ``region``.

    1. Float initializers become FP16, unless only nodes of the island read them; one that both read
       is split in two.
    2. Graph inputs and outputs become FP16, the timestep and other positions excepted.
    3. A Cast, EyeLike or ConstantOfShape that makes FP32 makes FP16. What is FP32 by ONNX's
       definition of the operator stays so (a LayerNormalization's mean).
    4. Where FP32 nodes meet the rest, a Cast is inserted; graph outputs are FP16.
    """

    def __init__(self, region: Fp16Region) -> None:
        self.region = region

    def requires(self, model: ir.Model) -> None:
        """Nodes have unique names: the region names them."""
        require_names(model)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Go through constants, inputs and nodes; then insert the Casts."""
        region, opset = self.region, model.graph.opset_imports.get("", 0)
        initializers = split_initializers(model, region)
        store_float16(initializers)
        changed = bool(initializers)
        for value in model.graph.inputs:
            if value.dtype == ir.DataType.FLOAT and value.name not in region.inputs32:
                value.type = HALF
                changed = True
        for node in list(model.graph):
            if node.name in region.nodes32 or node.name in region.wide or _is_to_island(node):
                continue
            changed |= _halve_attributes(node)
            for index, output in enumerate(node.outputs):
                if output.dtype == ir.DataType.FLOAT and makes_half(node, index, opset):
                    output.type = HALF
                    changed = True
        changed |= _insert_casts(model, region)
        return ir.passes.PassResult(model, changed)

    def ensures(self, model: ir.Model) -> None:
        """Every float that a node reads has the type that the region gives it."""
        left = next(_reads_other_type(model, self.region), None)
        if left is not None:
            node, value = left
            what = f"The node '{node.name}' ({node.op_type})"
            ensure(False, f"{what} reads '{value.name}' in {value.dtype}.")


def _reads_other_type(model: ir.Model, region: Fp16Region) -> Iterator[tuple[ir.Node, ir.Value]]:
    for node in model.graph:
        # A Cast reads any type.
        for index, value in enumerate(node.inputs if node.op_type != "Cast" else ()):
            if value is None or value.dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16):
                continue
            if value.dtype != _type_for(region, node, index):
                yield node, value


def _type_for(region: Fp16Region, node: ir.Node, index: int) -> ir.DataType:
    return ir.DataType.FLOAT16 if region.takes_fp16(node, index) else ir.DataType.FLOAT


def _is_to_island(node: ir.Node) -> bool:
    """Say whether ``node`` is a Cast that an earlier run inserted before the island."""
    source = node.inputs[0] if node.op_type == "Cast" else None
    return source is not None and node.outputs[0].name == f"{source.name}//fp32"


def _halve_attributes(node: ir.Node) -> bool:
    kind = {"Cast": "to", "EyeLike": "dtype"}.get(node.op_type, "")
    if kind in node.attributes and node.attributes[kind].as_int() == ir.DataType.FLOAT:
        node.attributes[kind] = ir.AttrInt64(kind, int(ir.DataType.FLOAT16))
        return True
    if node.op_type == "ConstantOfShape":
        value = node.attributes["value"].as_tensor() if "value" in node.attributes else None
        if value is None or value.dtype == ir.DataType.FLOAT:
            # A mask's lowest number must not become infinite: see ``to_float16``.
            array = np.zeros(1) if value is None else value.numpy().clip(-LARGEST, LARGEST)
            node.attributes["value"] = ir.AttrTensor("value", ir.Tensor(array.astype(np.float16)))
            return True
    return False


def _insert_casts(model: ir.Model, region: Fp16Region) -> bool:
    """Cast, once per value, every FP32 value that an FP16 node reads, and the other way round."""
    casts: dict[ir.Value, ir.Value] = {}
    for node, value in list(_reads_other_type(model, region)):
        for index in (i for i, read in enumerate(node.inputs) if read is value):
            dtype = _type_for(region, node, index)
            if value.dtype != dtype:
                casts[value] = casts.get(value) or _cast(model, value, dtype)
                node.replace_input_with(index, casts[value])
    return bool(casts)


def _cast(model: ir.Model, value: ir.Value, dtype: ir.DataType) -> ir.Value:
    suffix = "fp16" if dtype == ir.DataType.FLOAT16 else "fp32"
    cast = cast_node(value, dtype, f"{value.name}/to_{suffix}", f"{value.name}//{suffix}")
    producer = value.producer()
    if producer is None:
        model.graph.insert_before(model.graph[0], cast)
    else:
        model.graph.insert_after(producer, cast)
    return cast.outputs[0]
