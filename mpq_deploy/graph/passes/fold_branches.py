"""Replace an If whose condition is known by the branch that it takes."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from mpq_deploy.errors import ModelError
from mpq_deploy.graph.known_values import Sizes, known_values
from mpq_deploy.graph.layers import STANDARD_DOMAINS
from mpq_deploy.graph.passes.base import GraphPass, subgraph_node
from mpq_deploy.graph.sound import check_growth


class FoldBranchesPass(GraphPass):
    """Put the branch that an If takes in its place; refuse all other control flow.

    ``inputs``: sizes of the graph's inputs, None where they vary. The TorchScript exporter writes an
    If for ``squeeze`` of an axis whose size it does not know.

    1. The condition is a constant, or follows from constants and the sizes of the inputs: the nodes
       and weights of the branch taken stand in the graph; the other one reads nothing any more.
    2. Both branches compute the same: so does the first of them.
    3. An If within a branch that is taken is looked at in turn.
    4. Any other If, Loop or Scan is a ModelError that names it.
    """

    def __init__(self, inputs: Sizes | None = None) -> None:
        self.inputs = inputs or {}

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fold until no If is left that can be."""
        modified = False
        while _fold_all(model, {}) or (_ifs(model.graph) and _fold_all(model, self._known(model))):
            modified = True
        return ir.passes.PassResult(model, modified)

    def ensures(self, model: ir.Model) -> None:
        """No node holds a subgraph."""
        node = subgraph_node(model)
        if node is None:
            return
        if node.op_type == "If":
            raise ModelError(
                f"The node '{node.name}' (If) takes one of two branches by '{node.inputs[0].name}', "  # type: ignore[union-attr]
                "which is known only at run time.",
                "Export the model without data-dependent branches, or give every size in the YAML: branches "
                "that depend on sizes alone are folded.",
            )
        raise ModelError(
            f"The node '{node.name}' ({node.op_type}) holds a subgraph.",
            "Control flow is not supported: export the model without Loop and Scan.",
        )

    def _known(self, model: ir.Model) -> dict[str, bool]:
        """Return the conditions that follow from the sizes of the inputs, by name."""
        check_growth(model)
        values = known_values(ir.to_proto(model), self.inputs)
        conditions = {_condition(node) for node in _ifs(model.graph)} & values.keys()
        numbers = {name: values[name].ravel().tolist() for name in conditions}
        return {
            name: bool(found[0]) for name, found in numbers.items() if found not in ([], [None])
        }


def _ifs(graph: ir.Graph) -> list[ir.Node]:
    return [n for n in graph if n.op_type == "If" and n.domain in STANDARD_DOMAINS]


def _condition(node: ir.Node) -> str:
    value = node.inputs[0]
    return (value.name or "") if value is not None else ""


def _fold_all(model: ir.Model, known: Mapping[str, bool]) -> bool:
    """Fold every If whose condition is a constant or in ``known``, or whose branches are alike."""
    folded = False
    for node in _ifs(model.graph):
        branches = [node.attributes[name].as_graph() for name in ("then_branch", "else_branch")]
        value = node.inputs[0]
        tensor = None if value is None else value.const_value
        if tensor is not None and tensor.size == 1:
            taken = bool(tensor.numpy().reshape(()))
        elif _condition(node) in known:
            taken = known[_condition(node)]
        elif _fingerprint(branches[0]) == _fingerprint(branches[1]):
            taken = True
        else:
            continue
        _put_in_place(model.graph, node, branches[0] if taken else branches[1])
        folded = True
    return folded


def _fingerprint(branch: ir.Graph) -> list[object]:
    """Return what a branch computes, with its own values numbered and those from outside as they are."""
    names: dict[ir.Value, object] = {}
    content: list[object] = []
    for value in branch.initializers.values():
        names[value] = len(names)
        tensor = value.const_value
        content.append(
            None if tensor is None else (tensor.dtype, str(tensor.shape), tensor.tobytes())
        )
    for node in branch:
        inputs = [None if v is None else names.get(v, id(v)) for v in node.inputs]
        attributes = sorted((name, _content(item)) for name, item in node.attributes.items())
        names.update((value, len(names) + place) for place, value in enumerate(node.outputs))
        content.append((node.domain, node.op_type, inputs, attributes, len(node.outputs)))
    return [*content, [names.get(value, id(value)) for value in branch.outputs]]


def _content(attribute: ir.Attr) -> str:
    """Return what tells an attribute from another; one that holds graphs is like no other."""
    if attribute.type == ir.AttributeType.TENSOR:
        tensor = attribute.as_tensor()
        return f"{tensor.dtype} {tensor.shape} {tensor.tobytes()!r}"
    plain = (ir.AttributeType.FLOAT, ir.AttributeType.INT, ir.AttributeType.STRING)
    lists = (ir.AttributeType.FLOATS, ir.AttributeType.INTS, ir.AttributeType.STRINGS)
    return str(attribute.value) if attribute.type in (*plain, *lists) else str(id(attribute))


def _put_in_place(graph: ir.Graph, node: ir.Node, branch: ir.Graph) -> None:
    """Move the nodes and weights of ``branch`` before ``node``, and take ``node`` out."""
    taken = {value.name for other in graph for value in other.outputs} | set(graph.initializers)
    taken |= {value.name for value in graph.inputs}
    for value in list(branch.initializers.values()):
        del branch.initializers[value.name or ""]
        value.name = _free(value.name or "constant", taken)
        graph.register_initializer(value)
    nodes, outputs = list(branch), list(branch.outputs)
    branch.outputs.clear()
    branch.remove(nodes)
    for one in nodes:
        for value in one.outputs:
            value.name = _free(value.name or one.op_type, taken) if value.name else value.name
    graph.insert_before(node, nodes)
    for old, new in zip(node.outputs, outputs):
        if old.is_graph_output():
            # A graph's output keeps its name, and may be no input or weight.
            same = ir.node("Identity", [new], name=f"{node.name}/output", num_outputs=1)
            same.outputs[0].name, old.name = old.name, f"{old.name}.folded"
            same.outputs[0].type, same.outputs[0].shape = old.type or new.type, old.shape
            graph.insert_before(node, [same])
            new = same.outputs[0]
        old.replace_all_uses_with(new, replace_graph_outputs=True)
    _let_go(node)
    graph.remove(node, safe=True)


def _let_go(node: ir.Node) -> None:
    """Take the nodes within ``node`` off what they read: a weight of theirs alone is read by nothing then."""
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            for one in attribute.as_graph():
                _let_go(one)
                for index in range(len(one.inputs)):
                    one.replace_input_with(index, None)


def _free(name: str, taken: set[str | None]) -> str:
    number, free = 1, name
    while free in taken:
        number += 1
        free = f"{name}.{number}"
    taken.add(free)
    return free
