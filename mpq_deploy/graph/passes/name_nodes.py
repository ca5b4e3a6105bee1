"""Give every node a unique name: engines and reports refer to nodes by name."""

from __future__ import annotations

import onnx_ir as ir

from mpq_deploy.graph.passes.base import GraphPass, ensure


class NameNodesPass(GraphPass):
    """Name nodes without a name, and number repeated names.

    1. A node without a name is called after its operator.
    2. Of several nodes with one name the first keeps it; the others get ``_1``, ``_2`` ... in graph
       order.
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
        return ir.passes.PassResult(model, modified)

    def ensures(self, model: ir.Model) -> None:
        """Every node has a name of its own."""
        names = [node.name for node in model.graph]
        ensure(
            all(names) and len(set(names)) == len(names),
            "Two nodes have one name, or one has none.",
        )
