"""What all passes share: onnx_ir's infrastructure, with refusals that reach the user unchanged."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import onnx_ir as ir

from mpq_deploy.errors import ModelError
from mpq_deploy.graph.constants import add_constant
from mpq_deploy.models.spec import Array


class GraphPass(ir.passes.InPlacePass):
    """A pass that rewrites a model in place; a second run changes nothing.

    ``requires`` raises ModelError for what a user's model may have and the pass does not take, and
    PreconditionError for what our own code should have done before. ``ensures`` raises
    PostconditionError when the pass left something.
    """

    def __call__(self, model_or_result: ir.Model | ir.passes.PassResult, /) -> ir.passes.PassResult:
        """Check, rewrite, check. A ModelError is not wrapped into an error of the infrastructure."""
        try:
            return super().__call__(model_or_result)
        except ir.passes.InvariantError as error:
            if isinstance(error.__cause__, ModelError):
                raise error.__cause__ from None
            raise


def run_passes(model: ir.Model, passes: Iterable[ir.passes.PassBase]) -> ir.passes.PassResult:
    """Run ``passes`` one after the other; modified is whether any of them changed something."""
    modified = False
    for one in passes:
        result = one(model)
        model, modified = result.model, modified or result.modified
    return ir.passes.PassResult(model, modified)


def ensure(holds: bool, otherwise: str) -> None:
    """Raise PostconditionError with ``otherwise`` unless it ``holds``."""
    if not holds:
        raise ir.passes.PostconditionError(otherwise)


def cast_node(value: ir.Value, dtype: ir.DataType, name: str, output: str) -> ir.Node:
    """Return a new node ``name`` that casts ``value`` to ``dtype``, as the tensor ``output``."""
    node = ir.node("Cast", [value], {"to": int(dtype)}, name=name, num_outputs=1)
    node.outputs[0].name, node.outputs[0].shape = output, value.shape
    node.outputs[0].type = ir.TensorType(dtype)
    return node


def subgraph_node(model: ir.Model) -> ir.Node | None:
    """Return the first node with a subgraph (If, Loop, Scan), None where there is none."""
    kinds = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
    nodes = (node for node in model.graph for one in node.attributes.values() if one.type in kinds)
    return next(nodes, None)


def require_names(model: ir.Model) -> None:
    """Raise PreconditionError unless every node has a name of its own."""
    names = [node.name for node in model.graph]
    if not all(names) or len(set(names)) < len(names):
        raise ir.passes.PreconditionError(
            "Two nodes share a name, or one has none: run NameNodesPass first."
        )


class NodeMaker:
    """Makes the nodes and constants of one replacement, named after the node that is replaced."""

    def __init__(self, model: ir.Model, name: str) -> None:
        self.model, self.name = model, name
        self.nodes: list[ir.Node] = []

    def op(
        self, op: str, *inputs: ir.Value | None, **attributes: float | Sequence[int]
    ) -> ir.Value:
        """Return the output of a new node."""
        node = ir.node(op, list(inputs), attributes, name=f"{self.name}/{op}")
        node.outputs[0].name = f"{self.name}/{op}_{len(self.nodes)}"
        self.nodes.append(node)
        return node.outputs[0]

    def constant(self, name: str, array: Array) -> ir.Value:
        """Return a constant that the replacement alone reads."""
        return add_constant(self.model, f"{self.name}/{name}", array)
