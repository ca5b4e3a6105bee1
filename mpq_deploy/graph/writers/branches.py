"""Write a layer's branch beside its body, on the activation side, where TensorRT keeps both packed.

- ``rows``: the node keeps the body's output channels; a second node of the same kind computes the promoted ones in
  INT8 weights; Concat joins them and Gather restores the order of the channels (one kernel does both).
- ``cols``: the node reads the INT8 activation, whose scale leaves the outlier channels out, with weights of zero for
  them; Gather takes those channels from the float activation to a second, FP16 node, and Add joins the two.
- ``lowrank``: the node is the INT4 body; two FP16 nodes apply the factors to the same input, and Add joins them.

Weight-side forms (adding or concatenating dequantized weights) are not written: TensorRT rebuilds the whole weight at
each call, or fails to build.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

from mpq_deploy.formats.branch_matrices import ColsMatrix, LowRankMatrix, RowsMatrix
from mpq_deploy.graph.layers import Layer
from mpq_deploy.models.spec import Array

WriteWeight = Callable[[ir.Node], ir.Value]


def bias_refusal(model: ir.Model, layer: Layer) -> str:
    """Say why a branch cannot be written beside ``layer`` because of its bias; empty when it can.

    Promoting rows splits the bias. One that other nodes read too would then lie in the file twice, and bytes would not
    be those of the plan.
    """
    nodes = {node.name: node for node in model.graph}
    own = [nodes[use.node] for use in layer.uses]
    if len(own) > 1:
        return "several nodes share its weight"
    bias = own[0].inputs[2] if len(own[0].inputs) > 2 else None
    if bias is None:
        return ""
    if bias.const_value is None or list(bias.const_value.shape.numpy()) != [layer.out_channels]:
        return "its bias is no constant with one number for each output channel"
    if len(bias.uses()) > 1:
        return "its bias is shared with other nodes"
    if own[0].op_type == "Gemm" and own[0].attributes.get_float("beta", 1.0) != 1.0:
        return "its Gemm scales the bias"
    return ""


def write_rows(
    model: ir.Model, node: ir.Node, layer: Layer, matrix: RowsMatrix, body: WriteWeight, promoted: WriteWeight
) -> None:
    """Split ``node``, the only one of ``layer``, in two; ``body`` and ``promoted`` write the weight of either."""
    output = node.outputs[0]
    others = np.setdiff1d(np.arange(layer.out_channels), matrix.rows)
    twin = _copy_of(node, f"{node.name}/promoted")
    model.graph.insert_after(node, twin)
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None:
        assert bias.const_value is not None
        values = bias.const_value.numpy()
        node.replace_input_with(2, _constant(model, f"{bias.name}//body", values[others]))
        twin.replace_input_with(2, _constant(model, f"{bias.name}//promoted", values[matrix.rows]))
        del model.graph.initializers[bias.name or ""]
    node.replace_input_with(1, body(node))
    twin.replace_input_with(1, promoted(twin))
    axis = _channel_axis(layer, output)
    concat = _node("Concat", [output, twin.outputs[0]], {"axis": axis}, f"{node.name}/join", output)
    order = _constant(model, f"{layer.weight}//order", matrix.order)
    gather = _node("Gather", [concat.outputs[0], order], {"axis": axis}, f"{node.name}/restore", output)
    model.graph.insert_after(twin, [concat, gather])
    _take_over(model, output, gather, concat)


def write_columns(
    model: ir.Model, node: ir.Node, layer: Layer, matrix: ColsMatrix, x: ir.Value, write_body: WriteWeight
) -> None:
    """Add the product of the outlier channels of ``x``, the float input, to the output of ``node``."""
    node.replace_input_with(1, write_body(node))
    output = node.outputs[0]
    shape = list(layer.weight_shape)
    shape[1 - layer.out_axis] = len(matrix.columns)
    weight = (matrix.weight if layer.out_axis == 0 else matrix.weight.T).reshape(shape)
    twin = _copy_of(node, f"{node.name}/outliers", bias=False)
    indices = _constant(model, f"{layer.weight}//outlier_channels", matrix.columns)
    axis = 1 if layer.op == "Conv" else -1
    gather = _node("Gather", [x, indices], {"axis": axis}, f"{node.name}/outlier_channels", x)
    twin.replace_input_with(0, gather.outputs[0])
    twin.replace_input_with(1, _constant(model, f"{layer.weight}//outliers", weight.astype(np.float32)))
    add = _node("Add", [output, twin.outputs[0]], {}, f"{node.name}/outliers_add", output)
    model.graph.insert_after(node, [gather, twin, add])
    _take_over(model, output, add, add)


def write_low_rank(
    model: ir.Model, node: ir.Node, layer: Layer, matrix: LowRankMatrix, x: ir.Value, write_body: WriteWeight
) -> None:
    """Add the factors' product with ``x``, the float input, to the output of ``node``."""
    node.replace_input_with(1, write_body(node))
    output = node.outputs[0]
    shape = list(layer.weight_shape)
    rank = len(matrix.down)
    shape[layer.out_axis] = rank
    down_weight = (matrix.down if layer.out_axis == 0 else matrix.down.T).reshape(shape)
    up_weight = matrix.up if layer.out_axis == 0 else matrix.up.T
    down = _copy_of(node, f"{node.name}/lowrank_down", bias=False)
    down.replace_input_with(0, x)
    down.replace_input_with(1, _constant(model, f"{layer.weight}//lowrank_down", down_weight.astype(np.float32)))
    attributes: dict[str, Any] = {}
    if layer.op == "Conv":
        up_weight = up_weight.reshape(*up_weight.shape, *(1 for _ in layer.kernel))
    elif layer.op == "Gemm" and layer.out_axis == 0:
        attributes["transB"] = 1
    up_value = _constant(model, f"{layer.weight}//lowrank_up", up_weight.astype(np.float32))
    up = _node(layer.op, [down.outputs[0], up_value], attributes, f"{node.name}/lowrank_up", output)
    add = _node("Add", [output, up.outputs[0]], {}, f"{node.name}/lowrank_add", output)
    model.graph.insert_after(node, [down, up, add])
    _take_over(model, output, add, add)


