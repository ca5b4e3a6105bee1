"""Write GroupNormalization as InstanceNormalization, which every TensorRT runs correctly."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from mpq_deploy.errors import ModelError
from mpq_deploy.graph.constants import add_constant
from mpq_deploy.graph.layers import STANDARD_DOMAINS
from mpq_deploy.graph.passes.base import GraphPass, NodeMaker, ensure

# Until opset 20 GroupNormalization has one scale and bias per group, from 21 on one per channel.
# ONNX's own converter leaves them as they are.
PER_CHANNEL_OPSET = 21
EPSILON = 1e-5


class GroupNormPass(GraphPass):
    """Replace GroupNormalization by what PyTorch exports.

    1. The groups become channels of a [N, groups, elements] tensor that InstanceNormalization
       normalises.
    2. Scale and bias become a Mul and an Add with weights [C, 1, ...]; the weights keep their
       names.
    3. Per-group scales (opset 18 to 20) are repeated for each channel of their group.
    4. An input of unknown rank or channels, or a per-group scale that is not a weight, is a
       ModelError.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Go through the nodes in graph order."""
        per_group = model.graph.opset_imports.get("", 0) < PER_CHANNEL_OPSET
        nodes = _group_norms(model)
        for node in nodes:
            _replace(model, node, per_group)
        return ir.passes.PassResult(model, bool(nodes))

    def requires(self, model: ir.Model) -> None:
        """Rank and channels of every norm's input are known; scales per group are weights."""
        per_group = model.graph.opset_imports.get("", 0) < PER_CHANNEL_OPSET
        for node in _group_norms(model):
            x, *weights = node.inputs
            if x is None or x.shape is None or not isinstance(x.shape[1], int):
                raise ModelError(
                    f"The input of GroupNormalization '{node.name}' has no known rank and channels.",
                    "Run ONNX shape inference on the model and save it again.",
                )
            if per_group and any(value is None or value.const_value is None for value in weights):
                raise ModelError(
                    f"GroupNormalization '{node.name}' has a scale or bias per group that is not a weight.",
                    f"Export the model with opset {PER_CHANNEL_OPSET}.",
                )

    def ensures(self, model: ir.Model) -> None:
        """No GroupNormalization is left."""
        ensure(not _group_norms(model), "A GroupNormalization is left.")


def _group_norms(model: ir.Model) -> list[ir.Node]:
    return [
        n for n in model.graph if n.op_type == "GroupNormalization" and n.domain in STANDARD_DOMAINS
    ]


def _replace(model: ir.Model, node: ir.Node, per_group: bool) -> None:
    x, scale, bias = node.inputs
    assert x is not None and x.shape is not None  # requires
    channels, rank = x.shape[1], len(x.shape)
    assert isinstance(channels, int)  # requires
    groups = int(node.attributes["num_groups"].value)
    attribute = node.attributes.get("epsilon")
    epsilon = EPSILON if attribute is None else float(attribute.value)
    name = node.name or "GroupNormalization"
    if per_group:
        scale, bias = (_repeated(model, value, channels // groups) for value in (scale, bias))
    new = NodeMaker(model, name)
    grouped = new.op("Reshape", x, new.constant("groups", np.array([0, groups, -1])))
    ones = new.constant("ones", np.ones(groups, np.float32))
    zeros = new.constant("zeros", np.zeros(groups, np.float32))
    normal = new.op("InstanceNormalization", grouped, ones, zeros, epsilon=epsilon)
    back = new.op("Reshape", normal, new.op("Shape", x))
    column = new.constant("column", np.array([-1, *[1] * (rank - 2)]))
    scaled = new.op("Mul", back, new.op("Reshape", scale, column))
    shifted = new.op("Add", scaled, new.op("Reshape", bias, column))
    old = node.outputs[0]
    shifted.name, shifted.shape, shifted.type = old.name, old.shape, old.type
    model.graph.insert_before(node, new.nodes)
    old.replace_all_uses_with(shifted, replace_graph_outputs=True)
    model.graph.remove(node, safe=True)


def _repeated(model: ir.Model, value: ir.Value | None, times: int) -> ir.Value:
    """Return a per-group weight with one entry per channel; the same one when groups are channels."""
    assert value is not None and value.const_value is not None  # requires
    if times == 1:
        return value
    return add_constant(
        model, f"{value.name}.per_channel", np.repeat(value.const_value.numpy(), times)
    )
