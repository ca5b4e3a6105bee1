"""Weights that were rounded for another target of the same run, by the same settings: they are taken as they are.

In: the finished candidates of those targets. Out: a layer's forms among them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from mpq_deploy.formats.candidates import form_names, load_candidates, load_choices
from mpq_deploy.formats.integers import IntegerWeight
from mpq_deploy.formats.interfaces import DeployedMatrix, Scheme
from mpq_deploy.formats.scheme import SCHEMES
from mpq_deploy.graph.layers import Layer, LayerGraph, Window
from mpq_deploy.models.spec import Array
from mpq_deploy.rounding.candidate_store import ROW_ORDERS, candidate_file
from mpq_deploy.system.array_file import read_arrays


@dataclass(frozen=True)
class EarlierForms:
    """``folders``: name below the run -> the layers that are products over their windows there."""

    folders: tuple[tuple[str, frozenset[str]], ...] = ()

    def of(
        self, run: Path, layer: Layer, number: int, weight: Array, wanted: frozenset[str]
    ) -> dict[str, DeployedMatrix]:
        """Return those of the ``wanted`` forms of ``layer`` (of ``number`` in the graph) that are known."""
        found: dict[str, DeployedMatrix] = {}
        for folder, products in self.folders:
            path = candidate_file(run / folder, number)
            names = self._kept(path, layer, products) & wanted - found.keys()
            if names:
                forms = load_candidates(layer, weight, path).forms
                found |= {name: forms[name] for name in sorted(names)}
        return found

    def cover(self, run: Path, layer: Layer, number: int, wanted: frozenset[str]) -> bool:
        """Whether all of the ``wanted`` forms are known."""
        files = ((candidate_file(run / name, number), products) for name, products in self.folders)
        return wanted <= frozenset().union(*(self._kept(file, layer, p) for file, p in files))

    def orders(self, run: Path, folder: Path, graph: LayerGraph) -> dict[str, Array] | None:
        """Return the output channels of each layer with a rows branch in ``folder``, most salient first.

        As another target has them for the same bodies; None where none has them for all layers.
        """
        for name, products in self.folders:
            numbers: dict[str, str] = {}
            for number, layer in enumerate(graph.layers):
                own, other = (
                    [
                        s.name
                        for s in load_choices(candidate_file(place, number)).schemes
                        if s.branch.promotes
                    ]
                    for place in (folder, run / name)
                )
                if own and (own != other or (layer.name in products) != (layer.window is not None)):
                    break
                numbers |= {str(number): layer.name} if own else {}
            else:
                stored = read_arrays(run / name / ROW_ORDERS)
                return {layer: stored[number] for number, layer in numbers.items()}
        return None

    def _kept(self, file: Path, layer: Layer, products: frozenset[str]) -> frozenset[str]:
        """Name the forms in ``file`` that do not depend on whether the layer is a product."""
        if not file.is_file():
            # Of a target that is being made together with this one: a layer's file comes just before.
            return frozenset()
        names = form_names(file)
        if (layer.name in products) == (layer.window is not None):
            return names
        other = replace(layer, window=None if layer.window else Window((), (), ()))
        schemes = {scheme.weight_form: scheme for scheme in SCHEMES.values()}
        return frozenset(
            n for n in names if _blocks(schemes[n], layer) == _blocks(schemes[n], other)
        )


def _blocks(scheme: Scheme, layer: Layer) -> tuple[int | None, int]:
    """Return the size of the blocks of a weight, and how they run."""
    weight = scheme.weight
    taps = weight.taps(layer) if isinstance(weight, IntegerWeight) else 1
    return weight.block(layer), taps
