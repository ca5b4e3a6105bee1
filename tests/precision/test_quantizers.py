"""Scales, rounding and GPTQ: relations that must hold for any weight, and independent references."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpq_deploy.precision.quantizers import (
    QuantizedMatrix,
    RoundingProblem,
    choose_multiple_scale,
    choose_scale,
    gptq_codes,
    gptq_factor,
    round_to_nearest,
)
from mpq_deploy.precision.scheme import INT4, INT8


def random_weight(seed: int, rows: int = 6, columns: int = 32, spread: float = 0.1) -> np.ndarray:
    return (np.random.default_rng(seed).standard_t(4, (rows, columns)) * spread).astype(np.float32)


def random_hessian(seed: int, columns: int = 32) -> np.ndarray:
    rng = np.random.default_rng(seed)
    mixing = np.eye(columns) + 0.3 * rng.standard_normal((columns, columns))
    x = rng.standard_normal((400, columns)) @ mixing
    return x.T @ x / len(x)


def clip_and_round(w: np.ndarray, scale: np.ndarray, low: int, high: int) -> np.ndarray:
    return np.clip(np.rint(w / scale), low, high) * scale


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([1, 2, 4]), st.sampled_from([4, 8]), st.floats(1e-3, 30.0))
def test_the_chosen_scale_is_never_worse_than_the_plain_ones(seed: int, blocks: int, bits: int, spread: float) -> None:
    weight = random_weight(seed, spread=spread)
    importance = np.random.default_rng(seed + 1).uniform(0.1, 2, 32)
    precision = INT4 if bits == 4 else INT8
    scale = choose_scale(weight, importance, blocks, bits)
    assert scale.dtype == np.float16 and np.all(scale > 0) and np.all(np.isfinite(scale))

    def error(s: np.ndarray) -> np.ndarray:
        wide = np.repeat(s.astype(np.float32), 32 // blocks, axis=1)
        fake = clip_and_round(weight, wide, precision.quant_min, precision.quant_max)
        return (importance * np.square(weight - fake)).reshape(6, blocks, -1).sum(axis=2)

    amax = np.abs(weight).reshape(6, blocks, -1).max(axis=2)
    for ratio in (0.6, 0.8, 1.0):
        plain = (amax * ratio / precision.quant_max).astype(np.float16)
        # The search's ratios are 0.025 apart, so a plain scale may fall between two of them.
        assert np.sum(error(scale)) <= np.sum(error(plain)) * 1.02


def test_a_zero_channel_quantizes_to_zeros_with_a_valid_scale() -> None:
    weight = random_weight(0)
    weight[2] = 0
    for bits in (4, 8):
        scale = choose_scale(weight, np.ones(32), 2, bits)
        assert np.all(scale > 0)
        codes = round_to_nearest(weight, np.repeat(scale.astype(np.float32), 16, axis=1), -8, 7)
        assert not codes[2].any()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([1, 2, 4, 8]), st.sampled_from([1e-4, 1e-3, 0.1, 5.0]))
def test_requantizing_the_stored_weight_to_int8_is_exact(seed: int, blocks: int, spread: float) -> None:
    weight = random_weight(seed, spread=spread)
    weight[0] *= 40  # channels of very different size
    free = choose_scale(weight, np.ones(32), blocks, 4)
    scale, channel = choose_multiple_scale(weight, np.ones(32), free)
    for code in range(-8, 8):
        # What TensorRT does: DequantizeLinear in FP16, then QuantizeLinear to INT8.
        stored = (np.float16(code) * scale).astype(np.float32)
        requantized = np.rint(stored / channel.astype(np.float32)[:, None])
        matrix = QuantizedMatrix(np.full(weight.shape, code, np.int8), scale, channel)
        expected = matrix.effective_scale() * code
        assert np.abs(requantized).max() <= 127
        np.testing.assert_allclose(requantized * channel.astype(np.float32)[:, None], expected, rtol=1e-6, atol=0)


def naive_gptq(w: np.ndarray, step: np.ndarray, hessian: np.ndarray, damping: float, order: np.ndarray) -> np.ndarray:
    """GPTQ as the paper states it: round one column, update the rest with H^-1, remove the column, repeat."""
    h = np.array(hessian, np.float64) + damping * np.mean(np.diagonal(hessian)) * np.eye(len(hessian))
    left, w = list(order), w.astype(np.float64).copy()
    codes = np.zeros(w.shape)
    while left:
        k = left[0]
        inverse = np.linalg.inv(h[np.ix_(left, left)])
        codes[:, k] = np.clip(np.rint(w[:, k] / step[:, k]), -8, 7)
        error = (w[:, k] - codes[:, k] * step[:, k]) / inverse[0, 0]
        w[:, left] -= np.outer(error, inverse[0])
        left = left[1:]
    return codes


def test_gptq_equals_the_paper_s_procedure_where_it_beats_nearest() -> None:
    weight, hessian = random_weight(3), random_hessian(4)
    step = np.repeat(choose_scale(weight, np.diagonal(hessian), 2, 4).astype(np.float32), 16, axis=1)
    order = np.argsort(-np.diagonal(hessian), kind="stable")
    expected = naive_gptq(weight, step, hessian, 0.01, order)
    (codes,) = gptq_codes([RoundingProblem(weight, step, -8, 7)], hessian, 0.01)
    nearest = round_to_nearest(weight, step, -8, 7)
    same_as_paper = np.all(codes == expected, axis=1)
    assert same_as_paper.sum() >= 5
    assert np.all(same_as_paper | np.all(codes == nearest, axis=1))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000))
def test_gptq_is_never_worse_than_nearest_in_any_row(seed: int) -> None:
    weight, hessian = random_weight(seed), random_hessian(seed + 1)
    step = np.repeat(choose_scale(weight, np.diagonal(hessian), 1, 4).astype(np.float32), 32, axis=1)

    def row_error(codes: np.ndarray) -> np.ndarray:
        e = weight - codes * step
        return np.einsum("ok,kj,oj->o", e, hessian, e)

    (codes,) = gptq_codes([RoundingProblem(weight, step, -8, 7)], hessian, 0.01)
    assert np.all(row_error(codes) <= row_error(round_to_nearest(weight, step, -8, 7)) * (1 + 1e-5))
    assert codes.min() >= -8 and codes.max() <= 7


def test_rounding_forms_together_or_apart_gives_the_same_codes() -> None:
    hessian = random_hessian(1)
    problems = []
    for seed, bits in ((1, 4), (2, 8)):
        weight = random_weight(seed)
        precision = INT4 if bits == 4 else INT8
        step = np.repeat(choose_scale(weight, np.ones(32), 2, bits).astype(np.float32), 16, axis=1)
        problems.append(RoundingProblem(weight, step, precision.quant_min, precision.quant_max))
    together = gptq_codes(problems, hessian, 0.01)
    apart = [gptq_codes([p], hessian, 0.01)[0] for p in problems]
    for one, other in zip(together, apart, strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_factor_inverts_the_damped_hessian_and_survives_dead_columns() -> None:
    hessian = random_hessian(7)
    hessian[5] = hessian[:, 5] = 0
    factor = gptq_factor(hessian, 0.01).astype(np.float64)
    assert np.allclose(factor, np.triu(factor))
    mean = np.mean(np.diagonal(hessian))
    damped = hessian + 0.01 * mean * np.eye(32)
    damped[5, 5] = 1.01 * mean
    np.testing.assert_allclose(factor.T @ factor @ damped, np.eye(32), atol=2e-4)


def test_dequantize_repeats_each_scale_over_its_block() -> None:
    codes = np.arange(-4, 4, dtype=np.int8).reshape(1, 8)
    matrix = QuantizedMatrix(codes, np.array([[0.5, 2.0]], np.float16))
    np.testing.assert_array_equal(matrix.dequantize(), [[-2, -1.5, -1, -0.5, 0, 2, 4, 6]])


@pytest.mark.parametrize("bits", [4, 8])
def test_huge_and_tiny_weights_keep_finite_positive_scales(bits: int) -> None:
    weight = np.array([[1e6, -1e6], [1e-9, 2e-9]], np.float32)
    scale = choose_scale(weight, np.ones(2), 1, bits)
    assert np.all(np.isfinite(scale)) and np.all(scale > 0)
