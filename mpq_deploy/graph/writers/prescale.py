"""Multiply an activation's channels by factors, in its producer's constants or by a Mul.

Pre-scaling evens out the channels' ranges before they are rounded, and the weight is divided by the
same factors. Where every reader of the tensor wants them, and it comes from the gain and bias of a
norm (behind transposes and reshapes), those constants take the factors, at no bytes and no kernel.
Source: MPQ-DM (arXiv 2412.11549) pre-scales; where it is folded is our choice.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from mpq_deploy.graph.layers import Layer, LayerGraph
from mpq_deploy.models.spec import Array

# Norms with a gain and, if there is a third input, a bias per channel; and the axis of their
# channels.
NORM_AXES = {
    "LayerNormalization": -1,
    "RMSNormalization": -1,
    "GroupNormalization": 1,
    "InstanceNormalization": 1,
}
MOST_STEPS = 16


def foldable_inputs(graph: LayerGraph) -> dict[str, frozenset[str]]:
    """Return the activations whose producer can take factors, with the names of the layers that read each."""
    readers: dict[str, list[Layer]] = {}
    for layer in graph.layers:
        for tensor in layer.inputs:
            readers.setdefault(tensor, []).append(layer)
    values = {value.name: value for node in graph.model.graph for value in node.outputs}
    found = {}
    for tensor, layers in readers.items():
        nodes = {use.node for layer in layers for use in layer.uses if use.input == tensor}
        value = values.get(tensor)
        if value is None or not _only_read_by(value, nodes):
            continue
        if _constants(value, channel_axis(value, layers[0])) is not None:
            found[tensor] = frozenset(layer.name for layer in layers)
    return found


def fold_factors(value: ir.Value, layer: Layer, factors: Array) -> None:
    """Multiply the channels of ``value`` (one of ``foldable_inputs``, read by ``layer``) by ``factors`` float16 [C]."""
    for constant, axis in factor_constants(value, layer):
        assert constant.const_value is not None
        array = constant.const_value.numpy()
        shape = [1] * array.ndim
        shape[axis] = len(factors)
        scaled = array * factors.astype(np.float32).reshape(shape)
        constant.const_value = ir.Tensor(scaled.astype(array.dtype), name=constant.name)


def factor_constants(value: ir.Value, layer: Layer) -> list[tuple[ir.Value, int]]:
    """Return the constants that take the factors of ``value`` (as for ``fold_factors``), each with its channel axis."""
    constants = _constants(value, channel_axis(value, layer))
    assert constants is not None, "only foldable activations are folded"
    return constants


def multiply_channels(
    model: ir.Model, value: ir.Value, layer: Layer, factors: Array, suffix: str
) -> ir.Value:
    """Insert a Mul by ``factors`` float16 [C] right after the producer of ``value``; return its output."""
    trailing = len(layer.kernel) if layer.op == "Conv" else 0
    array = factors.astype(np.float32).reshape(-1, *(1,) * trailing)
    name = f"{value.name}//factors{suffix}"
    tensor = ir.Tensor(array, name=name)
    constant = ir.Value(
        name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    model.graph.register_initializer(constant)
    node = ir.node("Mul", [value, constant], name=f"{value.name}/prescale{suffix}", num_outputs=1)
    node.outputs[0].name = f"{node.name}_output"
    node.outputs[0].shape, node.outputs[0].type = value.shape, value.type
    producer = value.producer()
    if producer is None:
        model.graph.insert_before(model.graph[0], node)
    else:
        model.graph.insert_after(producer, node)
    return node.outputs[0]


def channel_axis(value: ir.Value, layer: Layer) -> int | None:
    """Return the axis of the channels of ``value`` as ``layer`` reads it, from the front; None for an unknown rank."""
    if layer.op == "Conv":
        return 1
    return None if value.shape is None else len(value.shape) - 1


def _constants(value: ir.Value, axis: int | None) -> list[tuple[ir.Value, int]] | None:
    """Return the constants that scale the channels of ``value`` with their axes, or None.

    Walks from ``value`` to the gain of a norm: everything on the way must be read by nothing else.
    """
    found: list[tuple[ir.Value, int]] = []
    for _ in range(MOST_STEPS):
        node = value.producer()
        if node is None or axis is None or value.is_graph_output():
            return None
        if node.op_type in NORM_AXES:
            return _with_norm(node, axis, found)
        if node.op_type in ("Add", "Mul"):
            split = _channel_constant(node, axis)
            if split is None:
                return None
            value, constant, constant_axis = split
            found.append((constant, constant_axis))
            if node.op_type == "Mul":
                return found
        elif node.op_type in ("Transpose", "Reshape") and node.inputs[0] is not None:
            axis = (_before_transpose if node.op_type == "Transpose" else _before_reshape)(
                node, axis
            )
            value = node.inputs[0]
        else:
            return None
        if len(value.uses()) != 1:
            return None
    return None


def _with_norm(
    node: ir.Node, axis: int, found: list[tuple[ir.Value, int]]
) -> list[tuple[ir.Value, int]] | None:
    own, rank = NORM_AXES[node.op_type], _rank(node.outputs[0])
    if (
        rank is None
        or axis != own % rank
        or node.attributes.get_int("axis", -1) not in (-1, rank - 1)
    ):
        return None
    for constant in node.inputs[1:]:
        # Before opset 21 a GroupNormalization has a gain per group.
        channels = node.outputs[0].shape[axis] if node.outputs[0].shape is not None else None
        if not _own_constant(constant) or constant is None or list(_dims(constant)) != [channels]:
            return None
        found.append((constant, 0))
    return found if len(node.inputs) > 1 else None


def _channel_constant(node: ir.Node, axis: int) -> tuple[ir.Value, ir.Value, int] | None:
    """Return the other operand, the constant with one number per channel, and its axis; None when there is none."""
    rank = _rank(node.outputs[0])
    for constant, other in (node.inputs, reversed(node.inputs)):
        if rank is None or not _own_constant(constant) or constant is None or other is None:
            continue
        dims = list(_dims(constant))
        place = axis - (rank - len(dims))
        if place >= 0 and dims[place] > 1 and all(d == 1 for i, d in enumerate(dims) if i != place):
            return other, constant, place
    return None


def _own_constant(value: ir.Value | None) -> bool:
    return (
        value is not None
        and value.const_value is not None
        and value.is_initializer()
        and len(value.uses()) == 1
    )


def _before_transpose(node: ir.Node, axis: int) -> int | None:
    perm = node.attributes.get_ints("perm", ())
    rank = _rank(node.outputs[0])
    if rank is None:
        return None
    return int(perm[axis]) if perm else rank - 1 - axis


def _before_reshape(node: ir.Node, axis: int) -> int | None:
    """Return the channels' axis before a Reshape that leaves it alone: the last of both, or behind equal axes."""
    before, after = node.inputs[0], node.outputs[0]
    if before is None or before.shape is None or after.shape is None:
        return None
    channels = after.shape[axis]
    if not isinstance(channels, int):
        return None
    if axis == len(after.shape) - 1 and before.shape[-1] == channels:
        return len(before.shape) - 1
    same = len(before.shape) > axis and all(
        before.shape[i] == after.shape[i] for i in range(axis + 1)
    )
    return axis if same else None


def _only_read_by(value: ir.Value, nodes: set[str]) -> bool:
    return not value.is_graph_output() and all(
        user.name in nodes and index == 0 for user, index in value.uses()
    )


def _rank(value: ir.Value) -> int | None:
    return None if value.shape is None else len(value.shape)


def _dims(value: ir.Value) -> tuple[int, ...]:
    assert value.const_value is not None
    return tuple(int(d) for d in value.const_value.shape.numpy())
