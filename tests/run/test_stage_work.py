"""The forecast's counts beside what the stages really do: rows through sessions, passes back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from safetensors.numpy import load_file

import mpq_deploy
from mpq_deploy.evaluate.variants import kept_images
from mpq_deploy.models.spec import DenoiserSpec, InputSpec
from mpq_deploy.recipe import EvaluateSettings, Recipe
from mpq_deploy.run.memory_model import estimate_stage, hessian_groups
from mpq_deploy.run.pipeline import STAGES, open_pipeline
from mpq_deploy.run.stage_memory import stage_memory
from mpq_deploy.run.stage_work import ModelWork, images_of_control, works
from mpq_deploy.stages.calibrate import kept_counts
from tests.graphs import denoiser_graph
from tests.pipeline.runs import Notes, build, recipe_for, save_denoiser
from tests.tiny_models import ONE_LEVEL, tiny_text_pipeline_folder

torch = pytest.importorskip("torch")

RECIPES: dict[str, dict[str, Any]] = {
    "tiny": {},
    "other counts": {
        "calibrate__samples": 10,
        "calibrate__observed": 5,
        "calibrate__timesteps": 3,
        "measure__samples": 4,
        "measure__calls": 3,
        "measure__probes": 3,
        "measure__timesteps": 2,
        "quantize__noise_draws": 2,
        "evaluate__samples": 7,
        "evaluate__calls": 2,
        "evaluate__correction": "ptqd",
    },
    "few": {
        "calibrate__samples": 2,
        "measure__samples": 2,
        "quantize__noise_draws": 0,
        "quantize__rounding": "nearest",
        "quantize__salience": "kurtosis",
        "evaluate__controls": False,
    },
}


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Rows that sessions ran, by whether their graph is quantized, and rows of passes back."""
    counts: Counter[str] = Counter()

    class Counted(ort.InferenceSession):
        def __init__(self, source: str | bytes, *args: Any, **options: Any) -> None:
            text = source if isinstance(source, bytes) else Path(source).read_bytes()
            self.kind = "quantized" if b"DequantizeLinear" in text else "float"
            super().__init__(source, *args, **options)

        def run(self, names: Any, feeds: dict[str, Any], *args: Any) -> Any:
            counts[self.kind] += len(feeds["sample"])
            return super().run(names, feeds, *args)

    grad = torch.autograd.grad

    def counted(outputs: Any, inputs: Any, grads: Any, **options: Any) -> Any:
        counts["back"] += len(grads[0])
        return grad(outputs, inputs, grads, **options)

    monkeypatch.setattr(ort, "InferenceSession", Counted)
    monkeypatch.setattr(torch.autograd, "grad", counted)
    yield counts


def done(
    recipe: Recipe, run: Path, seen: Counter[str]
) -> tuple[dict[str, Counter[str]], ModelWork]:
    """Make every stage; return what each ran, and what the forecast knows of the model."""
    found = {}
    with open_pipeline(recipe, run, Notes()) as pipeline:
        for name, stage in STAGES.items():
            if stage.applies(recipe):
                seen.clear()
                pipeline.ensure(name)
                found[name] = Counter(seen)
        return found, ModelWork.of(pipeline.run)


def assert_counts(recipe: Recipe, run: Path, seen: Counter[str]) -> ModelWork:
    """Hold what the stages run against what is counted beforehand; return what is known of the model."""
    found, model = done(recipe, run, seen)
    for stage, work in works(recipe, model).items():
        counted = {
            "float": work.floats + work.observed + work.gathered,
            "quantized": work.quantized,
            "back": work.adjoints * work.directions,
        }
        assert {kind: found[stage][kind] for kind in counted} == counted, stage
    for stage in found.keys() - works(recipe, model).keys() - {"export"}:
        assert not found[stage], stage
    return model


@pytest.mark.parametrize("changes", RECIPES.values(), ids=RECIPES)
def test_stages_run_what_is_counted(
    tmp_path: Path, seen: Counter[str], changes: dict[str, Any]
) -> None:
    assert_counts(recipe_for(save_denoiser(tmp_path), **changes), tmp_path / "run", seen)


def test_samples_that_are_kept_are_not_counted_again(tmp_path: Path, seen: Counter[str]) -> None:
    source, run = save_denoiser(tmp_path), tmp_path / "run"
    build(recipe_for(source), run, "evaluate")
    recipe = recipe_for(source, budget="0.6")
    with open_pipeline(recipe, run, Notes()) as pipeline:
        for name in (n for n, stage in STAGES.items() if stage.applies(recipe)):
            if name == "evaluate":
                break
            pipeline.ensure(name)
        assert pipeline.results["controls"].cached
        model, kept = ModelWork.of(pipeline.run), kept_images(pipeline.run, controls=True)
        assert kept == (recipe.evaluate.samples, model.controls)
        assert kept_images(pipeline.run, controls=False) == (kept[0], 0)
        seen.clear()
        pipeline.ensure("evaluate")
    work = works(recipe, replace(model, sampled=kept))["evaluate"]
    assert (seen["float"], seen["quantized"]) == (work.floats, work.quantized)
    assert work.quantized < works(recipe, model)["evaluate"].quantized


