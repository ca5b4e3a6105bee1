"""On a machine with an RTX GPU: a package is installed, run and measured, and its outputs agree with the references."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpq_deploy.delivery.package import make_package
from mpq_deploy.device.cuda import Cuda, why_no_gpu
from mpq_deploy.device.installer import install
from mpq_deploy.engine.target import load_target
from mpq_deploy.run.pipeline import open_pipeline
from mpq_deploy.system.progress import Talk
from tests.pipeline.runs import build, recipe_for, save_denoiser

pytestmark = [pytest.mark.gpu, pytest.mark.rtx]


@pytest.fixture(autouse=True)
def gpu() -> None:
    pytest.importorskip("tensorrt_rtx")
    if why_no_gpu():
        pytest.skip(why_no_gpu())
    if Cuda().compute_capability() not in load_target("rtx").compute_capabilities:
        pytest.skip("TensorRT-RTX has no engine for this GPU")


@pytest.mark.parametrize("schemes", [["w8a8"], ["w4a16", "fp16"], ["w4a8", "w8a8"]], ids="-".join)
def test_a_package_runs_and_agrees(schemes: list[str], tmp_path: Path) -> None:
    recipe = recipe_for(save_denoiser(tmp_path), allocate__schemes=schemes, budget=0.6)
    build(recipe, tmp_path / "run", "quantize")
    with open_pipeline(recipe, tmp_path / "run", Talk()) as pipeline:
        make_package(pipeline.deployed(corrected=True), load_target("rtx"), tmp_path / "a.mpq.tar")
    results = install(tmp_path / "a.mpq.tar", tmp_path / "out", Talk())
    assert results["reference"]["ran"]
    assert results["reference"]["passed"], results["reference"]
    assert results["latency"]["p50_ms"] > 0
