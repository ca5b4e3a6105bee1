"""Pairs (layer, scheme) that were measured for another target of the same run, on the same calls.

In: the candidates, and the tables and candidates of other targets. Out: the pairs that are left to
measure, and one table of both. A pair's projections stay valid where its weight is the same: its
probes come from the seed, the timestep and the call.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mpq_deploy.formats.candidates import LayerCandidates
from mpq_deploy.graph.attention import Operands
from mpq_deploy.models.spec import Array
from mpq_deploy.sensitivity.table import SensitivityTable

Candidates = Mapping[str, LayerCandidates]
# Layer -> schemes.
Names = dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class Part(Mapping[str, LayerCandidates]):
    """Those of ``candidates`` with a name in ``schemes``."""

    candidates: Candidates
    schemes: Names

    def __getitem__(self, name: str) -> LayerCandidates:
        found, names = self.candidates[name], self.schemes[name]
        return replace(found, schemes=tuple(s for s in found.schemes if s.name in names))

    def __iter__(self) -> Iterator[str]:
        return iter(self.schemes)

    def __len__(self) -> int:
        return len(self.schemes)


def known_pairs(
    candidates: Candidates, tables: list[tuple[SensitivityTable, Candidates]]
) -> SensitivityTable | None:
    """Return what ``tables``, each of its candidates, say of the pairs of ``candidates``; None for none."""
    probed = [(table, other) for table, other in tables if table.metric == "probe"]
    if not probed:
        return None
    first = probed[0][0]
    losses: dict[str, dict[str, float]] = {}
    rows: dict[str, dict[str, Array]] = {}
    vectors: dict[str, dict[str, Array]] = {}
    for table, other in probed:
        assert table.projections is not None
        for layer, row in table.losses.items():
            wanted = (
                row if layer not in candidates else same_schemes(candidates[layer], other[layer])
            )
            for scheme in wanted:
                if scheme in row and scheme not in losses.setdefault(layer, {}):
                    losses[layer][scheme] = row[scheme]
                    rows.setdefault(layer, {})[scheme] = table.losses_by_timestep[layer][scheme]
                    vectors.setdefault(layer, {})[scheme] = table.projections[layer][scheme]
    return replace(first, losses=losses, losses_by_timestep=rows, projections=vectors)


def same_schemes(one: LayerCandidates, other: LayerCandidates) -> list[str]:
    """Name the schemes of both that hold the same weight."""
    names = {s.name for s in other.schemes}
    both = [s for s in one.schemes if s.name in names]
    forms = {s.weight_form for s in both}
    alike = {f for f in forms if np.array_equal(one.weight_matrix(f), other.weight_matrix(f))}
    return [s.name for s in both if s.weight_form in alike]


def unknown_pairs(candidates: Candidates, known: Mapping[str, Collection[str]]) -> Names:
    """Return the schemes of each layer that are left to measure, with the bodies that they change."""
    left: Names = {}
    for layer, found in candidates.items():
        new = [s for s in found.schemes if s.name not in known.get(layer, ())]
        # What a branch promotes is measured as a difference to its body.
        bodies = {s.body.name for s in new if s.branch.promotes}
        names = tuple(s.name for s in found.schemes if s in new or s.name in bodies)
        if names:
            left[layer] = names
    return left


def joined(
    known: SensitivityTable,
    new: SensitivityTable | None,
    candidates: Candidates,
    attentions: tuple[Operands, ...],
) -> SensitivityTable:
    """Return one table of the pairs of ``candidates`` and ``attentions``, in their order; what is known stays."""
    assert known.projections is not None
    if new is None:
        new = known
    assert new.projections is not None
    names = {layer: [s.name for s in found.schemes] for layer, found in candidates.items()}
    names |= {one.name: list({**known.losses, **new.losses}[one.name]) for one in attentions}

    def both(old: Mapping[str, Mapping[str, Any]], more: Mapping[str, Mapping[str, Any]]) -> Any:
        found = {n: {**more.get(n, {}), **old.get(n, {})} for n in names}
        return {n: {s: found[n][s] for s in schemes} for n, schemes in names.items()}

    return replace(
        new,
        losses=both(known.losses, new.losses),
        losses_by_timestep=both(known.losses_by_timestep, new.losses_by_timestep),
        projections=both(known.projections, new.projections),
        notes=tuple(dict.fromkeys((*known.notes, *new.notes))),
    )
