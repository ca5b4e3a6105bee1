"""Cross terms in the pipeline: what plan.json says of them, the switch, and budgets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mpq_deploy.allocate.cross_terms import FOLDS
from tests.pipeline.runs import build, recipe_for, save_denoiser

pytestmark = pytest.mark.torch
CALLS = {"calibrate__samples": 12, "measure__samples": 8, "measure__calls": 4}


def test_the_plan_says_what_came_of_the_cross_terms(tmp_path: Path) -> None:
    model = save_denoiser(tmp_path / "model")
    plans = {}
    for wanted in (True, False):
        changes = {**CALLS, "allocate__cross_terms": wanted}
        build(recipe_for(model, **changes), tmp_path / "run", "allocate")
        plans[wanted] = json.loads(
            (tmp_path / "run" / "allocate" / "plan.json").read_text(encoding="utf-8")
        )
    crossed, plain = plans[True]["cross_terms"], plans[False]["cross_terms"]
    assert crossed["folds"] == plain["folds"] == FOLDS
    assert plain["moves"] == 0 and not plain["kept"]
    assert crossed["milp_held_back"] == plain["milp_held_back"] == plans[False]["predicted_loss"]
    kept = "refined_held_back" if crossed["kept"] else "milp_held_back"
    assert plans[True]["predicted_loss"] == crossed[kept] <= crossed["milp_held_back"]
    assert plans[True]["size_bytes"] <= plans[True]["budget_bytes"]
    changed = [
        name
        for name, scheme in plans[True]["schemes"].items()
        if scheme != plans[False]["schemes"][name]
    ]
    assert len(changed) == (crossed["moves"] if crossed["kept"] else 0)


def test_too_few_calls_to_hold_any_back(tmp_path: Path) -> None:
    build(recipe_for(save_denoiser(tmp_path / "model")), tmp_path / "run", "allocate")
    crossed = json.loads((tmp_path / "run" / "allocate" / "plan.json").read_text(encoding="utf-8"))[
        "cross_terms"
    ]
    assert crossed["folds"] == 0 and not crossed["kept"] and crossed["milp_held_back"] is None
    assert crossed["growth"] >= 1


def test_a_metric_without_probes_has_no_cross_terms(tmp_path: Path) -> None:
    build(
        recipe_for(save_denoiser(tmp_path / "model"), measure__method="gain"),
        tmp_path / "run",
        "allocate",
    )
    assert (
        json.loads((tmp_path / "run" / "allocate" / "plan.json").read_text(encoding="utf-8"))[
            "cross_terms"
        ]
        is None
    )
