"""Which Conv, Gemm and MatMul of a graph are layers, which are not, and why: nothing is left out silently.

In: a ``LayerGraph``. Out: a ``Census``, as text in one or two lines and as plain values.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import onnx_ir as ir

from mpq_deploy.graph.layers import LAYER_OPS, STANDARD_DOMAINS, LayerGraph, refusal

HALF_BYTES = 2
TWO_ACTIVATIONS = "multiply two activations"
AT_RUN_TIME = "have a weight that the graph computes at run time"
BY_INPUTS = "have a weight that depends on the model's inputs"
IN_SUBGRAPH = "lie inside a subgraph"
# Reasons that are listed; the others are only counted.
TOLD = 4


@dataclass(frozen=True)
class NoLayers:
    """Nodes that are not layers for one reason; ``bytes`` of their constants in FP16."""

    reason: str
    nodes: int
    bytes: int


@dataclass(frozen=True)
class Census:
    """Nodes that apply a layer's weight, the layers' bytes in FP16, and the nodes that do not."""

    nodes: int
    bytes: int
    others: tuple[NoLayers, ...]

    def text(self) -> str:
        """Describe it in a sentence or two, the reason with the most bytes first."""
        total = self.nodes + sum(other.nodes for other in self.others)
        said = f"{self.nodes} of {total} Conv, Gemm and MatMul are layers ({_size(self.bytes)} in FP16)."
        parts = [
            f"{other.nodes} {other.reason}" + (f" ({_size(other.bytes)})" if other.bytes else "")
            for other in self.others[:TOLD]
        ]
        rest = sum(other.nodes for other in self.others[TOLD:])
        parts += [f"{rest} for other reasons"] if rest else []
        return f"{said} No layers: {'; '.join(parts)}." if parts else said

    def values(self) -> dict[str, Any]:
        """Return plain values for a file."""
        others = [
            {"bytes": other.bytes, "nodes": other.nodes, "reason": other.reason}
            for other in self.others
        ]
        return {"layer_bytes": self.bytes, "layer_nodes": self.nodes, "others": others}


def take_census(graph: LayerGraph) -> Census:
    """Count every Conv, Gemm and MatMul of ``graph``, those of subgraphs too."""
    uses = {use.node for layer in graph.layers for use in layer.uses}
    known = {other.name: other.reason for other in graph.others}
    static = _static_values(graph.model.graph)
    groups: dict[str, list[int]] = {}
    layers = 0
    for node in ir.traversal.RecursiveGraphIterator(graph.model.graph):
        if node.op_type not in LAYER_OPS or node.domain not in STANDARD_DOMAINS:
            continue
        if node.graph is graph.model.graph and node.name in uses:
            layers += 1
            continue
        reason = IN_SUBGRAPH
        if node.graph is graph.model.graph:
            reason = _reason(node, static, known)
        elements = sum(_elements(value, static) for value in node.inputs[:2] if value is not None)
        groups.setdefault(reason, []).append(HALF_BYTES * elements)
    others = [NoLayers(reason, len(sizes), sum(sizes)) for reason, sizes in groups.items()]
    others.sort(key=lambda other: (-other.bytes, -other.nodes, other.reason))
    size = HALF_BYTES * sum(layer.weights for layer in graph.layers)
    return Census(layers, size, tuple(others))


def _reason(node: ir.Node, static: set[ir.Value], known: dict[str, str]) -> str:
    operands = [value for value in node.inputs[:2] if value is not None]
    constants = [value for value in operands if value in static]
    if not constants:
        return BY_INPUTS if node.op_type == "Conv" else TWO_ACTIVATIONS
    for index, value in enumerate(node.inputs[:2]):
        if value is not None and value.is_initializer():
            reason = refusal(node, index, value) or known.get(value.name or "", "")
            return f"are left out: {reason}" if reason else AT_RUN_TIME
    return AT_RUN_TIME


def _static_values(graph: ir.Graph) -> set[ir.Value]:
    """Return the values that depend on constants alone."""
    static = set(graph.initializers.values())
    for node in graph:
        made_of = [value for value in node.inputs if value is not None]
        if made_of and static.issuperset(made_of):
            static.update(node.outputs)
    return static


def _elements(value: ir.Value, static: set[ir.Value]) -> int:
    """Return the elements of the constants that a static value is made of; 0 for others."""
    return sum(
        prod(int(size) for size in constant.const_value.shape.numpy())
        for constant in set(_constants(value, static))
        if constant.const_value is not None
    )


def _constants(value: ir.Value, static: set[ir.Value]) -> Iterator[ir.Value]:
    waiting, seen = [value], set[ir.Value]()
    while waiting:
        one = waiting.pop()
        if one in seen:
            continue
        seen.add(one)
        producer = one.producer()
        if one.is_initializer():
            yield one
        elif one in static and producer is not None:
            waiting += [given for given in producer.inputs if given is not None]


def _size(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.2f} MB"
