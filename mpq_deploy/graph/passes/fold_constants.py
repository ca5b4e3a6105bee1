"""Fold Transpose, Reshape, Unsqueeze, Squeeze, Cast, Slice and Shape of weights into the weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import onnx_ir as ir

from mpq_deploy.graph.constants import constant
from mpq_deploy.graph.layers import STANDARD_DOMAINS
from mpq_deploy.graph.passes.base import GraphPass, ensure
from mpq_deploy.models.spec import Array

Key = tuple[object, ...]


class FoldConstantsPass(GraphPass):
    """Replace a shape or type operator on a weight by a weight that has that shape or type.

    1. The operator is Transpose, Reshape, Flatten, Unsqueeze, Squeeze, Cast or CastLike, its first
       input an initializer, and its further inputs are initializers (CastLike: only the type of the
       second is needed).
    2. When all uses of the weight fold alike, the folded weight keeps the weight's name (a
       bias-free Linear's ``to_q.weight``, which PyTorch stores transposed, stays ``to_q.weight``),
       however many nodes share it.
    3. When some use stays or folds otherwise (tied weights), the folded copy is called
       ``NAME.transposed`` and so on, and the weight stays for the others.
    4. Chains fold from the weight on. Operators whose result is a graph output stay.
    5. A Slice folds where nothing else reads the weight, so that what is cut off is no longer
       stored: the table of positions from which Stable Diffusion 3 cuts those of one image size.
       Several Slices that cut one weight up (q, k and v out of one) fold where they take no more than it.
    6. A weight's Shape folds before all else, so that it is no other use of the weight.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fold until nothing folds any more."""
        modified = False
        while _fold_all(model.graph):
            modified = True
        return ir.passes.PassResult(model, modified)

    def ensures(self, model: ir.Model) -> None:
        """Nothing folds any more."""
        left = [
            name
            for name, value in model.graph.initializers.items()
            if any(_foldable(model.graph, value))
        ]
        ensure(not left, f"Operators on weights are left: {', '.join(left[:3])}.")


def _fold_all(graph: ir.Graph) -> bool:
    """Fold from every weight on, once; say whether anything folded (maybe another's indices)."""
    modified = False
    for value in list(graph.initializers.values()):
        pending = [value]
        while pending:
            folded = _fold_uses(graph, pending.pop())
            modified |= bool(folded)
            pending.extend(folded)
    return modified


def _fold_uses(graph: ir.Graph, value: ir.Value) -> list[ir.Value]:
    """Fold the uses of one initializer that can be; return the new initializers."""
    folded = []
    for nodes, sole in list(_foldable(graph, value)):
        fold, suffix = _FOLDS[nodes[0].op_type]
        name = value.name or nodes[0].op_type
        if not sole:
            name = free_name(graph, f"{name}.{suffix}")
        assert value.const_value is not None  # an initializer
        replacement = constant(name, fold(value.const_value.numpy(), nodes[0]))
        for node in nodes:
            node.outputs[0].replace_all_uses_with(replacement)
            graph.remove(node, safe=True)
        if sole:
            del graph.initializers[name]
        graph.register_initializer(replacement)
        folded.append(replacement)
    return folded


def _foldable(graph: ir.Graph, value: ir.Value) -> Iterator[tuple[list[ir.Node], bool]]:
    """Yield the nodes that fold alike on one initializer, and whether nothing else needs it."""
    groups: dict[Key, list[ir.Node]] = {}
    for node, index in value.uses():
        key = _fold_key(graph, node, index)
        if key is not None:
            groups.setdefault(key, []).append(node)
    foldable = sum(len(nodes) for nodes in groups.values())
    sole = len(groups) == 1 and foldable == len(value.uses())
    sole = sole and not value.is_graph_output() and not value.is_graph_input()
    shapes = [nodes for nodes in groups.values() if nodes[0].op_type == "Shape"]
    cut = sole or (foldable == len(value.uses()) and _cut_up(value, groups.values()))
    for nodes in shapes or groups.values():
        if cut or nodes[0].op_type != "Slice":
            yield nodes, sole


def _cut_up(value: ir.Value, groups: Iterable[list[ir.Node]]) -> bool:
    """Say whether a weight is read by Slices alone, which together hold no more than the weight."""
    if value.const_value is None or value.is_graph_output() or value.is_graph_input():
        return False
    nodes = [alike[0] for alike in groups]
    if any(node.op_type != "Slice" for node in nodes):
        return False
    array = value.const_value.numpy()
    return sum(_FOLDS["Slice"][0](array, node).size for node in nodes) <= array.size


