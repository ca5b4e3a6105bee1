"""What a branch takes from a layer, against plain linear algebra."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from mpq_deploy.formats.branch_matrices import (
    beside_body,
    columns_of,
    low_rank_factors,
    promote_rows,
    row_kurtosis,
    without_columns,
)
from mpq_deploy.rounding.quantizers import QuantizedMatrix


def quantized(weight: np.ndarray, levels: int) -> QuantizedMatrix:
    scale = (np.abs(weight).max(axis=1, keepdims=True) / levels).astype(np.float16)
    return QuantizedMatrix(np.rint(weight / scale.astype(np.float32)).astype(np.int8), scale)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 30), st.integers(1, 12), st.integers(0, 1000))
def test_promoted_rows_come_from_int8_and_all_others_from_the_body(rows: int, promoted: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((rows, 8)).astype(np.float32)
    body, int8 = quantized(weight, 7), quantized(weight, 127)
    chosen = rng.permutation(rows)[: min(promoted, rows - 1)].astype(np.int32)
    whole = promote_rows(body, int8, chosen)
    expected = body.dequantize()
    expected[chosen] = int8.dequantize()[chosen]
    np.testing.assert_array_equal(whole.dequantize(), expected)
    assert len(whole.body.codes) + len(whole.promoted.codes) == rows


def test_outlier_columns_are_exact_to_fp16_and_zero_in_the_body() -> None:
    weight = np.random.default_rng(0).standard_normal((6, 4 * 9)).astype(np.float32)
    body = quantized(weight, 127)
    taken = [*range(9), *range(18, 27)]
    np.testing.assert_array_equal(columns_of(np.array([0, 2]), 9), taken)
    body.codes[:, taken] = 0
    split = beside_body(body, weight, np.array([0, 2], np.int32), 9)
    np.testing.assert_array_equal(split.dequantize()[:, taken], weight[:, taken].astype(np.float16).astype(np.float32))
    others = [k for k in range(36) if k not in taken]
    np.testing.assert_array_equal(split.dequantize()[:, others], body.dequantize()[:, others])


def test_what_is_taken_out_neither_weighs_nor_correlates_with_the_rest() -> None:
    rng = np.random.default_rng(3)
    weight = rng.standard_normal((5, 20)).astype(np.float32)
    x = rng.standard_normal((100, 20)).astype(np.float32)
    hessian = x.T @ x
    taken = np.array([1, 11, 12])
    rest, parts = without_columns(weight, [hessian[:12, :12], hessian[12:, 12:]], taken)
    without = x.copy()
    without[:, taken] = 0
    expected = without.T @ without
    np.testing.assert_allclose(parts[0], expected[:12, :12], rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(parts[1], expected[12:, 12:], rtol=1e-5, atol=1e-4)
    assert not rest[:, taken].any() and (rest != 0).sum() == 5 * 17
    assert hessian[1, 1] > 0  # the Hessian itself is shared by layers and stays


@pytest.mark.parametrize("cut", [None, 12])
def test_low_rank_factors_are_the_best_of_their_rank_in_the_output_s_error(cut: int | None) -> None:
    rng = np.random.default_rng(1)
    x = rng.standard_normal((400, 32)) * np.geomspace(0.1, 10, 32)
    error = rng.standard_normal((16, 32)).astype(np.float32)
    hessian = x.T @ x / len(x)
    if cut:  # block-diagonal moments, as of very wide layers
        hessian[:cut, cut:] = hessian[cut:, :cut] = 0
    moments = [hessian] if cut is None else [hessian[:cut, :cut], hessian[cut:, cut:]]
    down, up = low_rank_factors(error, moments, 1e-9, 4)

    def left(factors: np.ndarray) -> float:
        rest = error - factors
        return float(np.einsum("ok,kj,oj->", rest, hessian, rest))

    # Eckart-Young in the whitened space is the bound.
    root = np.linalg.cholesky(hessian)
    values = np.linalg.svd(error @ root, compute_uv=False)
    found = left(up.astype(np.float64) @ down.astype(np.float64))
    assert found == pytest.approx(float(np.sum(values[4:] ** 2)), rel=1e-3)
    u, s, vt = np.linalg.svd(error, full_matrices=False)
    assert found < left((u[:, :4] * s[:4]) @ vt[:4])


def test_kurtosis_is_pearson_s_after_prescaling_and_dead_columns_do_no_harm() -> None:
    rng = np.random.default_rng(2)
    weight = rng.standard_t(3, (10, 40)).astype(np.float32)
    amax = rng.uniform(0.1, 5, 40)
    weight[:, 3] = 0
    amax[5] = 0
    delta = np.sqrt(np.abs(weight).max(0) / np.where(amax > 0, amax, 1))
    delta[[3, 5]] = 1
    expected = stats.kurtosis(weight.astype(np.float64) / delta, axis=1, fisher=False)
    np.testing.assert_allclose(row_kurtosis(weight, amax), expected, rtol=1e-9)
    assert row_kurtosis(np.ones((2, 4), np.float32), np.ones(4))[0] == 0
