"""Write a Where between booleans as And and Or: ONNX Runtime's CPU kernels lack it for booleans."""

from __future__ import annotations

import onnx_ir as ir

from mpq_deploy.graph.layers import STANDARD_DOMAINS
from mpq_deploy.graph.passes.base import GraphPass, ensure


class BooleanWherePass(GraphPass):
    """Replace every Where whose choices are booleans (text masks in HunyuanVideo).

    1. ``Where(c, a, b)`` of booleans: ``Or(And(c, a), And(Not(c), b))``, which broadcasts alike.
    2. A Where of anything else, or of unknown types, stays.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Replace each by four nodes of the same module."""
        chosen = [node for node in model.graph if _of_booleans(node)]
        for node in chosen:
            condition, first, second = node.inputs
            other = _node(node, "Not", condition)
            left = _node(node, "And", condition, first)
            right = _node(node, "And", other.outputs[0], second)
            joined = _node(node, "Or", left.outputs[0], right.outputs[0])
            result = joined.outputs[0]
            result.shape = node.outputs[0].shape
            model.graph.insert_before(node, [other, left, right, joined])
            ir.convenience.replace_all_uses_with(
                node.outputs[0], result, replace_graph_outputs=True
            )
            model.graph.remove(node, safe=True)
        return ir.passes.PassResult(model, bool(chosen))

    def ensures(self, model: ir.Model) -> None:
        """No Where of booleans is left."""
        ensure(not any(map(_of_booleans, model.graph)), "A Where between booleans is left.")


def _node(origin: ir.Node, op_type: str, *inputs: ir.Value | None) -> ir.Node:
    node = ir.node(op_type, inputs, metadata_props=dict(origin.metadata_props))
    node.outputs[0].dtype = ir.DataType.BOOL
    return node


def _of_booleans(node: ir.Node) -> bool:
    if node.op_type != "Where" or node.domain not in STANDARD_DOMAINS:
        return False
    values = [value for value in (*node.inputs[1:], *node.outputs) if value is not None]
    return any(value.dtype == ir.DataType.BOOL for value in values)
