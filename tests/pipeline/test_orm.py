"""A build by orm: nothing is predicted, its controls stand beside it, and what is wrong is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpq_deploy.errors import UsageError
from mpq_deploy.run.recipe_check import check_recipe
from mpq_deploy.sensitivity.table import SensitivityTable
from tests.pipeline.runs import Built, build, recipe_for

ORM: dict[str, Any] = {
    "calibrate__samples": 12,
    "measure__samples": 8,
    "measure__batch_size": 8,
    "measure__timesteps": 2,
    "measure__method": "orm",
    "allocate__branches": [],
}


@pytest.fixture(scope="module")
def built(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    return build(recipe_for(model, **ORM), tmp_path_factory.mktemp("orm") / "run")


def test_a_plan_by_orm_predicts_nothing(built: Built) -> None:
    plan = json.loads((built.run / "allocate" / "plan.json").read_text(encoding="utf-8"))
    assert plan["predicted_loss"] is None and all(
        row["predicted_loss"] is None for row in plan["layers"]
    )
    assert built.report["predicted_nmse"] is None and built.report["measured_nmse"] > 0
    assert "not predicted by the metric orm" in (built.run / "report.md").read_text(
        encoding="utf-8"
    )
    assert any("does not predict an error" in note for note in built.report["notes"])
    info = built.report["importance"]
    assert (
        0 < info["weighted_bits"] <= info["linear_bound"]
        and info["calls"] == 8
        and info["constant"] > 0
    )
    weighed = sum(
        row["importance"] * (16 if row["scheme"] == "fp16" else int(row["scheme"][1]))
        for row in plan["layers"]
    )
    assert info["weighted_bits"] == pytest.approx(weighed)
    assert built.report["size_bytes"] <= built.report["budget_bytes"]


def test_orm_stands_beside_its_controls_at_the_same_budget(built: Built) -> None:
    controls = built.report["controls"]
    assert set(controls) == {"int8", "int4", "size-only", "random"}
    for name in ("size-only", "random"):
        assert controls[name]["size_bytes"] <= built.report["budget_bytes"]
        assert controls[name]["measured_nmse"] > 0


def test_the_matrices_and_importances_are_kept(built: Built) -> None:
    table = SensitivityTable.load(built.run / "measure")
    layers = len(built.report["layers"])
    with np.load(built.run / "measure" / "orm.npz", allow_pickle=False) as data:
        assert data["orm"].shape == (2, layers, layers) and data["theta"].shape == (2, layers)
    assert table.importance is not None and table.importance.layers == tuple(
        r["name"] for r in built.report["layers"]
    )
    html = (built.run / "report.html").read_text(encoding="utf-8")
    assert 'id="orthogonality"' in html and html.count('<figure><img src="data:image/png') == 2


def test_fixed_int8_activations_are_given_as_the_reason(built: Built) -> None:
    rows = [row for row in built.report["layers"] if "w8a8" not in row["refused"]]
    assert rows and all("fixes the activations" in row["refused"]["w8a16"] for row in rows)
    assert all(row["scheme"] == "fp16" or row["scheme"][2:4] == "a8" for row in rows)


def test_activations_that_rule_out_small_schemes_are_named(model: Path, tmp_path: Path) -> None:
    changes = {
        **ORM,
        "allocate__schemes": ["fp16", "w8a8", "w8a16", "w4a16"],
        "quantize__rounding": "nearest",
    }
    with pytest.raises(UsageError, match="No plan fits") as caught:
        build(recipe_for(model, **changes), tmp_path / "run", "allocate")
    assert "measure.orm.activation_bits is int8" in caught.value.hint


def test_what_orm_is_told_concerns_only_orm(
    built: Built, model: Path, finished: Built, run: Path
) -> None:
    assert build(recipe_for(model, measure__orm={"beta": 5.0}), run).made == ["report"]
    assert build(recipe_for(model, **ORM), built.run).made == ["report"]
    again = build(recipe_for(model, **ORM, measure__orm={"beta": 5.0}), built.run, "measure")
    assert again.made == ["measure"]
    assert any("recipe.measure.orm.beta changed" in line for line in again.said)
    assert build(recipe_for(model, **ORM), built.run).made[0] == "measure"


def test_another_budget_makes_the_controls_of_orm_again(built: Built, model: Path) -> None:
    assert "controls" in build(recipe_for(model, **ORM, budget=0.45), built.run, "controls").made
    build(recipe_for(model, **ORM), built.run)


def test_few_calls_and_adaptive_timesteps_are_said_in_the_report(
    model: Path, tmp_path: Path
) -> None:
    changes = {
        **ORM,
        "measure__batch_size": 4,
        "calibrate__timesteps": 4,
        "measure__sampling": "adaptive",
    }
    changes |= {"measure__coarse_timesteps": 3, "measure__orm": {"activation_bits": "program"}}
    found = build(recipe_for(model, **changes), tmp_path / "run").report
    assert any("only 4 calls" in note for note in found["notes"])
    assert any(
        "2 of 4 timesteps" in note and "share of the trajectory" in note for note in found["notes"]
    )
    assert sum(found["importance"]["weights"]) == pytest.approx(1)


def test_fewer_timesteps_than_asked_for_are_said_in_the_report(finished: Built) -> None:
    """Methods other than orm take what was calibrated, and do not hide it."""
    said = "all 2 calibrated timesteps are measured: measure.timesteps asks for 20"
    assert said in finished.report["notes"] and said in (finished.run / "report.html").read_text(
        encoding="utf-8"
    )


@pytest.mark.parametrize("method", ["local_error", "kurtosis", "size-only", "random"])
def test_other_metrics_that_only_rank_predict_nothing_either(
    method: str, model: Path, run: Path
) -> None:
    found = build(recipe_for(model, measure__method=method), run)
    assert found.report["predicted_nmse"] is None and found.report["sensitivity"] == method
    assert not [line for line in found.said if "predicted NMSE" in line]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"measure__timesteps": 5}, "measure.timesteps is 5, but the sampler takes only 4 steps"),
        ({"measure__timesteps": 3}, "measure.timesteps is 3, but only 2 timesteps are calibrated"),
        (
            {"measure__sampling": "adaptive", "measure__coarse_timesteps": 9},
            "measure.coarse_timesteps is 9, but the sampler takes only 4 steps",
        ),
    ],
)
def test_more_timesteps_than_there_are(model: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        check_recipe(recipe_for(model, **{**ORM, **changes}))


@pytest.mark.parametrize(
    "option",
    [
        "probe",
        "trajectory",
        "gain",
        "local_error",
        "exhaustive",
        "kurtosis",
        "orm",
        "size-only",
        "random",
    ],
)
def test_every_method_is_an_option_of_the_command_line(option: str, run: Path, cli: Any) -> None:
    if option in ("probe", "trajectory", "exhaustive"):
        pytest.importorskip("torch")
    recipe = run / "recipe.yaml"
    text = recipe.read_text(encoding="utf-8").replace("  timesteps: 20\n", "  timesteps: 2\n")
    recipe.write_text(text, encoding="utf-8")
    outcome = cli("--json", "measure", run, "--sensitivity", option)
    if option == "orm":
        # Two samples are too few for it, and it says so.
        assert outcome.code == 2 and "needs 3" in outcome.err
    else:
        assert outcome.code == 0, outcome.err
        assert SensitivityTable.load(run / "measure").metric == option
