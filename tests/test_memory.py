"""The memory estimates: what they count, how they grow, and when a stage is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mpq_deploy import memory
from mpq_deploy.errors import UsageError
from mpq_deploy.graph.layers import layer_graph
from mpq_deploy.graph.load import load_model
from mpq_deploy.memory import ModelSize, estimate_stage, model_size, refuse_too_large
from mpq_deploy.recipe import make_recipe
from tests.pipeline.runs import build, recipe_for, save_denoiser

STAGES = ("calibrate", "candidates", "measure", "quantize")
RECIPE = make_recipe({})
GB = 10**9
SMALL = ModelSize(weights=GB // 10, largest=10**6, values=GB // 10, alive=GB // 100, outputs=GB // 50)


@pytest.mark.parametrize("stage", STAGES)
def test_more_of_anything_never_takes_less(stage: str) -> None:
    before = estimate_stage(stage, SMALL, RECIPE, 4).total
    for field in ("largest", "values", "alive", "outputs"):
        assert estimate_stage(stage, replace(SMALL, **{field: 4 * getattr(SMALL, field)}), RECIPE, 4).total >= before
    assert estimate_stage(stage, replace(SMALL, weights=4 * SMALL.weights), RECIPE, 4).total > before


@pytest.mark.parametrize("stage", ("calibrate", "measure"))
def test_large_weights_count_once(stage: str) -> None:
    one, two = (estimate_stage(stage, replace(SMALL, weights=n * 10 * GB), RECIPE, 4).total for n in (1, 2))
    assert two - one == 10 * GB


# Stable Diffusion 1.5's UNet at a latent of 32 x 32, and the peaks of its stages in docs/results/scale.md.
LARGE = ModelSize(3_438_085_324, 29_491_200, 1_129_085_128, 26_219_520, 242_495_744)
PEAKS = {"calibrate": 3.83, "candidates": 1.00, "measure": 6.70, "quantize": 1.30}
MEASURED = {
    "calibrate": {"batch_size": 1},
    "measure": {"probes": 4, "calls": 1, "batch_size": 2},
    "quantize": {"rounding": "nearest"},
}


@pytest.mark.parametrize("stage", STAGES)
def test_estimates_lie_within_a_quarter_of_measured_peaks(stage: str) -> None:
    estimate = estimate_stage(stage, LARGE, make_recipe(MEASURED), 4).total / GB
    assert 0.75 * PEAKS[stage] < estimate < 1.25 * PEAKS[stage]


def test_batches_count() -> None:
    calibrated = [estimate_stage("calibrate", SMALL, make_recipe({"calibrate": {"batch_size": n}}), 4) for n in (2, 4)]
    assert calibrated[1].values == pytest.approx(2 * calibrated[0].values, rel=1e-6)


def test_a_stage_that_does_not_fit_is_refused_with_its_figures() -> None:
    estimate = estimate_stage("measure", SMALL, RECIPE, 4)
    refuse_too_large(estimate, None, "")
    refuse_too_large(estimate, estimate.total, "")
    with pytest.raises(UsageError, match=r"'measure' would need about \d\.\d GB .* has 0\.3 GB free") as caught:
        refuse_too_large(estimate, 3 * GB // 10, "Lower something.")
    assert caught.value.hint == "Lower something."


def test_constants_and_values_are_those_of_the_graph(tmp_path: Path) -> None:
    size = model_size(layer_graph(load_model(save_denoiser(tmp_path))))
    one = 4 * 16 * 8 * 8  # channels x side x side
    assert size.weights == sum(
        value.const_value.nbytes  # type: ignore[union-attr]
        for value in load_model(tmp_path / "model.onnx").graph.initializers.values()
    )
    assert one <= size.alive <= size.values
    assert size.outputs <= size.values


def test_a_build_stops_before_the_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: 10**6)
    with pytest.raises(UsageError, match="The stage 'calibrate' would need about"):
        build(recipe_for(save_denoiser(tmp_path)), tmp_path / "run", last="calibrate")
    assert (tmp_path / "run" / "export").is_dir() and not (tmp_path / "run" / "calibrate").exists()
