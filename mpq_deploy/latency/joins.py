"""Which products of one input are one kernel: as an engine's own log shows, else assumed.

In: a graph, its groups of queries, keys and values, and the kernels of an engine that was built of
it. Out: for some layers under one scheme, the kernels that compute them. An engine shows only what
its plan has. What it does not show is taken from other groups of as many layers in that family of
schemes, where all of those are alike; else ``Scheme.joins`` says it (docs/engine-forms.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mpq_deploy.engine.product_kernels import ProductKernel
from mpq_deploy.formats.interfaces import Scheme
from mpq_deploy.graph.layers import Layer, LayerGraph

# The layers of one kernel, and how much of it those asked for are.
Share = tuple[tuple[Layer, ...], float]
# The places in a group that are one kernel, kernel by kernel.
Pattern = frozenset[frozenset[int]]


@dataclass(frozen=True)
class Shown:
    """What an engine's log shows; ``by``: target, builder and version."""

    kernels: tuple[ProductKernel, ...]
    by: str


class Joins:
    """Kernels of several products. ``groups``: layers that may be one, as ``graph.attention`` finds them."""

    def __init__(
        self, graph: LayerGraph, groups: Sequence[Sequence[Layer]] = (), shown: Shown | None = None
    ) -> None:
        self.groups, self.by = groups, shown.by if shown else ""
        self._kernels = _kernels(graph, shown.kernels if shown else ())
        self._patterns = self._alike()
        grouped = {layer.name for group in groups for layer in group}
        singles = dict.fromkeys(name for _, name in self._kernels if name not in grouped)
        layers = {layer.name: layer for layer in graph.layers}
        self._singles = [layers[name] for name in singles]

    def shares(self, layers: Sequence[Layer], scheme: Scheme) -> tuple[list[Share], bool]:
        """Return the kernels of ``layers`` under ``scheme``, and whether a log shows them.

        A kernel may hold other layers beside them, whose share counts for those. Without a branch's
        own kernels: those keep products apart.
        """
        if scheme.branch.kernels:
            return [], False
        family = scheme.kernel_family
        shown = [self._kernels.get((family, layer.name), ()) for layer in layers]
        if all(shown):
            names = {layer.name for layer in layers}
            kernels = {tuple(layer.name for layer in kernel): kernel for kernel in shown}
            return [(k, len(names & set(n)) / len(k)) for n, k in kernels.items()], True
        pattern = self._patterns.get((family, len(layers)))
        if pattern is not None:
            return [(tuple(layers[i] for i in sorted(part)), 1.0) for part in pattern], True
        assumed = scheme.joins and len(layers) > 1
        return [(tuple(layers), 1.0)] if assumed else [], False

    def of_plan(self, schemes: Mapping[str, Scheme]) -> list[tuple[Sequence[Layer], Scheme]]:
        """Return the layers that may share kernels under a plan (layer -> scheme), group by group."""
        found: list[tuple[Sequence[Layer], Scheme]] = []
        for group in self.groups:
            alike = len({schemes[layer.name] for layer in group}) == 1
            sets = [group] if alike else [(layer,) for layer in group]
            found += [(layers, schemes[layers[0].name]) for layers in sets]
        return [*found, *(((layer,), schemes[layer.name]) for layer in self._singles)]

    def basis(self, schemes: Mapping[str, Scheme]) -> str:
        """Say on what a plan's time counts products of one input as one kernel; empty without any."""
        groups = [(g, schemes[g[0].name]) for g in self.groups]
        groups = [(g, s) for g, s in groups if all(schemes[layer.name] == s for layer in g)]
        if not groups:
            return ""
        what = "queries, keys and values under one scheme"
        shown = sum(self.shares(group, scheme)[1] for group, scheme in groups)
        if not shown:
            why = (
                f"the log of {self.by} has none of them" if self.by else "no engine was built here"
            )
            return f"which {what} are one kernel is assumed: {why}"
        rest = len(groups) - shown
        assumed = f", {rest} assumed" if rest else ""
        return f"{what}: {shown} of {len(groups)} groups as in the log of {self.by}{assumed}"

    def _alike(self) -> dict[tuple[str, int], Pattern]:
        """Return how groups are split into kernels, by family and size, where all that are shown are alike."""
        found: dict[tuple[str, int], set[Pattern]] = {}
        for family in {family for family, _ in self._kernels}:
            for group in self.groups:
                kernels = [self._kernels.get((family, layer.name), ()) for layer in group]
                if all(kernels):
                    parts = (
                        frozenset(i for i, own in enumerate(kernels) if own == k) for k in kernels
                    )
                    found.setdefault((family, len(group)), set()).add(frozenset(parts))
        return {key: patterns.pop() for key, patterns in found.items() if len(patterns) == 1}


def _kernels(
    graph: LayerGraph, kernels: Sequence[ProductKernel]
) -> dict[tuple[str, str], tuple[Layer, ...]]:
    """Return (family, layer) -> the layers in its kernel that read the same tensor."""
    products = {n.name: n for n in graph.layers if n.op != "Conv" and len(n.uses) == 1}
    found: dict[tuple[str, str], tuple[Layer, ...]] = {}
    for kernel in kernels:
        by_input: dict[str, list[Layer]] = {}
        for layer in (products[name] for name in kernel.layers if name in products):
            by_input.setdefault(layer.uses[0].input, []).append(layer)
        for together in by_input.values():
            for layer in together:
                key = kernel.family, layer.name
                if len(together) > len(found.get(key, ())):
                    found[key] = tuple(together)
    return found
