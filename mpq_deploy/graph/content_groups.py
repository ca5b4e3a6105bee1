"""Which layers carry a text's content into the sample: cross-attention and the feed-forward behind it (MixDQ's group).

In: the layers of a graph, the names of its sample and of the conditions that hold tokens. Out: layer -> its role. All
by what depends on what, never by names: a product of two activations, one of which depends on the text alone and the
other on the sample, is cross-attention. (Zhao et al. 2024, "MixDQ", arXiv 2405.17873, name the kinds of layers; the way
to find them is ours.)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import networkx as nx
import onnx_ir as ir

from mpq_deploy.graph.layers import LayerGraph, dataflow

KEYS, QUERIES, OUTPUT, FEED_FORWARD = "keys and values", "queries", "output", "feed-forward"
# Operators that multiply activations by each other.
PRODUCTS = ("MatMul", "Attention")


def content_layers(graph: LayerGraph, sample: str, texts: Iterable[str]) -> dict[str, str]:
    """Return the content layers with their roles, in graph order; empty where there is no cross-attention.

    Joint attention, whose keys come from text and sample together, is none.
    """
    return _Groups(graph, sample, frozenset(texts)).roles()


class _Groups:
    """A graph with, for each value, whether it depends on the sample and on the text."""

    def __init__(self, graph: LayerGraph, sample: str, texts: frozenset[str]) -> None:
        self._graph = graph
        self._nodes = {node.name or "": node for node in graph.model.graph}
        self._flow = dataflow(graph.model)
        self._layer = {use.node: layer.name for layer in graph.layers for use in layer.uses}
        self._of_sample = _depending(graph.model, {sample})
        self._of_text = _depending(graph.model, texts) - self._of_sample

    def roles(self) -> dict[str, str]:
        """Return layer -> role, in graph order."""
        found: dict[str, str] = {}
        for name, node in self._nodes.items():
            if not self._crosses(node):
                continue
            for value in node.inputs:
                producer = value.producer() if value is not None else None
                if value is None or producer is None:
                    continue
                text = value.name in self._of_text
                for layer in self._upstream(producer.name or "", through_layers=text):
                    found.setdefault(self._layer[layer], KEYS if text else QUERIES)
            for output in self._downstream(name):
                found.setdefault(self._layer[output], OUTPUT)
                for layer in self._feed_forward(output):
                    found.setdefault(self._layer[layer], FEED_FORWARD)
        return {layer.name: found[layer.name] for layer in self._graph.layers if layer.name in found}

    def _crosses(self, node: ir.Node) -> bool:
        return self._product(node) and any(v is not None and v.name in self._of_text for v in node.inputs)

    def _product(self, node: ir.Node) -> bool:
        """Whether ``node`` multiplies activations of which one depends on the sample."""
        if node.op_type not in PRODUCTS or node.name in self._layer:
            return False
        known = [v.name in self._of_sample or v.name in self._of_text for v in node.inputs if v is not None]
        return sum(known) > 1 and any(v is not None and v.name in self._of_sample for v in node.inputs)

    def _sum(self, node: ir.Node) -> bool:
        """Whether ``node`` adds two values that both depend on the sample: where a residual branch ends."""
        return node.op_type == "Add" and all(v is not None and v.name in self._of_sample for v in node.inputs)

    def _walk(self, start: Iterable[str], forward: bool, ends: bool) -> Iterator[str]:
        """Yield the nodes from ``start`` on; with ``ends`` none beyond a layer, a product or a sum, which it yields."""
        step = self._flow.successors if forward else self._flow.predecessors
        todo, seen = list(start), set(start)
        while todo:
            name = todo.pop()
            yield name
            node = self._nodes[name]
            if ends and (name in self._layer or self._product(node) or self._sum(node)):
                continue
            todo += [other for other in step(name) if other not in seen]
            seen.update(step(name))

    def _upstream(self, name: str, through_layers: bool) -> list[str]:
        """Return the layers' nodes that ``name`` comes from: the nearest, or all of them."""
        return [n for n in self._walk([name], forward=False, ends=not through_layers) if n in self._layer]

    def _downstream(self, name: str) -> list[str]:
        """Return the nearest layers' nodes behind ``name``."""
        behind = self._walk(list(self._flow.successors(name)), forward=True, ends=True)
        return [n for n in behind if n in self._layer]

    def _feed_forward(self, output: str) -> list[str]:
        """Return the layers' nodes of the residual branch on the sum that ``output`` goes into; none if it attends."""
        found: list[str] = []
        for name in self._walk(list(self._flow.successors(output)), forward=True, ends=True):
            if name in self._layer or not self._sum(self._nodes[name]):
                continue
            for end in (n for n in self._flow.successors(name) if self._sum(self._nodes[n])):
                branch = nx.descendants(self._flow, name) & nx.ancestors(self._flow, end)
                if not any(self._product(self._nodes[n]) for n in branch):
                    found += [n for n in branch if n in self._layer]
        return found


def _depending(model: ir.Model, inputs: Iterable[str]) -> set[str]:
    """Return the names of ``inputs`` and of all values that depend on them."""
    known = set(inputs)
    for node in model.graph:
        if any(value is not None and value.name in known for value in node.inputs):
            known.update(value.name or "" for value in node.outputs)
    return known
