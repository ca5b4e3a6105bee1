"""Give every node a unique name, by which engines and reports refer to it; keep our own names free."""

from __future__ import annotations

import onnx_ir as ir

from mpq_deploy.graph.passes.base import GraphPass, ensure

MARK, INSTEAD = "//", "/_/"


class NameNodesPass(GraphPass):
    """Name nodes without a name, and number repeated names.

    1. A node without a name is called after its operator.
    2. Of several nodes with one name the first keeps it; the others get ``_1``, ``_2`` ... in graph
       order.
    3. Values whose name has the mark of those that writers add later (``weight//scale``), such as a
       file that was written here before, get a name without it.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Go through the nodes in graph order."""
        modified = False
        wanted = {node.name for node in model.graph}
        taken: set[str] = set()
        for node in model.graph:
            base = node.name or node.op_type
            name, number = base, 0
            while name in taken or (number and name in wanted):
                number += 1
                name = f"{base}_{number}"
            taken.add(name)
            if name != node.name:
                node.name = name
                modified = True
        return ir.passes.PassResult(model, _free_marked_names(model.graph) or modified)

    def ensures(self, model: ir.Model) -> None:
        """Every node has a name of its own."""
        names = [node.name for node in model.graph]
        ensure(
            all(names) and len(set(names)) == len(names),
            "Two nodes have one name, or one has none.",
        )


def _free_marked_names(graph: ir.Graph) -> bool:
    """Rename the values whose names have the mark, but for inputs and outputs; return whether any was."""
    named = {value.name for value in (*graph.inputs, *graph.outputs)}
    values = [*graph.initializers.values(), *(value for node in graph for value in node.outputs)]
    taken = {value.name for value in values}
    marked = [v for v in values if v.name and MARK in v.name and v.name not in named]
    for value in marked:
        name = (value.name or "").replace(MARK, INSTEAD)
        while name in taken:
            name += "_"
        taken.add(name)
        value.name = name
    return bool(marked)