def _fold_key(graph: ir.Graph, node: ir.Node, index: int) -> Key | None:
    """Return what the fold depends on besides the weight, or None when the node stays."""
    ours = node.domain in STANDARD_DOMAINS and node.graph is graph
    if index != 0 or node.op_type not in _FOLDS or not ours or node.outputs[0].is_graph_output():
        return None
    if node.op_type == "CastLike":
        like = node.inputs[1]
        return ("CastLike", like.dtype) if like is not None and like.dtype is not None else None
    values = []
    for value in node.inputs[1:]:
        if value is not None and (not value.is_initializer() or value.is_graph_input()):
            return None
        values.append(None if value is None else tuple(value.const_value.numpy().ravel().tolist()))  # type: ignore[union-attr]
    attributes = tuple(sorted((name, str(item.value)) for name, item in node.attributes.items()))
    return (node.op_type, attributes, *values)


def shape_chain(value: ir.Value) -> bool:
    """Say whether ``value`` is made of one initializer by operators that ``FoldConstantsPass`` folds."""
    while (node := value.producer()) is not None:
        source, *others = node.inputs
        plain = all(other is None or other.is_initializer() for other in others)
        if source is None or node.op_type not in _FOLDS or not plain:
            return False
        value = source
    return value.is_initializer()


def free_name(graph: ir.Graph, name: str) -> str:
    """Return ``name``, numbered where an initializer of ``graph`` has it."""
    number, free = 1, name
    while free in graph.initializers:
        number += 1
        free = f"{name}.{number}"
    return free


def _integers(node: ir.Node, index: int, attribute: str) -> list[int] | None:
    """Return integers given as input ``index`` or, in older opsets, as an attribute."""
    if len(node.inputs) > index and node.inputs[index] is not None:
        return [int(i) for i in node.inputs[index].const_value.numpy().ravel()]  # type: ignore[union-attr]
    given = node.attributes.get(attribute)
    return None if given is None else [int(i) for i in given.value]


def _transpose(array: Array, node: ir.Node) -> Array:
    return np.transpose(array, _integers(node, 1, "perm"))


def _reshape(array: Array, node: ir.Node) -> Array:
    shape = _integers(node, 1, "shape") or []
    keep_zero = node.attributes.get("allowzero")
    if keep_zero is None or not keep_zero.value:
        shape = [array.shape[i] if size == 0 else size for i, size in enumerate(shape)]
    return array.reshape(shape)


def _flatten(array: Array, node: ir.Node) -> Array:
    attribute = node.attributes.get("axis")
    axis = 1 if attribute is None else int(attribute.value)
    axis += array.ndim if axis < 0 else 0
    return array.reshape(math.prod(array.shape[:axis]), -1)


def _unsqueeze(array: Array, node: ir.Node) -> Array:
    return np.expand_dims(array, tuple(_integers(node, 1, "axes") or ()))


def _squeeze(array: Array, node: ir.Node) -> Array:
    axes = _integers(node, 1, "axes")
    return np.squeeze(array, None if axes is None else tuple(axes))


def _cast(array: Array, node: ir.Node) -> Array:
    return array.astype(ir.DataType(node.attributes["to"].value).numpy())


def _cast_like(array: Array, node: ir.Node) -> Array:
    return array.astype(node.inputs[1].dtype.numpy())  # type: ignore[union-attr]


def _shape(array: Array, node: ir.Node) -> Array:
    start, end = (node.attributes.get(name) for name in ("start", "end"))
    cut = slice(*(None if one is None else one.value for one in (start, end)))
    return np.array(array.shape[cut], np.int64)


def _slice(array: Array, node: ir.Node) -> Array:
    starts, ends = _integers(node, 1, "starts") or [], _integers(node, 2, "ends") or []
    axes = _integers(node, 3, "axes") or list(range(len(starts)))
    steps = _integers(node, 4, "steps") or [1] * len(starts)
    cut = [slice(None)] * array.ndim
    for axis, start, end, step in zip(axes, starts, ends, steps):
        cut[axis] = slice(start, end, step)
    return np.ascontiguousarray(array[tuple(cut)])


# Operator -> how it folds, and what the name of a copy ends with.
_FOLDS: dict[str, tuple[Callable[[Array, ir.Node], Array], str]] = {
    "Transpose": (_transpose, "transposed"),
    "Reshape": (_reshape, "reshaped"),
    "Flatten": (_flatten, "reshaped"),
    "Unsqueeze": (_unsqueeze, "reshaped"),
    "Squeeze": (_squeeze, "reshaped"),
    "Cast": (_cast, "cast"),
    "CastLike": (_cast_like, "cast"),
    "Shape": (_shape, "shape"),
    "Slice": (_slice, "part"),
}
