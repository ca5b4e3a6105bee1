"""Fold integers that a graph computes from constants by way of floats: buckets of relative positions."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from mpq_deploy.graph.constant_arithmetic import COMPUTED, arithmetic_of
from mpq_deploy.graph.constants import constant
from mpq_deploy.graph.layers import STANDARD_DOMAINS
from mpq_deploy.graph.passes.base import GraphPass, ensure
from mpq_deploy.graph.passes.fold_constants import free_name
from mpq_deploy.models.spec import Array

# Numbers of one result (our choice: positions of 2,048 tokens to each other).
MOST = 1 << 22


class FoldPositionsPass(GraphPass):
    """Replace integers that follow from constants alone, with floats on the way, by their values.

    T5 sorts distances of tokens into buckets by their logarithm: that of 0 is infinite (a Where
    passes it over), and in FP16 it rounds into other buckets than in FP32. PyTorch's exporter leaves
    these nodes in the graph from 91 tokens on.

    1. An integer that a Gather takes as indices, or that some node reads which is not computed
       from constants alone.
    2. It is computed by operators of ``COMPUTED`` from initializers, at least one of which gives a
       float: counting in integers is exact, and smaller than its results.
    3. Indices alone are stored in 32 bits, as TensorRT stores them.
    4. A graph output, and what has over ``MOST`` numbers, stays.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Compute, put the results in place, take out what nothing reads any more."""
        graph = model.graph
        found = [(value, _computed(value)) for value in _frontier(graph)]
        for value, array in found:
            if array is None:
                continue
            indices = all(node.op_type == "Gather" and index == 1 for node, index in value.uses())
            new = constant(free_name(graph, f"{value.name}.folded"), _stored(array, indices))
            graph.register_initializer(new)
            value.replace_all_uses_with(new)
        modified = any(array is not None for _, array in found)
        if modified:
            remove_unread(graph)
        return ir.passes.PassResult(model, modified)

    def ensures(self, model: ir.Model) -> None:
        """No such integers are left."""
        left = [one.name or "" for one in _frontier(model.graph) if _computed(one) is not None]
        ensure(not left, f"Positions that are computed from constants are left: {left[:3]}.")


def constant_values(graph: ir.Graph) -> dict[ir.Value, None]:
    """Return what operators of ``COMPUTED`` compute from initializers alone, in the graph's order."""
    known: dict[ir.Value, None] = {}
    for node in graph:
        sources = [value for value in node.inputs if value is not None]
        if (
            node.domain in STANDARD_DOMAINS
            and node.op_type in COMPUTED
            and sources
            and all(value in known or _is_constant(value) for value in sources)
        ):
            known.update(dict.fromkeys(node.outputs))
    return known


def remove_unread(graph: ir.Graph) -> None:
    """Take out nodes of ``COMPUTED`` that nothing reads, the last ones first."""
    for node in reversed(graph):
        read = any(value.is_graph_output() or any(value.uses()) for value in node.outputs)
        if not read and node.op_type in COMPUTED:
            graph.remove(node, safe=True)


def _is_constant(value: ir.Value) -> bool:
    return value.is_initializer() and not value.is_graph_input() and value.const_value is not None


def _frontier(graph: ir.Graph) -> list[ir.Value]:
    """Return the integers that fold, by what reads them and what they are computed through."""
    known = constant_values(graph)
    return [
        value
        for value in known
        if value.dtype is not None
        and value.dtype.is_integer()
        and not value.is_graph_output()
        and any(_reads(node, index, known) for node, index in value.uses())
        and _through_floats(value)
    ]


def _reads(node: ir.Node, index: int, known: dict[ir.Value, None]) -> bool:
    return (node.op_type == "Gather" and index == 1) or not all(
        one in known for one in node.outputs
    )


def _through_floats(value: ir.Value) -> bool:
    """Whether a node on the way to ``value`` gives floats."""
    waiting, seen = [value.producer()], set[ir.Node]()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if any(one.dtype is not None and one.dtype.is_floating_point() for one in node.outputs):
            return True
        waiting += [source.producer() for source in node.inputs if source is not None]
    return False


def _stored(array: Array, indices: bool) -> Array:
    """Return integers in 32 bits where they are ``indices`` and fit."""
    narrow = array.astype(np.int32)
    return narrow if indices and np.array_equal(narrow, array) else array


def _computed(value: ir.Value) -> Array | None:
    """Return the numbers of ``value``; None where they, or numbers on the way, are too many."""
    graph = value.graph
    array = arithmetic_of(value, graph.opset_imports.get("", 0) if graph else 0).compute()
    fits = array is not None and array.dtype.kind in "iu" and array.size <= MOST
    return array if fits else None
