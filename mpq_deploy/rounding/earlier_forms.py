"""Reuse weights that another target of the same run rounded with the same settings.

In: the candidates of the other targets. Out: a layer's reusable forms.
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
    """Other targets' ``folders``: path below the run of all targets -> names of its Convs written as MatMul."""

    folders: tuple[tuple[str, frozenset[str]], ...] = ()

    def of(
        self, run: Path, layer: Layer, number: int, weight: Array, wanted: frozenset[str]
    ) -> dict[str, DeployedMatrix]:
        """Return the ``wanted`` forms of ``layer`` that another target has; form -> matrix.

        ``number``: the layer's index in the graph; ``weight``: its float weight [O, K].
        """
        found: dict[str, DeployedMatrix] = {}
        for folder, products in self.folders:
            path = candidate_file(run / folder, number)
            names = self._kept(path, layer, products) & wanted - found.keys()
            if names:
                forms = load_candidates(layer, weight, path).forms
                found |= {name: forms[name] for name in sorted(names)}
        return found

    def cover(self, run: Path, layer: Layer, number: int, wanted: frozenset[str]) -> bool:
        """Whether other targets have all ``wanted`` forms of ``layer``."""
        files = ((candidate_file(run / name, number), products) for name, products in self.folders)
        return wanted <= frozenset().union(*(self._kept(file, layer, p) for file, p in files))

    def orders(self, run: Path, folder: Path, graph: LayerGraph) -> dict[str, Array] | None:
        """Return another target's order of output channels, most salient first: layer -> int [O].

        For the layers with a ``rows`` scheme in ``folder``; None unless one other target has the
        same ``rows`` schemes for all of these layers.
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
        """Return the forms in ``file`` that are valid for ``layer``.

        Where one target computes the layer as a Conv and the other as a MatMul over windows, only
        forms with the same blocks are valid.
        """
        if not file.is_file():
            # The other target is rounded together with this one and has not written this layer yet.
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
    """Return the block size of a weight (None: no blocks), and the taps over which blocks run."""
    weight = scheme.weight
    taps = weight.taps(layer) if isinstance(weight, IntegerWeight) else 1
    return weight.block(layer), taps
