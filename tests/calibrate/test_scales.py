"""Scales against brute force over every FP16 number."""

from __future__ import annotations

import numpy as np
import pytest

from mpq_deploy.calibrate.scales import (
    SMALLEST_SCALE,
    activation_scale,
    quantization_error,
    with_tail,
)
from mpq_deploy.errors import UsageError


def error_in_float64(values: np.ndarray, scale: float) -> float:
    codes = np.clip(np.round(values.astype(np.float64) / scale), -128, 127)
    return float(np.mean(np.square(codes * scale - values)))


def all_scales(low: float, high: float) -> np.ndarray:
    every = np.arange(0x0400, 0x7C00, dtype=np.uint16).view(np.float16).astype(np.float64)
    return every[(every >= low) & (every <= high)]


SAMPLES = {
    "normal": lambda rng: rng.standard_normal(3000),
    "silu": lambda rng: (lambda x: x / (1 + np.exp(-x)))(rng.standard_normal(3000) * 3),
    "student": lambda rng: rng.standard_t(3, 3000),
    "uniform": lambda rng: rng.uniform(-1, 1, 3000),
    "tiny": lambda rng: rng.standard_normal(3000) * 1e-4,
    "large": lambda rng: rng.standard_normal(3000) * 3e3,
    "outliers": lambda rng: np.append(rng.standard_normal(3000), [40.0, -35.0]),
}


@pytest.mark.parametrize("kind", SAMPLES)
def test_mse_is_close_to_the_best_fp16_scale(kind: str) -> None:
    values = SAMPLES[kind](np.random.default_rng(1)).astype(np.float32)
    amax = float(np.abs(values).max())
    chosen = activation_scale("mse", values, amax, values.size)
    best = min(
        error_in_float64(values, s)
        for s in all_scales(amax / 127 / 40, max(amax / 127 * 1.02, SMALLEST_SCALE))
    )
    assert error_in_float64(values, chosen) <= 1.015 * best


@pytest.mark.parametrize("kind", SAMPLES)
def test_errors_are_those_of_the_quantizer(kind: str) -> None:
    values = SAMPLES[kind](np.random.default_rng(2)).astype(np.float32)
    scales = np.abs(values).max() / 127 * np.array([0.2, 0.7, 1.0], np.float32)
    weights = np.full(values.size, 1 / values.size)
    expected = [error_in_float64(values, float(s)) for s in scales]
    np.testing.assert_allclose(quantization_error(values, weights, scales), expected, rtol=1e-2)


def test_mse_is_never_worse_than_the_other_methods() -> None:
    for kind, make in SAMPLES.items():
        values = make(np.random.default_rng(3)).astype(np.float32)
        amax = float(np.abs(values).max())
        errors = {
            m: error_in_float64(values, activation_scale(m, values, amax, values.size))
            for m in ("mse", "percentile", "absmax")
        }
        assert errors["mse"] <= 1.01 * min(errors.values()), kind


def test_percentile_is_of_absolute_values() -> None:
    values = np.linspace(-2, 1, 1001).astype(np.float32)
    expected = np.percentile(np.abs(values), 90) / 127
    assert activation_scale("percentile", values, 2.0, 1e6, 90) == pytest.approx(expected, rel=1e-3)
    assert activation_scale("absmax", values, 2.0, 1e6) == float(np.float16(2 / 127))


def test_the_tail_keeps_total_mass_and_reaches_amax() -> None:
    sample = np.random.default_rng(4).standard_normal(1000)
    points, weights = with_tail(sample, 20.0, 1e6)
    assert weights.sum() == pytest.approx(1) and points.max() == pytest.approx(20)
    assert weights[-1] == pytest.approx(1e-6)
    assert weights[points > np.abs(sample).max()].sum() == pytest.approx(1 / 1001)


def test_the_tail_stops_a_sample_from_clipping_what_it_missed() -> None:
    rng = np.random.default_rng(5)
    whole = rng.standard_t(4, 400_000).astype(np.float32)
    amax = float(np.abs(whole).max())
    best = min(error_in_float64(whole, s) for s in amax / 127 / np.geomspace(1, 40, 60))
    with_it, without = [], []
    for seed in range(5):
        sample = np.random.default_rng(seed).choice(whole, 512)
        with_it.append(
            error_in_float64(whole, activation_scale("mse", sample, amax, whole.size)) / best
        )
        without.append(
            error_in_float64(
                whole, activation_scale("mse", sample, float(np.abs(sample).max()), 512)
            )
            / best
        )
    assert np.mean(with_it) < np.mean(without) and max(with_it) < 1.5


@pytest.mark.parametrize("method", ["mse", "percentile", "absmax"])
def test_all_zero_and_extreme_activations_get_a_normal_fp16_scale(method: str) -> None:
    assert activation_scale(method, np.zeros(10), 0.0, 10) == SMALLEST_SCALE
    for amax in (1e-30, 1e-6, 1e9, 3e38):
        scale = activation_scale(method, np.array([amax, -amax / 2]), amax, 2)
        assert np.isfinite(np.float16(scale)) and scale >= np.finfo(np.float16).smallest_normal


def test_zero_sample_with_a_rare_value() -> None:
    scale = activation_scale("mse", np.zeros(4096), 3.0, 1e6)
    assert SMALLEST_SCALE <= scale <= 3 / 127 * 1.01


def test_unknown_method() -> None:
    with pytest.raises(UsageError, match="'best'"):
        activation_scale("best", np.ones(3), 1.0, 3)
