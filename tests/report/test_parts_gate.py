"""Limits on a whole pipeline's run: units, what was not measured, and estimates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mpq_deploy.report.gate import Limits, Outcome
from mpq_deploy.report.parts_gate import check_pipeline
from mpq_deploy.run.pipeline_file import PipelineFile
from mpq_deploy.system.quantities import Latency

WHOLE: dict[str, Any] = {
    "class_name": "StableDiffusionPipeline",
    "source": "sd",
    "denoiser": "unet",
    "recipe": {},
    "parts": {},
}


def held(run: Path, allow_estimate: bool, **figures: Any) -> list[Outcome]:
    PipelineFile(**WHOLE, **figures).save(run)
    limits = Limits(min_psnr=40.0, max_latency=Latency.parse("20ms"))
    return list(check_pipeline(run, limits, allow_estimate).outcomes)


def test_what_was_not_measured_fails_and_says_how_to_measure_it(tmp_path: Path) -> None:
    quality, latency = held(tmp_path, True)
    assert (quality.status, latency.status) == ("not measured", "not measured")
    assert "mpq-deploy build" in quality.detail
    assert "mpq-deploy install" in latency.detail
    assert (quality.limit, latency.limit) == ("at least 40 dB", "at most 20 ms")


@pytest.mark.parametrize(("allowed", "status"), [(True, "passed"), (False, "not measured")])
def test_an_estimate_is_named_and_counts_where_it_may(
    tmp_path: Path, allowed: bool, status: str
) -> None:
    quality, latency = held(tmp_path, allowed, psnr_db=45.0, image_ms=12.5)
    assert (quality.status, quality.measured) == ("passed", "45 dB")
    assert latency.status == status
    assert "stimated" in latency.detail
