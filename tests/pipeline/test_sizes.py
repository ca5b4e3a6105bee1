"""A build of two sizes: both are calibrated, measured and compared; engine, package and drop-in take both."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import mpq_deploy  # noqa: E402
from mpq_deploy.calibrate.observers import merge, observe  # noqa: E402
from mpq_deploy.calls.recorded import RecordedCalls  # noqa: E402
from mpq_deploy.delivery.package import make_reference  # noqa: E402
from mpq_deploy.device.manifest import Manifest  # noqa: E402
from mpq_deploy.engine.plan_engine import batch_profile  # noqa: E402
from mpq_deploy.errors import UsageError  # noqa: E402
from mpq_deploy.graph.writers.deployed_graphs import SIMULATED  # noqa: E402
from mpq_deploy.rounding.hessian import HessianPlan  # noqa: E402
from mpq_deploy.run.recipe_check import check_recipe  # noqa: E402
from mpq_deploy.run.view import Run  # noqa: E402
from mpq_deploy.runtime.ort import OrtDenoiser  # noqa: E402
from mpq_deploy.sensitivity.gain import measure_gain  # noqa: E402
from mpq_deploy.sensitivity.local_error import local_errors  # noqa: E402
from mpq_deploy.sensitivity.measure import measure  # noqa: E402
from mpq_deploy.sensitivity.measured_calls import Calls  # noqa: E402
from mpq_deploy.stages.measure import stage_subject  # noqa: E402
from mpq_deploy.system.progress import Talk  # noqa: E402
from tests.exported_networks import Form  # noqa: E402
from tests.pipeline.runs import FEW_SCHEMES, Built, build, describe, recipe_for  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.torch]
SHAPES = [(4, 8, 8), (4, 16, 8)]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """A finished run of a file for a range between two sizes, with its engine where the builder is here."""
    folder = tmp_path_factory.mktemp("sizes")
    Form("unet", "script", 17, open_sizes=True).export(folder / "model.onnx")
    sample = {"name": "sample", "shape": [4, 8, 8]}
    model = describe(folder / "model.onnx", sample=sample, pixel_range=None)
    rtx = pytest.importorskip("importlib.util").find_spec("tensorrt_rtx") is not None
    options: dict[str, Any] = {"evaluate__controls": False, "engine__build": rtx}
    recipe = recipe_for(model, sizes="8x8:8x16:2", **FEW_SCHEMES, **options)
    return build(recipe, folder / "run")


@pytest.fixture(scope="module")
def run(built: Built) -> Run:
    return Run.opened(built.run, Talk())


def alone(run: Run, size: int) -> RecordedCalls:
    """The calibrated calls of one size, as those of a model of that size."""
    spec, calls = run.exported.spec, run.calibration.inputs
    return RecordedCalls(calls.at_size(spec, size), spec.at_size(size))


def both(run: Run) -> RecordedCalls:
    return RecordedCalls(run.calibration.inputs, run.exported.spec)


def test_each_size_is_compared_and_reported(built: Built) -> None:
    evaluation = json.loads((built.run / "evaluate" / "evaluation.json").read_text("utf-8"))
    kept = {one["size"]: one["variants"] for one in evaluation["by_size"]}
    rows = {row["size"]: row for row in built.report["by_size"]}
    # The last lies between those of the range: nothing was calibrated there.
    assert list(rows) == ["8x8", "8x16", "8x12"]
    for size, row in rows.items():
        figures = kept[size]["ours"]
        assert 0 < row["measured_nmse"] == figures["measured_nmse"] < 0.2
        assert row["psnr_db"] > 15 and row["samples"] == 1
    # The main figures are those of the first size, and the report says so.
    assert built.report["measured_nmse"] == rows["8x8"]["measured_nmse"]
    assert any("main figures are of 8x8" in note for note in built.report["notes"])
    assert any("8x12 lies within the range" in note for note in built.report["notes"])
    assert built.report["model"]["sample_shape"] == [4, 16, 8]
    text = (built.run / "report.md").read_text("utf-8")
    assert "### Sizes" in text and "| 8x16 |" in text and "| 8x12 |" in text
    assert "Each variant at each size of image" in (built.run / "report.html").read_text("utf-8")


def test_statistics_are_those_of_both_sizes_together(run: Run) -> None:
    graph, settings = run.exported.graph, run.recipe.calibrate
    pooled = observe(graph, both(run), settings, Talk())
    parts = [observe(graph, alone(run, size), settings, Talk()) for size in (0, 1)]
    together = merge(*parts)
    np.testing.assert_array_equal(pooled.amax, np.maximum(parts[0].amax, parts[1].amax))
    np.testing.assert_array_equal(pooled.counts, together.counts)
    np.testing.assert_allclose(pooled.square_sum, together.square_sum, rtol=1e-6)
    # Activations with a height and width give the larger size twice the values.
    ratios = {round(b / a, 3) for a, b in zip(parts[0].counts, parts[1].counts)}
    assert ratios == {1.0, 2.0}


def test_hessians_weigh_the_sizes_by_their_positions(run: Run) -> None:
    graph = run.exported.graph
    settings = run.recipe.quantize.replace(hessian_rows=10**6)

    def hessians(calls: RecordedCalls) -> dict[str, Any]:
        plan = HessianPlan.of(graph, calls, settings, Talk())
        return {h.layer.name: h for n in range(len(plan)) for h in plan.hessians(n)}

    pooled, *parts = (hessians(calls) for calls in (both(run), alone(run, 0), alone(run, 1)))
    for name, hessian in pooled.items():
        small, large = (part[name] for part in parts)
        assert hessian.rows == small.rows + large.rows
        expected = (small.blocks * small.rows + large.blocks * large.rows) / hessian.rows
        np.testing.assert_allclose(hessian.blocks, expected, rtol=1e-4, atol=1e-5)


def test_both_sizes_are_measured_the_largest_first(run: Run) -> None:
    subject, _ = stage_subject(run)
    calls = subject.calls()
    shapes = [calls.feeds(0, one)["sample"].shape for one in calls.chunks_of_step(4)]
    assert [shape[1:] for shape in shapes] == SHAPES[::-1]
    assert sum(shape[0] for shape in shapes) == calls.count
    # One call of each where fewer are asked for.
    assert Calls(subject.graph, subject.recorded, 1).count == 2


def test_losses_are_the_error_of_both_sizes_over_the_power_of_both(run: Run) -> None:
    subject, _ = stage_subject(run)
    spec, calls = subject.spec, subject.calibration
    pooled = local_errors(subject, subject.calls(calls.count))
    parts = []
    for size in (0, 1):
        alone_there = replace(
            subject, calibration=calls.at_size(spec, size), spec=spec.at_size(size)
        )
        count = alone_there.calibration.count
        parts.append((local_errors(alone_there, alone_there.calls(count)), count))
    for layer in subject.layers:
        power = [
            sum(
                of.mean_square[use.output] * np.prod(of.shape(use.output, count))
                for use in layer.uses
            )
            for of, count in parts
        ]
        for scheme, losses in pooled.relative[layer.name].items():
            errors = [
                of.relative[layer.name][scheme] * there
                for (of, _), there in zip(parts, power, strict=True)
            ]
            np.testing.assert_allclose(losses, sum(errors) / sum(power), rtol=1e-4)


def test_a_metric_of_one_shape_takes_the_largest_size(run: Run) -> None:
    subject, _ = stage_subject(run)
    table = measure("gain", subject)
    assert "losses are measured at 8x16 alone" in table.notes
    expected = measure_gain(subject.at_one_size())
    for name, row in expected.losses.items():
        for scheme, values in row.items():
            np.testing.assert_array_equal(table.losses[name][scheme], values)


def test_the_engine_covers_both_sizes(built: Built, run: Run) -> None:
    shapes = batch_profile(run).inputs()["sample"]
    assert shapes.minimum == (1, 4, 8, 8) and shapes.maximum == (8, 4, 16, 8)
    assert shapes.optimum == (2, 4, 8, 8)
    if (built.run / "engine" / "model.engine").is_file():
        record = json.loads((built.run / "engine" / "build.json").read_text("utf-8"))
        assert record["verified"]
        log = (built.run / "engine.log").read_text("utf-8")
        assert re.search(
            r"input: sample with dtype: float16, dimensions: \(-1, -?\d, -1, -1\)", log
        )


def test_a_package_has_the_profile_and_references_of_the_first_size(run: Run) -> None:
    from mpq_deploy.delivery.package import _manifest, _shape_flags

    reference, arrays = make_reference(run)
    manifest = _manifest(run, run.target, reference)
    assert len(arrays) and manifest.shapes["sample"] == (4, 16, 8)
    assert manifest.takes("sample", (4, 8, 8)) and not manifest.takes("sample", (4, 16, 16))
    flags = dict(flag.split("=") for flag in _shape_flags(manifest))
    assert "sample:1x4x8x8" in flags["--minShapes"] and "sample:2x4x8x8" in flags["--optShapes"]
    assert "sample:8x4x16x8" in flags["--maxShapes"]
    assert Manifest.to_json(manifest).count('"least"') == 1


def test_the_drop_in_takes_the_range_and_refuses_what_is_outside(built: Built, run: Run) -> None:
    unet = mpq_deploy.load(built.run, backend="onnxruntime")
    twin = OrtDenoiser(built.run / "quantize" / SIMULATED, run.exported.spec, fake_quant_only=True)
    for shape in (*SHAPES, (4, 10, 8)):
        sample = np.random.default_rng(0).standard_normal((2, *shape), np.float32)
        expected = twin(sample, 400.0, {})
        made = unet(torch.from_numpy(sample), 400).sample
        np.testing.assert_allclose(made.numpy(), expected, atol=1e-5)
    for height, width in ((16, 16), (9, 8), (18, 8)):
        said = rf"shape \[4, {height}, {width}\].*every size from 8x8 to 8x16 in steps of 2"
        with pytest.raises(UsageError, match=said):
            unet(torch.zeros(1, 4, height, width), 400)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"recover__steps": 2}, "recover.steps is for one size"),
        ({"evaluate__correction": "ptqd"}, "evaluate.correction is for one size"),
        ({"calls": "calls"}, "--calls is for one size"),
        ({"calibrate__samples": 1}, "calibrate.samples is 1, and 2 sizes"),
    ],
)
def test_what_is_for_one_size_is_refused(tmp_path: Path, options: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        check_recipe(recipe_for(tmp_path, sizes="8x8,8x16", **options))
