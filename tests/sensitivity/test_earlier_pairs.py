"""Which measured pairs of another target hold for this one: those of the same weight."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np

from mpq_deploy.formats.scheme import SCHEMES
from mpq_deploy.sensitivity.earlier_pairs import joined, known_pairs, unknown_pairs
from mpq_deploy.sensitivity.table import SensitivityTable, table_from_projections

FIRST, SECOND = ("fp16", "w8a8", "w8a16", "w4a16-b32"), ("fp16", "w4a16-b32", "w8a16", "w4a16-b64")


def candidates(schemes: tuple[str, ...], **weights: float) -> Any:
    """One layer; each weight form is the constant given for it, else 1."""

    def matrix(form: str) -> Any:
        return np.full((2, 2), weights.get(form.replace("-", "_"), 1.0))

    found = SimpleNamespace(schemes=tuple(SCHEMES[s] for s in schemes), weight_matrix=matrix)
    return {"layer": found}


def table(schemes: tuple[str, ...], seed: int) -> SensitivityTable:
    draw = np.random.default_rng(seed).standard_normal
    values = {"layer": {s: draw((3, 2, 2)).astype(np.float32) for s in schemes}}
    return table_from_projections(np.arange(3), values, (f"note {seed}",))


def test_what_both_hold_alike_is_known_and_stays() -> None:
    old, mine = table(FIRST, 1), candidates(SECOND)
    known = known_pairs(mine, [(old, candidates(FIRST))])
    assert known is not None
    assert unknown_pairs(mine, known.losses) == {"layer": ("w4a16-b64",)}
    new = table(("w4a16-b64",), 2)
    both = joined(known, new, mine, ())
    assert tuple(both.losses["layer"]) == SECOND and both.notes == ("note 1", "note 2")
    assert both.losses["layer"]["w8a16"] == old.losses["layer"]["w8a16"]
    assert both.losses["layer"]["w4a16-b64"] == new.losses["layer"]["w4a16-b64"]
    assert both.plan_loss({"layer": "w8a16"}) == old.plan_loss({"layer": "w8a16"})


def test_another_weight_of_the_same_form_is_measured_again() -> None:
    form = SCHEMES["w4a16-b32"].weight_form.replace("-", "_")
    mine = candidates(SECOND, **{form: 2.0})
    known = known_pairs(mine, [(table(FIRST, 1), candidates(FIRST))])
    assert known is not None
    assert unknown_pairs(mine, known.losses) == {"layer": ("w4a16-b32", "w4a16-b64")}


def test_only_probes_are_taken_over() -> None:
    gain = replace(table(FIRST, 1), metric="gain", projections=None)
    assert known_pairs(candidates(SECOND), [(gain, candidates(FIRST))]) is None
