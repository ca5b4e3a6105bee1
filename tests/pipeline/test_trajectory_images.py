"""A build by trajectory probes: predicted final images instead of predicted outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpq_deploy.allocate.plan import PrecisionPlan
from mpq_deploy.allocate.plan_solver import ONE_CALL, PlanSolver
from mpq_deploy.allocate.predicted_images import predicted_images
from mpq_deploy.errors import UsageError
from mpq_deploy.run.recipe_check import check_recipe
from mpq_deploy.run.view import Run
from mpq_deploy.sensitivity.table import SensitivityTable
from mpq_deploy.system.progress import Talk
from tests.pipeline.runs import build, recipe_for
from tests.tiny_models import ONE_LEVEL, tiny_text_pipeline_folder

pytestmark = pytest.mark.torch


def predicted_psnr(table: SensitivityTable, schemes: dict[str, str]) -> float:
    assert table.mean_square is not None and table.image_probes == 2
    errors = table.image_errors(table.plan_entries(schemes))
    return predicted_images(errors, table.image_probes, table.mean_square).psnr_db


def test_images_are_predicted_before_anything_is_built(model: Path, run: Path) -> None:
    pytest.importorskip("torch")
    # All compute in INT8, all four steps are calibrated, eight calls measured: images by default.
    changes: dict[str, Any] = {"allocate__schemes": ["fp16", "w8a8", "w4a8-b32"]}
    changes |= {"calibrate__timesteps": 4, "calibrate__samples": 10}
    changes |= {"measure__calls": 8, "measure__samples": 8}
    found = build(recipe_for(model, **changes, allocate__trim=0.125), run)
    assert [line for line in found.said if "trajectory (8 whole trajectories of 4 steps)" in line]
    assert any("measure.method auto is trajectory" in note for note in found.report["notes"])
    table = SensitivityTable.load(run / "measure")
    assert table.metric == "trajectory" and table.mean_square is not None
    images = PrecisionPlan.load(run / "allocate" / "plan.json").predicted_images
    assert images is not None and images.images == 8
    assert list(images.quantiles) == sorted(images.quantiles)
    assert [line for line in found.said if "predicted PSNR of the final images" in line]
    # What was measured at outputs is not what was predicted.
    assert found.report["predicted_nmse"] is None
    assert found.report["predicted_images"]["psnr_db"] == pytest.approx(images.psnr_db)
    for page in ("report.html", "report.md"):
        assert f"final images {images.psnr_db:.1f} dB" in (run / page).read_text(encoding="utf-8")
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "Predicted PSNR" in page and "mean squared error of the final images" in page
    json.dumps(found.report)
    # The one that is left out of the objective is predicted as the others are.
    assert any("1 of 8 measured images" in note for note in found.report["notes"])
    solver = PlanSolver(Run.opened(run, Talk()))
    left_out = int(np.argmin(solver.counted))
    plan = PrecisionPlan.load(run / "allocate" / "plan.json")
    errors = table.image_errors(table.plan_entries(plan.schemes))
    assert solver.counted[left_out] < 1e-3 and len(errors) == 8
    entries = solver.table.plan_entries(plan.schemes)
    np.testing.assert_allclose(
        solver.table.image_errors(entries) / solver.counted, errors, rtol=1e-3
    )
    # Other plans are predicted in the images' PSNR too, each in all of them.
    front = solver.front(20)
    assert len(front) > 1 and all(one.psnr_db is not None for one in front)
    whole = [predicted_psnr(table, one.schemes) for one in front]
    np.testing.assert_allclose([one.psnr_db for one in front], whole, rtol=1e-4)
    assert all(one["predicted_loss"] is not None for one in found.report["layers"])


def test_the_worst_images_may_be_asked_for(model: Path, run: Path) -> None:
    pytest.importorskip("torch")
    changes = {"measure__method": "trajectory", "measure__calls": 4, "measure__samples": 4}
    found = build(recipe_for(model, **changes, allocate__tail=0.25), run)
    assert any("worst 25% of the images (allocate.tail)" in note for note in found.report["notes"])
    with pytest.raises(UsageError, match="no final images are measured"):
        check_recipe(recipe_for(model, measure__method="probe", allocate__tail=0.25))
    with pytest.raises(UsageError, match="auto: final images may not be measured"):
        check_recipe(recipe_for(model, allocate__tail=0.25))


def test_a_pipelines_images_are_predicted_through_its_decoder(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    folder = tiny_text_pipeline_folder(tmp_path, sample_size=16, **ONE_LEVEL)
    changes: dict[str, Any] = {"measure__method": "trajectory", "measure__probes": 8}
    changes |= {"calibrate__samples": 12, "measure__calls": 4, "measure__samples": 4}
    found = build(recipe_for(folder, **changes, evaluate__samples=4), tmp_path / "run")
    table = SensitivityTable.load(tmp_path / "run" / "measure")
    assert table.metric == "trajectory" and table.mean_square is not None
    assert not [note for note in table.notes if "single outputs" in note]
    predicted = found.report["predicted_images"]
    assert predicted["images"] == 4
    assert predicted["pooled_psnr_db"] == pytest.approx(found.report["pooled_psnr_db"], abs=2)


def test_a_prediction_from_one_call_says_what_it_is_worth(model: Path, run: Path) -> None:
    pytest.importorskip("torch")
    found = build(recipe_for(model, measure__calls=1), run, last="allocate")
    assert f"warning: {ONE_CALL}" in found.said
