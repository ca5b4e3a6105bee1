"""Declare an older opset, where every node means the same under it."""

from __future__ import annotations

import onnx
import onnx_ir as ir

from mpq_deploy.errors import ModelError
from mpq_deploy.graph.layers import STANDARD_DOMAINS
from mpq_deploy.graph.passes.base import GraphPass, ensure

# Below this the meaning of unchanged attributes did change (axes became inputs): such models are
# not lowered.
LOWEST = 21


class LowerOpsetPass(GraphPass):
    """Bring a model to ``opset`` if it declares a newer one.

    1. A model at or below the wanted opset is left alone.
    2. A node whose operator has the same schema under both opsets is left alone; so is one whose
       newer schema differs only in what the node does not use: its attributes and its numbers of
       inputs and outputs fit the older schema. (Between opsets 21 and 25 ONNX only added types,
       attributes and operators; no default changed its meaning.)
    3. Any other node is a ModelError that names it.
    """

    def __init__(self, opset: int) -> None:
        self.opset = max(opset, LOWEST)

    def requires(self, model: ir.Model) -> None:
        """Every node has a meaning under the older opset."""
        if model.graph.opset_imports.get("", 0) <= self.opset:
            return
        for node in ir.traversal.RecursiveGraphIterator(model.graph):
            reason = _reason(node, self.opset)
            if reason:
                raise ModelError(
                    f"The node '{node.name}' ({node.op_type}) {reason}, and the target reads no newer opset.",
                    f"Export the model again with opset {self.opset} or lower.",
                )

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Declare the opset."""
        newer = model.graph.opset_imports.get("", 0) > self.opset
        if newer:
            model.graph.opset_imports[""] = self.opset
        return ir.passes.PassResult(model, newer)

    def ensures(self, model: ir.Model) -> None:
        """The opset is not above the wanted one."""
        declared = model.graph.opset_imports.get("", 0)
        ensure(declared <= self.opset, f"The model has opset {declared}, above {self.opset}.")


def _reason(node: ir.Node, opset: int) -> str:
    """Why ``node`` has no meaning under ``opset``; empty when it has."""
    if node.domain not in STANDARD_DOMAINS:
        return ""
    if not onnx.defs.has(node.op_type, max_inclusive_version=opset):
        return f"has no counterpart in opset {opset}"
    schema = onnx.defs.get_schema(node.op_type, max_inclusive_version=opset)
    unknown = [name for name in node.attributes if name not in schema.attributes]
    if unknown:
        return f"has the attribute {unknown[0]}, which opset {opset} does not know"
    fits = len(node.inputs) <= schema.max_input and len(node.outputs) <= schema.max_output
    return "" if fits else f"has more inputs or outputs than opset {opset} knows"
