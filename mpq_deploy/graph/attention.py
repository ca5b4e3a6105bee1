"""The attentions of a graph, and the layers that make their queries, keys and values.

In: a normalised graph. Out: where each softmax(Q K^T) V lies, found by its products whatever its
nodes are called, and groups of layers that project one tensor for one attention.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from mpq_deploy.graph.layers import STANDARD_DOMAINS, Layer, LayerGraph

# Between scores, softmax and probabilities: scales, masks, a cap.
_BETWEEN = {"Add", "Cast", "Clip", "Div", "Dropout", "Identity", "Max", "Min", "Mul", "Reshape"}
_BETWEEN |= {"Slice", "Sub", "Tanh", "Where"}
# Between a projection and its operand: biases, heads, norms of queries and keys, rotary positions.
_CARRIES = {"Add", "Cast", "Concat", "Div", "Expand", "Flatten", "Gather", "Identity", "Mul", "Neg"}
_CARRIES |= {"LayerNormalization", "RMSNormalization", "RotaryEmbedding", "Pow", "Reciprocal"}
_CARRIES |= {"ReduceL2", "ReduceMean", "ReduceSum", "Reshape", "Slice", "Split", "Sqrt", "Squeeze"}
_CARRIES |= {"Sub", "Tile", "Transpose", "Unsqueeze"}
# What reads a tensor's sizes alone.
_SIZES = ("Shape", "Size")
MOST_STEPS = 12
# Tensors that an attention rounds to compute in FP8: queries, keys, probabilities, values.
OPERANDS = 4


@dataclass(frozen=True)
class Attention:
    """One softmax(Q K^T) V as the places of its operands: (node, index of its input).

    ``probabilities``: None where the operator Attention keeps them to itself.
    """

    queries: tuple[ir.Node, int]
    keys: tuple[ir.Node, int]
    probabilities: tuple[ir.Node, int] | None
    values: tuple[ir.Node, int]


def attentions(model: ir.Model) -> list[Attention]:
    """Find every attention of ``model``, in graph order."""
    found = []
    for node in model.graph:
        if node.domain not in STANDARD_DOMAINS:
            continue
        if node.op_type == "Attention":
            found.append(Attention((node, 0), (node, 1), None, (node, 2)))
        for side in (0, 1) if _multiplies_activations(node) else ():
            softmax = _source(node.inputs[side], "Softmax")
            scores = None if softmax is None else _source(softmax.inputs[0], "MatMul")
            if scores is not None and _multiplies_activations(scores):
                # Transposed throughout, V^T softmax(K Q^T): the sides change.
                places = (scores, side), (scores, 1 - side)
                found.append(Attention(*places, (node, side), (node, 1 - side)))
    return found


@dataclass(frozen=True)
class Operands:
    """An attention whose operands nothing else reads: the names of its two products and of four tensors.

    ``name``: of the second product; ``tensors``: queries, keys, values.
    """

    name: str
    scores: str
    tensors: tuple[str, str, str]
    probabilities: str


@dataclass(frozen=True)
class PlainAttention:
    """softmax(scale Q K^T) V without a mask, of three nodes whose results nothing else reads.

    ``keys``: transposed, as the product takes them; ``dropped``: the nodes before the last product.
    """

    queries: ir.Value
    keys: ir.Value
    values: ir.Value
    scale: float
    dropped: tuple[ir.Node, ...]


def plain_attention(node: ir.Node) -> PlainAttention | None:
    """Return the attention that ends with the MatMul ``node``; None if there is none, or a mask is added."""
    if node.op_type != "MatMul" or node.domain not in STANDARD_DOMAINS:
        return None
    softmax = sole_source(node.inputs[0], "Softmax")
    if softmax is None or softmax.attributes.get_int("axis", -1) != -1:
        return None
    scaled, scale, value = None, 1.0, softmax.inputs[0]
    for op in ("Mul", "Div"):
        found = sole_source(value, op)
        factor = None if found is None else found.inputs[1]
        if found is not None and factor is not None and factor.is_initializer():
            constant = factor.const_value
            if constant is None or constant.size != 1:
                return None
            number = float(constant.numpy().reshape(()))
            scaled, value = found, found.inputs[0]
            scale = number if op == "Mul" else 1 / number
    scores = sole_source(value, "MatMul")
    if scores is None:
        return None
    operands = (scores.inputs[0], scores.inputs[1], node.inputs[1])
    # Products with constants are layers; their inputs and outputs are followed.
    queries, keys, values = operands
    if queries is None or keys is None or values is None:
        return None
    if any(value.is_initializer() for value in (queries, keys, values)):
        return None
    dropped = (scores, softmax) if scaled is None else (scores, scaled, softmax)
    return PlainAttention(queries, keys, values, scale, dropped)


def sole_source(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """Return the node of ``op_type`` that makes ``value``, where one node alone reads it."""
    made = None if value is None else value.producer()
    if value is None or made is None:
        return None
    if made.op_type != op_type or made.domain not in STANDARD_DOMAINS:
        return None
    return made if len(list(value.uses())) == 1 and not value.is_graph_output() else None


def separate_operands(model: ir.Model) -> tuple[Operands, ...]:
    """Return the attentions whose operands may be rounded: nothing else would see it."""
    found = []
    for one in attentions(model):
        if one.probabilities is None:
            continue
        places = (one.queries, one.keys, one.values, one.probabilities)
        values = [node.inputs[index] for node, index in places]
        if all(value is not None and len(value.uses()) == 1 for value in values):
            names = [value.name or "" for value in values if value is not None]
            tensors = names[0], names[1], names[2]
            nodes = one.values[0].name or "", one.queries[0].name or ""
            found.append(Operands(*nodes, tensors, names[3]))
    return tuple(found)


def operand_names(model: ir.Model) -> tuple[str, ...]:
    """Return the tensors of queries, keys and values whose range has to be known."""
    return tuple(name for one in separate_operands(model) for name in one.tensors)


def projections(graph: LayerGraph) -> list[tuple[Layer, ...]]:
    """Return groups of two or more products that read one tensor, and whose outputs feed the same attentions alone."""
    feeds: dict[tuple[ir.Node, int], int] = {}
    for number, one in enumerate(attentions(graph.model)):
        feeds.update(dict.fromkeys((one.queries, one.keys, one.values), number))
    values = {value.name: value for node in graph.model.graph for value in node.outputs}
    groups: dict[tuple[tuple[str, ...], frozenset[int]], list[Layer]] = {}
    for layer in graph.layers:
        fed = [_fed(values[use.output], feeds) for use in layer.uses]
        if layer.op != "Conv" and all(fed):
            groups.setdefault((layer.inputs, frozenset().union(*fed)), []).append(layer)
    return [tuple(group) for group in groups.values() if len(group) > 1]


def attended_layers(graph: LayerGraph) -> frozenset[str]:
    """Return the layers that an attention reads before any other layer: those of its queries, keys and values."""
    owners = {use.node: layer.name for layer in graph.layers for use in layer.uses}
    places = [(one.queries, one.keys, one.values) for one in attentions(graph.model)]
    waiting = [node.inputs[index] for operands in places for node, index in operands]
    seen, found = set[ir.Node](), set[str]()
    while waiting:
        value = waiting.pop()
        node = None if value is None else value.producer()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name in owners:
            found.add(owners[node.name])
        else:
            waiting += node.inputs
    return frozenset(found)


def _multiplies_activations(node: ir.Node) -> bool:
    return node.op_type == "MatMul" and not any(
        v is None or v.is_initializer() for v in node.inputs
    )


def _source(value: ir.Value | None, op: str, steps: int = MOST_STEPS) -> ir.Node | None:
    """Return the nearest node of type ``op`` that ``value`` is made from by scales and masks."""
    node = None if value is None else value.producer()
    if node is None or node.op_type == op or not steps or node.op_type not in _BETWEEN:
        return node if node is not None and node.op_type == op else None
    found = (_source(given, op, steps - 1) for given in node.inputs)
    return next((one for one in found if one is not None), None)


def _fed(value: ir.Value, feeds: dict[tuple[ir.Node, int], int]) -> frozenset[int]:
    """Return the attentions that ``value`` is an operand of; none where anything else reads it."""
    waiting, seen, found = [value], set[ir.Value](), set[int]()
    while waiting:
        one = waiting.pop()
        if one in seen:
            continue
        seen.add(one)
        if one.is_graph_output():
            return frozenset()
        for node, index in one.uses():
            if (node, index) in feeds:
                found.add(feeds[node, index])
            elif node.op_type in _CARRIES:
                waiting += node.outputs
            elif node.op_type not in _SIZES:
                return frozenset()
    return frozenset(found)