def _take_over(model: ir.Model, old: ir.Value, last: ir.Node, reader: ir.Node) -> None:
    """Let every reader of ``old`` but ``reader``, the branch's own, read the output of ``last``, by the old name."""
    new = last.outputs[0]
    for user, index in list(old.uses()):
        if user is not reader:
            user.replace_input_with(index, new)
    for index, value in enumerate(model.graph.outputs):
        if value is old:
            model.graph.outputs[index] = new
    name = old.name
    old.name, new.name, new.shape = f"{name}//body", name, old.shape
    # The body has fewer channels than the whole, where rows left it.
    old.shape = None


def _channel_axis(layer: Layer, output: ir.Value) -> int:
    if layer.op == "Conv":
        return 1
    # TensorRT takes negative axes as well; Gemm's output has two.
    return 1 if layer.op == "Gemm" else -1


def _copy_of(node: ir.Node, name: str, bias: bool = True) -> ir.Node:
    inputs = list(node.inputs) if bias else list(node.inputs[:2])
    return _node(node.op_type, inputs, dict(node.attributes), name, node.outputs[0])


def _node(op: str, inputs: list[ir.Value | None], attributes: dict[str, Any], name: str, like: ir.Value) -> ir.Node:
    node = ir.node(op, inputs, attributes, name=name, num_outputs=1)
    node.outputs[0].name = f"{name}_output"
    node.outputs[0].type = like.type
    return node


def _constant(model: ir.Model, name: str, array: Array) -> ir.Value:
    tensor = ir.Tensor(np.asarray(array, order="C"), name=name)
    value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    model.graph.register_initializer(value)
    return value
