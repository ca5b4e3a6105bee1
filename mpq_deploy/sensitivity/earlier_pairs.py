"""Reuse (layer, scheme) pairs that another target of the same run measured on the same calls.

In: this target's candidates, and the tables and candidates of the other targets. Out: the pairs
still to measure, and one table of reused and new pairs. The projections of a pair stay valid while
its dequantized weight is the same, because the probes depend only on seed, timestep and call.
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
    """The layers of ``candidates`` that ``schemes`` names, each with the named schemes alone."""

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
    """Return one table of the pairs in ``tables`` that are valid for ``candidates``, too.

    ``tables``: other targets' tables, each with its own candidates. None where none is by probes.
    """
    probed = [(table, other) for table, other in tables if table.metric == "probe"]
    if not probed:
        return None
    first = probed[0][0]
    losses: dict[str, dict[str, float]] = {}
    rows: dict[str, dict[str, Array]] = {}
    vectors: dict[str, dict[str, Array]] = {}
    partial: dict[str, dict[str, Array]] = {}
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
                    if table.partial is not None:
                        partial.setdefault(layer, {})[scheme] = table.partial[layer][scheme]
    return replace(
        first,
        losses=losses,
        losses_by_timestep=rows,
        projections=vectors,
        partial=partial or None,
    )


def same_schemes(one: LayerCandidates, other: LayerCandidates) -> list[str]:
    """Return the names of the schemes that both have, with equal dequantized weights."""
    names = {s.name for s in other.schemes}
    both = [s for s in one.schemes if s.name in names]
    forms = {s.weight_form for s in both}
    alike = {f for f in forms if np.array_equal(one.weight_matrix(f), other.weight_matrix(f))}
    return [s.name for s in both if s.weight_form in alike]


def unknown_pairs(candidates: Candidates, known: Mapping[str, Collection[str]]) -> Names:
    """Return layer -> schemes to measure: those not in ``known``, and the bodies they build on."""
    left: Names = {}
    for layer, found in candidates.items():
        new = [s for s in found.schemes if s.name not in known.get(layer, ())]
        # A branch that promotes channels is measured as a difference from its body.
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
    """Return one table of ``candidates`` and ``attentions``, in their order.

    Where both tables have a pair, ``known`` wins.
    """
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
        partial=both(known.partial, new.partial) if known.partial and new.partial else None,
        notes=tuple(dict.fromkeys((*known.notes, *new.notes))),
    )
