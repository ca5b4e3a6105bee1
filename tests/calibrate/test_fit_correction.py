"""Fitting: a quantized model of known slope, bias and noise is recovered; what does not help is not applied."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from mpq_deploy.calibrate.fit_correction import CallMoments, call_moments, fit_correction
from mpq_deploy.calls.recorded import RecordedCalls
from mpq_deploy.errors import ModelError, UsageError
from mpq_deploy.models.spec import DenoiserSpec, InputSpec
from mpq_deploy.runtime.ort import OrtDenoiser
from tests.calls.sets import call_set
from tests.graphs import GraphBuilder, denoiser_graph

Array = np.ndarray[Any, np.dtype[Any]]
TIMESTEPS = np.array([900.0, 500.0, 100.0])
SLOPES = np.array([0.08, -0.03, 0.0])
BIASES = np.array([[0.05, -0.02], [0.0, 0.1], [0.0, 0.0]])
NOISE = 0.1


def outputs(seed: int = 0, calls: int = 24, noise: float = NOISE) -> tuple[Array, Array]:
    """Float and quantized outputs [3, calls, 2, 16, 16]; channels differ in mean, so that bias and slope mix."""
    rng = np.random.default_rng(seed)
    clean = rng.standard_normal((3, calls, 2, 16, 16)) + np.array([0.5, -1.0]).reshape(2, 1, 1)
    shape = (3, 1, 1, 1, 1)
    bias = BIASES.reshape(3, 1, 2, 1, 1)
    return clean, (1 + SLOPES.reshape(shape)) * clean + bias + noise * rng.standard_normal(
        clean.shape
    )


def test_known_slope_bias_and_noise_are_recovered() -> None:
    clean, quantized = outputs()
    made = fit_correction(CallMoments.of(TIMESTEPS, clean, quantized), {"m": "0"}, "epsilon")
    assert [step.timestep for step in made.steps] == [100.0, 500.0, 900.0]
    # The standard error of a mean over one channel's elements is noise / sqrt(24 * 256).
    tolerance = 5 * NOISE / np.sqrt(24 * 256)
    for step, slope, bias in zip(made.steps[1:], SLOPES[1::-1], BIASES[1::-1], strict=True):
        assert step.applied
        assert step.slope == pytest.approx(slope, abs=tolerance)
        assert step.bias == pytest.approx(bias, abs=2 * tolerance)
        assert step.residual_variance == pytest.approx(NOISE**2, rel=0.03)


def test_the_corrected_output_of_fresh_calls_is_closer_and_as_good_as_was_said() -> None:
    made = fit_correction(CallMoments.of(TIMESTEPS, *outputs()), {"m": "0"}, "epsilon")
    clean, quantized = outputs(seed=9)
    for step, timestep in zip(made.steps[::-1][:2], TIMESTEPS[:2], strict=True):
        index = list(TIMESTEPS).index(timestep)
        before, after = (
            np.square(found - clean[index]).sum() / np.square(clean[index]).sum()
            for found in (
                quantized[index],
                made.apply(quantized[index].astype(np.float32), timestep),
            )
        )
        assert after < 0.9 * before
        assert (before, after) == (
            pytest.approx(step.heldout_nmse_before, rel=0.05),
            pytest.approx(step.heldout_nmse_after, rel=0.05),
        )


def test_where_there_is_only_noise_nothing_is_applied_and_the_noise_is_kept() -> None:
    made = fit_correction(CallMoments.of(TIMESTEPS, *outputs()), {"m": "0"}, "epsilon")
    only_noise = made.steps[0]
    assert not only_noise.applied
    assert "not applied" in only_noise.note
    assert (only_noise.slope, only_noise.bias) == (0.0, (0.0, 0.0))
    assert only_noise.residual_variance == pytest.approx(NOISE**2, rel=0.03)
    assert only_noise.heldout_nmse_after == only_noise.heldout_nmse_before


def test_a_bias_that_differs_from_call_to_call_is_not_applied() -> None:
    """Fitted to all calls it would lower their error; on calls that were held out it does not."""
    rng = np.random.default_rng(0)
    clean = rng.standard_normal((1, 8, 1, 8, 8))
    quantized = clean + rng.standard_normal((1, 8, 1, 1, 1))
    made = fit_correction(CallMoments.of(np.array([1.0]), clean, quantized), {"m": "0"}, "epsilon")
    assert not made.steps[0].applied


def test_errors_from_sums_are_those_of_the_arrays() -> None:
    """The held-out error by brute force: fit with least squares on seven eighths, apply to the last."""
    clean, quantized = (values[:1, :16] for values in outputs())
    made = fit_correction(CallMoments.of(TIMESTEPS[:1], clean, quantized), {"m": "0"}, "epsilon")
    total = 0.0
    for fold in range(8):
        held = np.arange(16) % 8 == fold
        m, q = clean[0, ~held], quantized[0, ~held]
        columns = [m.ravel()]
        for channel in range(2):
            indicator = np.zeros_like(m)
            indicator[:, channel] = 1
            columns.append(indicator.ravel())
        k, *bias = np.linalg.lstsq(np.stack(columns, 1), (q - m).ravel(), rcond=None)[0]
        corrected = (quantized[0, held] - np.reshape(bias, (2, 1, 1))) / (1 + k)
        total += np.square(corrected - clean[0, held]).sum()
    assert made.steps[0].heldout_nmse_fitted == pytest.approx(
        total / np.square(clean).sum(), rel=1e-9
    )


def test_one_bias_for_all_channels() -> None:
    clean, quantized = outputs()
    made = fit_correction(
        CallMoments.of(TIMESTEPS, clean, quantized), {"m": "0"}, "epsilon", "scalar"
    )
    m, d = clean[0].ravel(), (quantized - clean)[0].ravel()
    slope, intercept = np.polyfit(m, d, 1)
    assert made.steps[2].slope == pytest.approx(slope, rel=1e-6)
    assert made.steps[2].bias == (pytest.approx(intercept, rel=1e-6),)


def test_an_output_that_is_not_the_float_ones_is_left_alone() -> None:
    clean = np.random.default_rng(0).standard_normal((1, 4, 1, 8, 8))
    step = fit_correction(
        CallMoments.of(np.array([1.0]), clean, 0.1 * clean), {"m": "0"}, "epsilon"
    ).steps[0]
    assert not step.applied
    assert "slope of -0.90" in step.note


def test_the_same_model_needs_no_correction() -> None:
    clean, _ = outputs()
    made = fit_correction(CallMoments.of(TIMESTEPS, clean, clean), {"m": "0"}, "epsilon")
    assert not any(step.applied for step in made.steps)
    assert all(step.residual_variance == 0 for step in made.steps)


def test_too_few_calls_and_a_dead_model_are_refused() -> None:
    clean, quantized = outputs(calls=1)
    with pytest.raises(UsageError, match="1 call"):
        fit_correction(CallMoments.of(TIMESTEPS, clean, quantized), {"m": "0"}, "epsilon")
    with pytest.raises(ModelError, match="zero everywhere"):
        fit_correction(
            CallMoments.of(TIMESTEPS, np.zeros((3, 4, 1, 2)), np.ones((3, 4, 1, 2))),
            {"m": "0"},
            "epsilon",
        )


def scaled(graph: GraphBuilder) -> GraphBuilder:
    """The same graph with its output times 1.25, plus 0.5."""
    (name,) = graph.nodes[-1].output
    graph.nodes[-1].output[0] = "before"
    larger = graph.op("Mul", ["before", graph.weight("gain", np.float32(1.25))], "larger")
    graph.op("Add", [larger, graph.weight("shift", np.float32(0.5))], "shifted")
    graph.nodes[-1].output[0] = name
    return graph


def test_two_models_are_run_on_the_recorded_calls(tmp_path: Path) -> None:
    from mpq_deploy.system.progress import Talk

    plain = denoiser_graph(channels=16, size=8).save(tmp_path / "float.onnx")
    other = scaled(denoiser_graph(channels=16, size=8)).save(tmp_path / "quantized.onnx")
    spec = DenoiserSpec(
        name="tiny",
        source="test",
        sample=InputSpec(name="sample", shape=(3, 8, 8)),
        timestep=InputSpec(name="timestep"),
        output=onnx.load(plain).graph.output[0].name,
        scheduler={"_class_name": "DDIMScheduler"},
    )
    samples = np.random.default_rng(0).standard_normal((2, 5, 3, 8, 8)).astype(np.float32)
    recorded = call_set(samples, [900, 100], np.zeros(5, np.int64), spec)
    found = call_moments(plain, other, RecordedCalls(recorded, spec), 2, Talk())
    model = OrtDenoiser(plain, spec)
    clean = np.stack([model(x, t, {}) for x, t in zip(samples, (900.0, 100.0), strict=True)])
    expected = CallMoments.of(recorded.timesteps, clean, 1.25 * clean + 0.5)
    for name in ("m", "d", "mm", "md", "dd"):
        np.testing.assert_allclose(
            getattr(found, name), getattr(expected, name), rtol=1e-4, atol=1e-4
        )
    made = fit_correction(found, {"m": "0"}, "epsilon")
    assert made.steps[0].slope == pytest.approx(0.25, abs=1e-4)
    assert made.steps[0].bias == pytest.approx([0.5] * 3, abs=1e-4)
