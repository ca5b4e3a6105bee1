"""Which products of the plan are one kernel of its engine, by the builder's own log.

In: an ``EngineLog`` and the ``ExpectedLayers``. Out: ``ProductKernel`` objects, kept in the
engine's record: what ``latency.joins`` counts as one launch that reads its input once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mpq_deploy.engine.build_log import EngineLog
    from mpq_deploy.engine.expected import ExpectedLayer, ExpectedLayers


@dataclass(frozen=True)
class ProductKernel:
    """A kernel that multiplies, and the layers whose products it holds, all of one ``Scheme.kernel_family``."""

    family: str
    layers: tuple[str, ...]


def product_kernels(log: EngineLog, expected: ExpectedLayers) -> tuple[ProductKernel, ...]:
    """Return the kernels of the planned products, each once, in the engine's order.

    Left out: convolutions, weights that several nodes share, and bodies beside a branch or a slot.
    """
    layers = () if expected.slots else expected.layers
    by_node = {layer.nodes[0]: layer for layer in _plain_products(layers)}
    found: dict[ProductKernel, None] = {}
    for kernel in log.layers:
        names: dict[str, set[str]] = {}
        for layer in (by_node[node] for node in kernel.nodes if node in by_node):
            names.setdefault(layer.form.kernel_family, set()).add(layer.name)
        if kernel.compute:
            found |= {ProductKernel(family, tuple(sorted(n))): None for family, n in names.items()}
    return tuple(found)


def _plain_products(layers: Iterable[ExpectedLayer]) -> list[ExpectedLayer]:
    """Products of one node without a branch, whose parts are named after the body: BODY/outliers."""
    named = {layer.name: layer for layer in layers}
    bodies = {name.rpartition("/")[0] for name in named} & set(named)
    apart = (name in bodies or name.rpartition("/")[0] in bodies for name in named)
    return [
        layer
        for layer, part in zip(named.values(), apart)
        if layer.op != "Conv" and len(layer.nodes) == 1 and not part
    ]
