"""A build by trajectory probes: predicted final images instead of predicted outputs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mpq_deploy.allocate.plan import PrecisionPlan
from mpq_deploy.allocate.plan_solver import PlanSolver
from mpq_deploy.errors import UsageError
from mpq_deploy.run.recipe_check import check_recipe
from mpq_deploy.run.view import Run
from mpq_deploy.sensitivity.table import SensitivityTable
from mpq_deploy.system.progress import Talk
from tests.pipeline.runs import build, recipe_for

pytestmark = pytest.mark.torch


def test_images_are_predicted_before_anything_is_built(model: Path, run: Path) -> None:
    pytest.importorskip("torch")
    changes = {"measure__method": "trajectory", "measure__calls": 4, "measure__samples": 4}
    found = build(recipe_for(model, **changes, allocate__trim=0.25), run)
    table = SensitivityTable.load(run / "measure")
    assert table.metric == "trajectory" and table.mean_square is not None
    images = PrecisionPlan.load(run / "allocate" / "plan.json").predicted_images
    assert images is not None and images.images == 4
    assert list(images.quantiles) == sorted(images.quantiles)
    assert [line for line in found.said if "predicted PSNR of the final images" in line]
    # What was measured at outputs is not what was predicted.
    assert found.report["predicted_nmse"] is None
    assert found.report["predicted_images"]["psnr_db"] == pytest.approx(images.psnr_db)
    for page in ("report.html", "report.md"):
        assert f"final images {images.psnr_db:.1f} dB" in (run / page).read_text(encoding="utf-8")
    json.dumps(found.report)
    # The one that is left out of the objective is predicted as the others are.
    assert any("1 of 4 measured images" in note for note in found.report["notes"])
    solver = PlanSolver(Run.opened(run, Talk()))
    left_out = int(np.argmin(solver.trimmed))
    plan = PrecisionPlan.load(run / "allocate" / "plan.json")
    errors = table.errors_by_call(table.plan_entries(plan.schemes))
    assert solver.trimmed[left_out] < 1e-3 and len(errors) == 4
    entries = solver.table.plan_entries(plan.schemes)
    np.testing.assert_allclose(
        solver.table.errors_by_call(entries) / solver.trimmed, errors, rtol=1e-3
    )


def test_the_worst_images_may_be_asked_for(model: Path, run: Path) -> None:
    pytest.importorskip("torch")
    changes = {"measure__method": "trajectory", "measure__calls": 4, "measure__samples": 4}
    found = build(recipe_for(model, **changes, allocate__tail=0.25), run)
    assert any("worst 25% of the images (allocate.tail)" in note for note in found.report["notes"])
    with pytest.raises(UsageError, match="no final images are measured"):
        check_recipe(recipe_for(model, allocate__tail=0.25))
