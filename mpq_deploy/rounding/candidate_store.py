"""The candidates of a run: the schemes that each layer may take, and its rounded weights.

In: the stage folder that ``rounding.rounder`` filled, one file per layer. Out: ``LayerCandidates``
by layer name, read on demand.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mpq_deploy.formats.candidates import (
    Choices,
    LayerCandidates,
    load_candidates,
    load_choices,
    weight_matrix,
    with_promoted_rows,
)
from mpq_deploy.formats.scheme import Scheme, branches_of, ranges_of, schemes_named
from mpq_deploy.graph.layers import Layer, LayerGraph
from mpq_deploy.graph.writers.quantize_layers import weight_array
from mpq_deploy.models.spec import Array
from mpq_deploy.system.array_file import read_arrays
from mpq_deploy.system.inputs import whole
from mpq_deploy.system.mapped import drop_pages

if TYPE_CHECKING:
    from mpq_deploy.recipe import Recipe
    from mpq_deploy.run.view import Run

# Layer number -> its output channels, most salient first, beside the candidates' files.
ROW_ORDERS = "row-orders.npz"
# Bytes of candidates that stay in memory after reading; none do where all candidates take more than
# HELD_SHARE times as many (our choice).
HELD_BYTES, HELD_SHARE = 512 << 20, 2


def wanted_schemes(recipe: Recipe) -> tuple[Scheme, ...]:
    """Return the schemes that the recipe lets the solver choose from, with ranges and branches."""
    bodies = ranges_of(schemes_named(recipe.allocate.schemes), recipe.allocate.ranges)
    return (*bodies, *branches_of(bodies, recipe.allocate.branches))


class StoredCandidates(Mapping[str, LayerCandidates]):
    """The candidates of ``layers`` (None: all) in ``folder``, read when they are indexed.

    The layers read first stay in memory, up to ``limit`` bytes. None: ``held_bytes`` of all files.
    ``orders``: layer name -> its output channels, most salient first, for layers with a scheme that
    promotes channels.
    """

    def __init__(
        self,
        folder: Path,
        graph: LayerGraph,
        orders: Mapping[str, Array],
        layers: tuple[Layer, ...] | None = None,
        limit: int | None = None,
    ) -> None:
        self.folder, self._graph, self._orders = folder, graph, orders
        chosen = {layer.name for layer in (graph.layers if layers is None else layers)}
        self._numbers = {
            layer.name: i for i, layer in enumerate(graph.layers) if layer.name in chosen
        }
        if limit is None:
            files = (candidate_file(folder, number) for number in self._numbers.values())
            limit = held_bytes(sum(file.stat().st_size for file in files if file.is_file()))
        self._limit = limit
        self._held: dict[str, LayerCandidates] = {}
        self._bytes = 0

    @classmethod
    def of(cls, folder: Path, graph: LayerGraph, limit: int | None = None) -> StoredCandidates:
        """Open a finished stage ``folder``."""
        names = {str(number): layer.name for number, layer in enumerate(graph.layers)}
        orders = read_arrays(folder / ROW_ORDERS)
        with whole(folder / ROW_ORDERS):
            named = {names[number]: order for number, order in orders.items()}
        return cls(folder, graph, named, limit=limit)

    def __getitem__(self, name: str) -> LayerCandidates:
        held = self._held.get(name)
        if held is not None:
            return held
        number = self._numbers[name]
        found = self._read(number)
        size = candidate_file(self.folder, number).stat().st_size + found.weight.nbytes
        if self._bytes + size <= self._limit:
            self._held[name] = found
            self._bytes += size
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._numbers)

    def __len__(self) -> int:
        return len(self._numbers)

    def _read(self, number: int) -> LayerCandidates:
        layer = self._graph.layers[number]
        weight = weight_matrix(layer, weight_array(self._graph.model, layer))
        candidates = load_candidates(layer, weight, candidate_file(self.folder, number))
        order = self._orders.get(layer.name)
        return candidates if order is None else with_promoted_rows(candidates, order)


def held_bytes(whole: int) -> int:
    """Return how many bytes of candidates are kept in memory; ``whole``: bytes of all candidates.

    None where all take over ``HELD_SHARE`` times ``HELD_BYTES`` (860 M weights have gigabytes of
    codes): keeping a small part saves hardly any time.
    """
    return HELD_BYTES if whole <= HELD_SHARE * HELD_BYTES else 0


def candidate_file(folder: Path, number: int) -> Path:
    """Return the path of the candidates of layer ``number``, its index in the graph's layers."""
    return folder / f"{number:05d}.safetensors"


def with_rows(folder: Path, graph: LayerGraph) -> StoredCandidates:
    """Open the candidates in ``folder`` of the layers with a ``rows`` scheme, without orders."""
    layers = [
        layer
        for number, layer in enumerate(graph.layers)
        if any(s.branch.promotes for s in load_choices(candidate_file(folder, number)).schemes)
    ]
    return StoredCandidates(folder, graph, {}, tuple(layers))


def candidates_of(run: Run, graph: LayerGraph) -> StoredCandidates:
    """Open the candidates of every layer, by layer name; promoted rows are applied."""
    return StoredCandidates.of(run.stage("candidates"), graph)


def iterate_candidates(folder: Path, graph: LayerGraph) -> Iterator[LayerCandidates]:
    """Yield the candidates in the stage ``folder`` in graph order.

    The float weight of each layer is dropped from memory after its candidates.
    """
    stored = StoredCandidates.of(folder, graph, limit=0)
    for layer in graph.layers:
        yield stored[layer.name]
        drop_pages(graph.model.graph.initializers[layer.weight].const_value)


def choices_of(run: Run, graph: LayerGraph) -> dict[str, Choices]:
    """Read the schemes that every layer may take, by layer name, without reading weights."""
    folder = run.stage("candidates")
    return {
        layer.name: load_choices(candidate_file(folder, i)) for i, layer in enumerate(graph.layers)
    }
