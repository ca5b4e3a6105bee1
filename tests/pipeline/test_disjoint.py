"""Weights are rounded on fresh noise of calls that are not measured, in the pipeline and not only in its parts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mpq_deploy.calls.recorded import CallSet, RecordedCalls
from mpq_deploy.models.spec import Array
from mpq_deploy.rounding import rounder
from mpq_deploy.sensitivity.subject import Subject
from mpq_deploy.stages import measure as stage
from tests.calls.sets import samples_of
from tests.pipeline.runs import build, recipe_for, save_denoiser


def calls(part: CallSet) -> set[bytes]:
    """The last samples of a set's calls, which ``renoised`` keeps."""
    return {np.ascontiguousarray(sample).tobytes() for sample in samples_of(part)[-1]}


def test_rounding_sees_fresh_noise_of_calls_that_are_not_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, CallSet] = {}
    plan, measure = rounder.HessianPlan.of, stage.measure

    def rounding(graph: object, calls: RecordedCalls, *rest: object, **named: object) -> object:
        seen["rounded"] = calls.recorded
        return plan(graph, calls, *rest, **named)  # type: ignore[arg-type]

    def measured(method: str, subject: Subject) -> object:
        seen["measured"] = subject.calibration
        return measure(method, subject)

    monkeypatch.setattr(rounder.HessianPlan, "of", rounding)
    monkeypatch.setattr(stage, "measure", measured)
    changes = {"calibrate__samples": 8, "measure__samples": 4, "quantize__noise_draws": 3}
    build(recipe_for(save_denoiser(tmp_path / "model"), **changes), tmp_path / "run", "measure")

    recorded = CallSet.load(tmp_path / "run" / "calibrate" / "calls")
    assert len(seen["rounded"].rows) == 3 * 4 and len(seen["measured"].rows) == 4
    assert not calls(seen["rounded"]) & calls(seen["measured"])
    # At the first timestep the noise is not that of any recorded call.
    first: Array = samples_of(recorded)[0]
    assert not any(
        np.array_equal(mine, theirs) for mine in samples_of(seen["rounded"])[0] for theirs in first
    )
