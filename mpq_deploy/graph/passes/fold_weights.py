"""Fold weights that the graph computes from other weights, so that they are layers like all others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from math import prod

import onnx_ir as ir

from mpq_deploy.graph.constant_arithmetic import Arithmetic, arithmetic_of
from mpq_deploy.graph.constants import constant
from mpq_deploy.graph.passes.base import GraphPass, ensure
from mpq_deploy.graph.passes.fold_constants import free_name, shape_chain
from mpq_deploy.graph.passes.fold_positions import constant_values, remove_unread
from mpq_deploy.models.spec import Array

# Operators whose second operand is a weight.
WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
# Numbers of all weights that are computed (our choice: more than any denoiser has).
MOST = 1 << 34
# Numbers of one that is kept in memory; larger ones are computed whenever they are read.
KEPT = 1 << 16
# Suffixes that torch's parametrizations give to what a weight is computed from.
ENDINGS = (
    ".parametrizations.weight.original1",
    ".parametrizations.weight.original",
    ".weight_v",
    ".weight_orig",
)


class FoldWeightsPass(GraphPass):
    """Replace arithmetic on constants by its result.

    Weight standardization, weight norm, spectral norm and the sum of a weight and a low-rank product
    are computed by the graph at every call; TensorRT computes them once when it builds, so that what
    it stores is the result. Here the result is the weight.

    1. A float that some node reads, computed by operators of ``COMPUTED`` from initializers alone,
       becomes an initializer where it is the weight of a Conv, ConvTranspose, Gemm or MatMul.
    2. Any other folds where it takes no more bytes than the weights that it follows from, and these
       are read by nothing else.
    3. It takes the name of the largest weight that it follows from, where nothing else reads that
       one (``conv.weight_v`` and ``conv.parametrizations.weight.original1`` become
       ``conv.weight``), else that name and ``.folded``.
    4. What is too large (``LARGEST`` for one, ``MOST`` together), a graph output, an integer, or a
       mere shape operator on one weight (``FoldConstantsPass``) stays.

    Large ones are computed when they are read, one at a time.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Compute, put the results in place, take out what nothing reads any more."""
        graph, results = model.graph, list[_Result]()
        total = 0
        for value in _frontier(graph):
            result = _computed(value, graph.opset_imports.get("", 0))
            if result is not None and total + result.size <= MOST:
                total += result.size
                results.append(result)
        for result in results:
            graph.register_initializer(result.new)
            result.old.replace_all_uses_with(result.new)
        if results:
            remove_unread(graph)
            _name(graph, results)
        return ir.passes.PassResult(model, bool(results))

    def ensures(self, model: ir.Model) -> None:
        """No weight of a reasonable size is left to compute."""
        opset = model.graph.opset_imports.get("", 0)
        left = [value.name or "" for value in _frontier(model.graph) if _computed(value, opset)]
        ensure(not left, f"Weights that are computed from weights are left: {', '.join(left[:3])}.")


@dataclass(frozen=True)
class _Result:
    """A computed value, the initializer in its place, and the weight that gives its name."""

    old: ir.Value
    new: ir.Value
    leaf: str
    size: int


def _frontier(graph: ir.Graph) -> list[ir.Value]:
    """Return the floats computed from constants alone that some other node reads, and that fold."""
    known = constant_values(graph)
    return [value for value in known if _folds(value, known)]


def _folds(value: ir.Value, known: Collection[ir.Value]) -> bool:
    """Whether a constant value is one that a node beyond the constants reads, and is worth folding."""
    readers = [
        (node, index)
        for node, index in value.uses()
        if not all(one in known for one in node.outputs)
    ]
    # A type that is not declared shows when it is computed.
    floating = value.dtype is None or value.dtype.is_floating_point()
    if not readers or not floating or value.is_graph_output() or shape_chain(value):
        return False
    weight = any(node.op_type in WEIGHTED and index == 1 for node, index in readers)
    return weight or _alone(value)


def _alone(value: ir.Value) -> bool:
    """Whether all that ``value`` follows from is read for nothing but it."""
    waiting, seen = [value], set[ir.Value]()
    inside: set[ir.Node] = set()
    while waiting:
        one = waiting.pop()
        node = one.producer()
        if node is None or node in inside:
            continue
        inside.add(node)
        sources = [source for source in node.inputs if source is not None]
        seen.update(sources)
        waiting += sources
    return all(
        not source.is_graph_output() and all(node in inside for node, _ in source.uses())
        for source in seen
        if source.const_value is None or source.const_value.dtype.is_floating_point()
    )


def _computed(value: ir.Value, opset: int) -> _Result | None:
    """Return the result for ``value``; None where it is not a float or too large."""
    arithmetic = arithmetic_of(value, opset)
    leaves = {
        name: tensor
        for name, tensor in arithmetic.leaves.items()
        if tensor.dtype.is_floating_point()
    }
    if not leaves:
        return None
    array = arithmetic.compute()
    if array is None or array.dtype.kind != "f":
        return None
    given = sum(prod(tensor.shape.numpy()) for tensor in leaves.values())
    weight = any(node.op_type in WEIGHTED and index == 1 for node, index in value.uses())
    if not weight and array.size > given:
        return None
    leaf = max(leaves, key=lambda name: (prod(leaves[name].shape.numpy()), name))
    new = constant(f"{value.name}.folded", _tensor(arithmetic, array, f"{value.name}.folded"))
    return _Result(value, new, leaf, array.size)


def _tensor(arithmetic: Arithmetic, array: Array, name: str) -> Array | ir.TensorProtocol:
    if array.size <= KEPT:
        return array

    def again() -> ir.TensorProtocol:
        computed = arithmetic.compute()
        assert computed is not None  # its size was checked before
        return ir.tensor(computed, name=name)

    return ir.LazyTensor(
        again, ir.DataType.from_numpy(array.dtype), ir.Shape(array.shape), name=name
    )


def _name(graph: ir.Graph, results: list[_Result]) -> None:
    """Give results the names of weights that nothing reads any more; take those out."""
    claims = Counter(result.leaf for result in results)
    for result in results:
        leaf = graph.initializers.get(result.leaf)
        unread = leaf is not None and not (any(leaf.uses()) or leaf.is_graph_output())
        alone = claims[result.leaf] == 1 and unread and leaf is not None
        name = _plain_name(graph, result.leaf) if alone else f"{result.leaf}.folded"
        if alone:
            del graph.initializers[result.leaf]
        del graph.initializers[result.new.name or ""]
        result.new.name = free_name(graph, name)
        graph.register_initializer(result.new)


def _plain_name(graph: ir.Graph, leaf: str) -> str:
    """Return the name that a weight has without its parametrization."""
    ending = next((one for one in ENDINGS if leaf.endswith(one)), None)
    plain = leaf if ending is None else f"{leaf.removesuffix(ending)}.weight"
    return leaf if plain in graph.initializers else plain
