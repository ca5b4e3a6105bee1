"""A UNet of convolutions on a Jetson target: feasible, exact, and packed by a stand-in for its builder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mpq_deploy.check.check import check_model
from mpq_deploy.engine.builder import BuildRequest, build_engine
from mpq_deploy.engine.plan_engine import batch_profile, expected_layers
from mpq_deploy.formats.scheme import SCHEMES
from mpq_deploy.graph.save import constant_bytes
from mpq_deploy.graph.writers.deployed_graphs import DEPLOYED
from mpq_deploy.run.view import Run
from mpq_deploy.system.progress import Talk
from tests.pipeline.runs import build, recipe_for, save_denoiser


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A tiny model, built for the Orin Nano at less than INT8's bytes."""
    folder = tmp_path_factory.mktemp("nano")
    recipe = recipe_for(
        save_denoiser(folder), target="jetson-orin-nano", budget=0.42, allocate__branches=[]
    )
    build(recipe, folder / "run", "quantize")
    return Run.opened(folder / "run", Talk())


def test_convolutions_take_four_bits_within_the_budget(nano: Run) -> None:
    convs = {one.name: one for one in nano.exported.graph.layers if one.op == "Conv"}
    schemes = {name: SCHEMES[nano.plan.schemes[name]] for name in convs}
    products = [name for name, scheme in schemes.items() if scheme.multiplies(convs[name])]
    assert products
    model = nano.deployed / DEPLOYED
    assert constant_bytes(model) == nano.plan.size_bytes <= nano.plan.budget_bytes
    findings = check_model(model, nano.target).findings
    assert not [one for one in findings if one.effect in ("refused", "wrong", "doubtful")]


@pytest.mark.rtx
def test_the_stand_in_takes_every_product_packed(nano: Run, tmp_path: Path) -> None:
    """TensorRT-RTX at SM86, the nearest GPU to the Orin's that it builds for."""
    pytest.importorskip("tensorrt_rtx")
    target = replace(
        nano.target.build_target,
        builder="tensorrt_rtx",
        versions=("1.",),
        compute_capabilities=("SM86",),
    )
    request = BuildRequest(nano.deployed / DEPLOYED, target, batch_profile(nano))
    record = build_engine(request, tmp_path / "engine", expected_layers(nano), Talk())
    assert record.verified, record.problems
    convs = {one.name for one in nano.exported.graph.layers if one.window is not None}
    assert not [one for one in record.problems if one.layer in convs]
    assert record.kernels["runtime_fusion Int4"] > 0
