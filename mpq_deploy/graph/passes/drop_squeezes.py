"""Take out a Squeeze of an axis that is not of size one, which torch ignores and ONNX refuses."""

from __future__ import annotations

import onnx_ir as ir

from mpq_deploy.graph.layers import STANDARD_DOMAINS
from mpq_deploy.graph.passes.base import GraphPass, ensure


class DropSqueezesPass(GraphPass):
    """Take out every Squeeze that does nothing in torch.

    The exporter writes ``x.squeeze(1)`` as a Squeeze whatever the size of that axis is (PixArt's
    transformer ends so).

    1. Every axis named has a known size other than one, or a symbol of the trace, which stands for
       sizes other than one: the Squeeze goes, and its input takes its place.
    2. Any other Squeeze stays: an axis of size one, of unknown size, or no axes at all.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Replace each by its input."""
        idle = [node for node in model.graph if _does_nothing(node)]
        for node in idle:
            source = node.inputs[0]
            assert source is not None  # Squeeze has its data
            ir.convenience.replace_all_uses_with(
                node.outputs[0], source, replace_graph_outputs=True
            )
            model.graph.remove(node, safe=True)
        return ir.passes.PassResult(model, bool(idle))

    def ensures(self, model: ir.Model) -> None:
        """No Squeeze that does nothing is left."""
        ensure(
            not any(map(_does_nothing, model.graph)),
            "A Squeeze of an axis that is not of size one is left.",
        )


def _does_nothing(node: ir.Node) -> bool:
    if node.op_type != "Squeeze" or node.domain not in STANDARD_DOMAINS:
        return False
    source, axes = (*node.inputs, None)[:2]
    if source is None or source.shape is None or axes is None or axes.const_value is None:
        return False
    sizes = [source.shape[int(axis)] for axis in axes.const_value.numpy().reshape(-1)]
    return bool(sizes) and all(
        size.value is not None if isinstance(size, ir.SymbolicDim) else size != 1 for size in sizes
    )