@pytest.mark.parametrize(
    ("first", "then", "kept"),
    [
        ({"samples": 6}, {"samples": 11}, (4, 0)),
        ({"samples": 16, "observed": 13}, {"samples": 18, "observed": 18}, (16, 12)),
        ({"samples": 6}, {"samples": 6, "seed": 9}, (0, 0)),
    ],
)
def test_calls_that_are_kept_are_not_counted_again(
    tmp_path: Path,
    seen: Counter[str],
    first: dict[str, int],
    then: dict[str, int],
    kept: tuple[int, int],
) -> None:
    source = save_denoiser(tmp_path, denoiser_graph(channels=8, size=4))
    before, after = (
        recipe_for(source, **{f"calibrate__{name}": value for name, value in counts.items()})
        for counts in (first, then)
    )
    build(before, tmp_path / "run", "calibrate")
    with open_pipeline(after, tmp_path / "run", Notes()) as pipeline:
        run = pipeline.current("export")
        model = replace(ModelWork.of(run), kept=kept_counts(run))
        seen.clear()
        pipeline.ensure("calibrate")
    work = works(after, model)["calibrate"]
    assert model.kept == kept and seen["float"] == work.floats + work.observed


def test_calls_run_again_for_each_group_of_hessians(tmp_path: Path, seen: Counter[str]) -> None:
    changes = {"quantize__memory_mb": 32, "calibrate__samples": 9}
    model = save_denoiser(tmp_path, denoiser_graph(channels=64))
    recipe = recipe_for(model, **changes)
    size = assert_counts(recipe, tmp_path / "run", seen).size
    assert hessian_groups(size, recipe) > 1


@pytest.mark.torch
def test_a_pipeline_runs_what_is_counted(tmp_path: Path, seen: Counter[str]) -> None:
    pytest.importorskip("transformers")
    folder = tiny_text_pipeline_folder(tmp_path / "model", sample_size=8, **ONE_LEVEL)
    options = {"target": "onnxruntime-cpu", "calibrate__samples": 6, "evaluate__samples": 3}
    recipe = recipe_for(folder, **options)
    # Of guidance: two rows of the denoiser for each image.
    assert assert_counts(recipe, tmp_path / "run", seen).guided == 2
    # The memory of its other parts, beside that of the same denoiser alone.
    with open_pipeline(recipe, tmp_path / "run", Notes()) as pipeline:
        run = pipeline.current("export")
        found, size = stage_memory(run, "evaluate"), run.exported.size
    alone = estimate_stage("evaluate", size, recipe, 0, rows=2 * recipe.evaluate.batch_size)
    parts = [load_file(file) for file in folder.rglob("*.safetensors") if "unet" not in file.parts]
    elements = sum(array.size for part in parts for array in part.values())
    assert len(parts) > 1 and found.weights - alone.weights == 4 * elements
    assert found.values == alone.values and found.code > alone.code


def test_calls_of_a_script_are_run_as_counted(tmp_path: Path, seen: Counter[str]) -> None:
    session = ort.InferenceSession(
        str(denoiser_graph(channels=16, size=8).save(tmp_path / "m.onnx"))
    )
    random = np.random.default_rng(0)
    with mpq_deploy.record(session, tmp_path / "calls"):
        for _ in range(6):
            for timestep in (900.0, 500.0, 100.0):
                sample = random.standard_normal((2, 3, 8, 8), np.float32)
                session.run(None, {"sample": sample, "timestep": np.full(2, timestep, np.float32)})
    changes = {
        "calls": str(tmp_path / "calls"),
        "calibrate__samples": 20,
        "calibrate__timesteps": 2,
    }
    model = assert_counts(recipe_for(tmp_path / "m.onnx", **changes), tmp_path / "run", seen)
    assert model.available is not None and sum(model.available) == 12


def test_pairs_are_those_that_are_measured(tmp_path: Path) -> None:
    from mpq_deploy.sensitivity.table import SensitivityTable

    recipe = recipe_for(save_denoiser(tmp_path))
    with open_pipeline(recipe, tmp_path / "run", Notes()) as pipeline:
        run = pipeline.current("measure")
        table, model = SensitivityTable.load(run.stage("measure")), ModelWork.of(run)
    assert model.pairs == sum(map(len, table.losses.values()))


@pytest.mark.parametrize(
    ("scheduler", "images", "samples", "expected"),
    [
        ("DDIMScheduler", "needed", 32, 8),
        ("DDIMScheduler", "needed", 5, 5),
        ("DDIMScheduler", "all", 32, 32),
        ("EulerAncestralDiscreteScheduler", "needed", 32, 32),
    ],
)
def test_controls_are_forecast_with_their_first_images(
    scheduler: str, images: Any, samples: int, expected: int
) -> None:
    spec = DenoiserSpec(
        name="made-up",
        source="test",
        sample=InputSpec(name="sample", shape=(3, 8, 8)),
        timestep=InputSpec(name="timestep"),
        scheduler={"_class_name": scheduler, "num_train_timesteps": 100},
    )
    assert images_of_control(EvaluateSettings(controls_images=images), spec, samples) == expected
