"""Which part of a graph computes in FP16, and which constants are stored so.

The sinusoids of the timestep need FP32: at t = 999 FP16 has steps of 0.5, half a radian. So a node
stays in FP32 when all its floating-point inputs come from position-like graph inputs (the timestep,
and any other input that reaches a Sin or Cos) and it lies before the first layer; positions that
are made of constants stay too. So does a node with a scalar that FP16 does not hold: a term such as
the 1e-15 that keeps a divisor from 0 would be 0, a factor of 1e6 another number. Roots and
quotients of its result follow. And so does a node whose operator takes no FP16 in ONNX (Range,
Celu). Everything else is FP16, but for the nodes whose values were seen to pass FP16's range, and
those that read these: they compute in FP32 too, on constants that are stored in FP16.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from mpq_deploy.errors import ModelError
from mpq_deploy.graph.constants import add_constant
from mpq_deploy.graph.layers import LAYER_OPS, STANDARD_DOMAINS
from mpq_deploy.graph.passes.base import subgraph_node

# Input slots that ONNX keeps in FP32 whatever the tensor's type: Resize's roi and scales.
FLOAT32_SLOTS = {"Resize": (1, 2)}
# Half of the smallest FP16 number: what is less becomes 0. Infinities of masks may be the largest
# FP16 number.
VANISHING, LARGEST = 2.0**-25, 65504.0
TERMS, FACTORS = ("Add", "Sub", "Max", "Clip"), ("Mul", "Div")
# What takes the result of such a node out of the range near 0.
FOLLOWING = ("Sqrt", "Pow", "Reciprocal", "Div", "Log")


@dataclass(frozen=True)
class Fp16Region:
    """``nodes32``, ``inputs32``: names of the nodes and graph inputs that stay in FP32.

    ``wide``: those of further nodes that compute in FP32, with constants stored in FP16, since
    values of theirs or of what they read, the graph's values named ``beyond``, pass FP16's range.
    """

    nodes32: frozenset[str]
    inputs32: frozenset[str]
    wide: frozenset[str] = frozenset()
    beyond: frozenset[str] = frozenset()
    # Of the graph before schemes were written into it, where there are wide nodes.
    known: frozenset[str] = frozenset()

    def with_nodes(self, names: frozenset[str]) -> Fp16Region:
        """Return the region with more nodes, by name, that stay in FP32."""
        return replace(self, nodes32=self.nodes32 | names)

    def takes_fp16(self, node: ir.Node, index: int) -> bool:
        """Say whether a float at input ``index`` of ``node`` is FP16."""
        return node.name not in self.wide and self.stores_fp16(node, index)

    def stores_fp16(self, node: ir.Node, index: int) -> bool:
        """Say whether a float constant at input ``index`` of ``node`` is stored in FP16."""
        return node.name not in self.nodes32 and index not in FLOAT32_SLOTS.get(node.op_type, ())

    def with_written(self, model: ir.Model) -> Fp16Region:
        """Return the region of ``model`` once schemes are written into it.

        A node that reads a value beyond FP16, or what a written node makes of one, is wide, and so
        is one that only wide nodes read: quantizers, windows, dequantized weights.
        """
        if not self.beyond:
            return self
        wide, carried = set(self.wide), set(self.beyond)
        for node in model.graph:
            if node.name not in self.known and any(
                value is not None and value.name in carried for value in node.inputs
            ):
                wide.add(node.name or "")
                carried.update(output.name or "" for output in node.outputs)
        for node in reversed(model.graph):
            readers = {reader.name for output in node.outputs for reader, _ in output.uses()}
            if node.name not in self.known and readers and readers <= wide:
                wide.add(node.name or "")
        return replace(self, wide=frozenset(wide))


def fp16_region(
    model: ir.Model, timestep: str, sample: str, beyond: Collection[str] = ()
) -> Fp16Region:
    """Find the FP32 island of ``model``; ``timestep`` and ``sample`` are names of graph inputs.

    ``beyond``: names of nodes whose values pass FP16's range.
    """
    branch = subgraph_node(model)
    if branch is not None:
        raise ModelError(
            f"The node '{branch.name}' ({branch.op_type}) holds a subgraph.",
            "Control flow is not supported: export the model without If, Loop and Scan.",
        )
    sources = _float_sources(model)
    positions = {timestep}
    sinusoids = [node for node in model.graph if node.op_type in ("Sin", "Cos")]
    for node in sinusoids:
        positions |= sources[node] or set()
    positions.discard(sample)
    nodes32 = {node.name or "" for node, reach in sources.items() if reach and reach <= positions}
    # Positions that are made of constants: rotary embeddings of a video's frames, rows and columns.
    nodes32 |= {node.name or "" for node in sinusoids if sources[node] == set()}
    # Constants made on the way, such as Expand(1, shape), that only the island reads belong to it.
    for node in reversed(model.graph):
        readers = [reader.name for output in node.outputs for reader, _ in output.uses()]
        if sources[node] == set() and readers and all(name in nodes32 for name in readers):
            nodes32.add(node.name or "")
    nodes32 |= _out_of_range(model)
    opset = model.graph.opset_imports.get("", 0)
    nodes32 |= {node.name or "" for node in model.graph if _takes_no_half(node, opset)}
    inputs32 = {value.name or "" for value in model.graph.inputs if value.name in positions}
    island = Fp16Region(frozenset(nodes32), frozenset(inputs32))
    return _with_wide(model, island, beyond) if beyond else island


def _with_wide(model: ir.Model, island: Fp16Region, beyond: Collection[str]) -> Fp16Region:
    makers = [node for node in model.graph if node.name in beyond]
    values = [output for node in makers for output in node.outputs]
    wide = {node.name for node in makers} | {user.name for v in values for user, _ in v.uses()}
    return replace(
        island,
        wide=frozenset(name or "" for name in wide) - island.nodes32,
        beyond=frozenset(value.name or "" for value in values),
        known=frozenset(node.name or "" for node in model.graph),
    )


def _out_of_range(model: ir.Model) -> set[str]:
    """Names of nodes with a scalar beyond FP16, and of roots and quotients that follow them."""
    names: set[str] = set()
    for node in model.graph:
        producers = [value.producer() for value in node.inputs if value is not None]
        follows = any(producer is not None and producer.name in names for producer in producers)
        if (node.op_type in FOLLOWING and follows) or _holds_no_half(node):
            names.add(node.name or "")
    return names


def _holds_no_half(node: ir.Node) -> bool:
    if node.op_type not in (*TERMS, *FACTORS) or node.domain not in STANDARD_DOMAINS:
        return False
    for value in node.inputs:
        tensor = None if value is None else value.const_value
        if tensor is None or tensor.dtype != ir.DataType.FLOAT or tensor.size != 1:
            continue
        size = abs(float(tensor.numpy().reshape(())))
        if 0 < size <= VANISHING or (node.op_type in FACTORS and size > LARGEST):
            return True
    return False


def _takes_no_half(node: ir.Node, opset: int) -> bool:
    """Whether a float input of ``node`` may be no FP16, as ONNX defines its operator."""
    if node.domain not in STANDARD_DOMAINS or not onnx.defs.has(node.op_type, opset):
        return False
    schema = onnx.defs.get_schema(node.op_type, opset)
    allowed = {one.type_param_str: one.allowed_type_strs for one in schema.type_constraints}
    slots32 = FLOAT32_SLOTS.get(node.op_type, ())
    for index, value in enumerate(node.inputs):
        if value is None or value.dtype != ir.DataType.FLOAT or index in slots32:
            continue
        # The last parameter of a variadic operator stands for all further inputs.
        parameter = schema.inputs[min(index, len(schema.inputs) - 1)].type_str
        if "tensor(float16)" not in allowed.get(parameter, [parameter]):
            return True
    return False


def makes_half(node: ir.Node, index: int, opset: int) -> bool:
    """Whether output ``index`` of ``node`` may be FP16, as ONNX defines its operator."""
    if node.domain not in STANDARD_DOMAINS or not onnx.defs.has(node.op_type, opset):
        return True
    schema = onnx.defs.get_schema(node.op_type, opset)
    allowed = {one.type_param_str: one.allowed_type_strs for one in schema.type_constraints}
    parameter = schema.outputs[min(index, len(schema.outputs) - 1)].type_str
    return "tensor(float16)" in allowed.get(parameter, [parameter])


def _float_sources(model: ir.Model) -> dict[ir.Node, set[str] | None]:
    """Graph inputs that reach each node before any layer or Shape; None behind a layer."""
    reach: dict[ir.Value, set[str] | None]
    reach = {value: {value.name or ""} for value in model.graph.inputs}
    sources: dict[ir.Node, set[str] | None] = {}
    for node in model.graph:
        merged: set[str] | None = set()
        for value in node.inputs:
            names = reach.get(value, set()) if value is not None else set()
            merged = None if merged is None or names is None else merged | names
        if node.op_type in LAYER_OPS:
            merged = None
        sources[node] = merged
        for output in node.outputs:
            reach[output] = set() if node.op_type in ("Shape", "Size") else merged
    return sources


def split_initializers(model: ir.Model, region: Fp16Region) -> list[ir.Value]:
    """Return the FP32 initializers to store in FP16, in order.

    One that feeds both FP16 nodes and FP32 slots is split in two: the FP32 readers get a copy named
    ``...//fp32``.
    """
    chosen = [value for value in model.graph.initializers.values() if is_stored_half(value, region)]
    for value in chosen:
        in32 = [use for use in value.uses() if not region.stores_fp16(*use)]
        if in32:
            assert value.const_value is not None
            copy = add_constant(model, f"{value.name}//fp32", value.const_value)
            for node, index in in32:
                node.replace_input_with(index, copy)
    return chosen


def is_stored_half(value: ir.Value, region: Fp16Region) -> bool:
    """Say whether ``value``, an FP32 constant, is to be stored in FP16, as a reader of it wants."""
    return value.dtype == ir.DataType.FLOAT and any(
        region.stores_fp16(*use) for use in value.uses()
    )


def store_float16(values: list[ir.Value]) -> None:
    """Give each value its constant in FP16; values that share one tensor share the converted one."""
    converted: dict[int, ir.LazyTensor] = {}
    for value in values:
        tensor = value.const_value
        assert tensor is not None
        if id(tensor) not in converted:
            converted[id(tensor)] = to_float16(tensor, value.name or "")
        value.const_value = converted[id(tensor)]
        value.type = ir.TensorType(ir.DataType.FLOAT16)


def to_float16(tensor: ir.TensorProtocol, name: str) -> ir.LazyTensor:
    """Return ``tensor`` in FP16, converted when written; large finite values are clipped."""

    def convert() -> ir.Tensor[Any]:
        array = np.asarray(tensor.numpy(), np.float32)
        limit = float(np.finfo(np.float16).max)
        # A mask's -3.4e38 must not become -inf: inf - inf is NaN in a softmax. Real infinities
        # stay.
        clipped = np.where(np.isinf(array), array, np.clip(array, -limit, limit))
        return ir.Tensor(np.asarray(clipped, np.float16), name=name)

    return ir.LazyTensor(
        convert, dtype=ir.DataType.FLOAT16, shape=ir.Shape(tensor.shape.numpy()), name=name
    )
