"""Scales, rounding and GPTQ: relations that must hold for any weight, and independent references."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpq_deploy.formats.interfaces import INT4, INT8
from mpq_deploy.rounding import quantizers
from mpq_deploy.rounding.quantizers import (
    Grid,
    QuantizedMatrix,
    channel_first,
    choose_multiple_scale,
    choose_scale,
    compensate,
    damped,
    gptq_codes,
    gptq_factor,
    position_first,
    refine_rounding,
    round_to_nearest,
    seen_error,
)


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
@given(
    st.integers(0, 10_000),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([4, 8]),
    st.floats(1e-3, 30.0),
)
def test_the_chosen_scale_is_never_worse_than_the_plain_ones(
    seed: int, blocks: int, bits: int, spread: float
) -> None:
    weight = random_weight(seed, spread=spread)
    importance = np.random.default_rng(seed + 1).uniform(0.1, 2, 32)
    precision = INT4 if bits == 4 else INT8
    scale = choose_scale(weight, importance, blocks, precision)
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


def best_of_all_ratios(weight: np.ndarray, importance: np.ndarray, quant_max: int) -> np.ndarray:
    """One scale per row, of errors that are all computed: of equal ones the smallest ratio's."""
    found = []
    for row in weight:
        ratios = quantizers.CLIP_RATIOS * float(np.abs(row).max()) / quant_max
        scales = np.clip(ratios, 2.0**-17, 65504).astype(np.float16)
        low = -8 if quant_max == 7 else -quant_max
        fake = [clip_and_round(row, s.astype(np.float32), low, quant_max) for s in scales]
        errors = [(importance * np.square(row - one)).sum(dtype=np.float32) for one in fake]
        found.append(scales[np.argmin(errors)])
    return np.array(found)[:, None]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([7, 127]), st.sampled_from([0.5, 4.0, 100.0]))
def test_ratios_that_are_left_out_could_not_have_won(
    seed: int, quant_max: int, spread: float
) -> None:
    """Rows of outliers, of one sign, of few values and of levels that a scale hits exactly."""
    weight = random_weight(seed, rows=8, columns=64, spread=spread)
    weight[1], weight[2] = np.abs(weight[1]), -np.abs(weight[2])
    weight[3, 2:], weight[4] = 0, np.rint(weight[4] / spread)
    weight[5, 0], weight[6, :2] = 40 * spread, (30 * spread, -31 * spread)
    weight[:, -1] += 1e-3
    importance = np.random.default_rng(seed).lognormal(0, 1.5, 64).astype(np.float32)
    found = choose_scale(weight, importance, 1, INT8 if quant_max == 127 else INT4)
    np.testing.assert_array_equal(found, best_of_all_ratios(weight, importance, quant_max))


@pytest.mark.parametrize(
    "piece_bytes", [1, 3 * 4 * 32, 1 << 30], ids=["a row", "three rows", "all rows"]
)
def test_scales_do_not_depend_on_the_rows_searched_together(
    piece_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, importance = random_weight(3, rows=7), np.random.default_rng(4).uniform(0.1, 2, 32)
    block_scale = choose_scale(weight, importance, 2, INT4)
    multiples = choose_multiple_scale(weight, importance, block_scale)
    monkeypatch.setattr(quantizers, "PIECE_BYTES", piece_bytes)
    np.testing.assert_array_equal(choose_scale(weight, importance, 2, INT4), block_scale)
    for again, before in zip(
        choose_multiple_scale(weight, importance, block_scale), multiples, strict=True
    ):
        np.testing.assert_array_equal(again, before)


def test_a_zero_channel_quantizes_to_zeros_with_a_valid_scale() -> None:
    weight = random_weight(0)
    weight[2] = 0
    for bits in (4, 8):
        scale = choose_scale(weight, np.ones(32), 2, INT4 if bits == 4 else INT8)
        assert np.all(scale > 0)
        codes = round_to_nearest(weight, np.repeat(scale.astype(np.float32), 16, axis=1), -8, 7)
        assert not codes[2].any()


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10_000), st.sampled_from([1, 2, 4, 8]), st.sampled_from([1e-4, 1e-3, 0.1, 5.0])
)
def test_requantizing_the_stored_weight_to_int8_is_exact(
    seed: int, blocks: int, spread: float
) -> None:
    weight = random_weight(seed, spread=spread)
    weight[0] *= 40  # channels of very different size
    free = choose_scale(weight, np.ones(32), blocks, INT4)
    scale, channel = choose_multiple_scale(weight, np.ones(32), free)
    for code in range(-8, 8):
        # What TensorRT does: DequantizeLinear in FP16, then QuantizeLinear to INT8.
        stored = (np.float16(code) * scale).astype(np.float32)
        requantized = np.rint(stored / channel.astype(np.float32)[:, None])
        matrix = QuantizedMatrix(np.full(weight.shape, code, np.int8), scale, channel)
        expected = matrix.effective_scale() * code
        assert np.abs(requantized).max() <= 127
        np.testing.assert_allclose(
            requantized * channel.astype(np.float32)[:, None], expected, rtol=1e-6, atol=0
        )


def by_column(step: np.ndarray, quant_min: int = -8, quant_max: int = 7) -> Grid:
    """Return the grid of steps [O, K], one for each weight."""
    return Grid(step, np.arange(step.shape[1]), quant_min, quant_max)


def naive_gptq(
    w: np.ndarray, step: np.ndarray, hessian: np.ndarray, damping: float, order: np.ndarray
) -> np.ndarray:
    """GPTQ as the paper states it: round one column, update the rest with H^-1, remove the column, repeat."""
    h = np.array(hessian, np.float64) + damping * np.diag(np.diagonal(hessian))
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
    step = np.repeat(
        choose_scale(weight, np.diagonal(hessian), 2, INT4).astype(np.float32), 16, axis=1
    )
    order = np.argsort(-np.diagonal(hessian), kind="stable")
    expected = naive_gptq(weight, step, hessian, 0.01, order)
    (codes,) = gptq_codes(weight, [by_column(step)], hessian, 0.01)
    nearest = round_to_nearest(weight, step, -8, 7)
    same_as_paper = np.all(codes == expected, axis=1)
    assert same_as_paper.sum() >= 5
    assert np.all(same_as_paper | np.all(codes == nearest, axis=1))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000))
def test_gptq_is_never_worse_than_nearest_in_any_row(seed: int) -> None:
    weight, hessian = random_weight(seed), random_hessian(seed + 1)
    step = np.repeat(
        choose_scale(weight, np.diagonal(hessian), 1, INT4).astype(np.float32), 32, axis=1
    )

    def row_error(codes: np.ndarray) -> np.ndarray:
        e = weight - codes * step
        return np.einsum("ok,kj,oj->o", e, damped(hessian, 0.01), e)

    (codes,) = gptq_codes(weight, [by_column(step)], hessian, 0.01)
    assert np.all(row_error(codes) <= row_error(round_to_nearest(weight, step, -8, 7)) * (1 + 1e-5))
    assert codes.min() >= -8 and codes.max() <= 7


def test_rounding_forms_together_or_apart_gives_the_same_codes() -> None:
    weight, hessian = random_weight(1), random_hessian(1)
    grids = []
    for blocks, precision in ((2, INT4), (4, INT4), (1, INT8)):
        step = choose_scale(weight, np.ones(32), blocks, precision).astype(np.float32)
        grids.append(
            Grid(
                step,
                np.repeat(np.arange(blocks), 32 // blocks),
                precision.quant_min,
                precision.quant_max,
            )
        )
    together = gptq_codes(weight, grids, hessian, 0.01)
    apart = [gptq_codes(weight, [grid], hessian, 0.01)[0] for grid in grids]
    for one, other in zip(together, apart, strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_factor_makes_the_damped_hessian_diagonal_and_survives_dead_columns() -> None:
    hessian = random_hessian(7)
    hessian[5] = hessian[:, 5] = 0
    factor, pivots = gptq_factor(hessian, 0.01)
    factor = factor.astype(np.float64)
    assert np.allclose(factor, np.triu(factor, 1))
    raised = hessian + 0.01 * np.diag(np.diagonal(hessian))
    raised[5, 5] = np.mean(np.diagonal(hessian)[np.diagonal(hessian) > 0])
    inverse = np.linalg.inv(np.eye(32) + factor)
    rest = inverse @ raised @ inverse.T
    np.testing.assert_allclose(rest, np.diag(pivots), atol=2e-5)
    assert np.all(pivots > 0)


@pytest.mark.parametrize("columns", [1, 255, 256, 257, 700])
@pytest.mark.parametrize(("damping", "accuracy"), [(0.05, 1e-4), (1e-4, 1e-8)])
def test_the_factor_is_that_of_a_whole_cholesky(
    columns: int, damping: float, accuracy: float
) -> None:
    """Also where columns are few chunks or many, their inputs differ by orders, and correlations are strong."""
    rng = np.random.default_rng(columns)
    shared = rng.standard_normal((2000, 3)) @ rng.standard_normal((3, columns))
    inputs = (shared + 0.1 * rng.standard_normal((2000, columns))) * rng.lognormal(0, 3, columns)
    hessian = (inputs.T @ inputs / 2000).astype(np.float32)
    factor, pivots = gptq_factor(hessian, damping)
    lower = np.linalg.cholesky(damped(hessian, damping)[::-1, ::-1])
    np.testing.assert_allclose(pivots, np.square(np.diagonal(lower))[::-1], rtol=accuracy)
    # Errors are those of values of like size: each column's input over its own.
    sizes = np.sqrt(np.diagonal(hessian)).astype(np.float64)
    expected = (lower / np.diagonal(lower))[::-1, ::-1] - np.eye(columns)
    found = factor * sizes[None] / sizes[:, None]
    np.testing.assert_allclose(
        found, expected * sizes[None] / sizes[:, None], atol=max(accuracy, 1e-6)
    )


def test_errors_are_summed_as_the_damped_hessian_sees_them() -> None:
    hessian, errors = (
        random_hessian(3),
        np.random.default_rng(4).standard_normal((32, 5)).astype(np.float32),
    )
    expected = np.einsum("ko,kj,jo->o", errors, damped(hessian, 0.02), errors)
    factor, pivots = gptq_factor(hessian, 0.02)
    np.testing.assert_allclose(seen_error(errors, factor, pivots, chunk=10), expected, rtol=1e-5)
    remaining = np.ascontiguousarray(random_weight(5).T)
    found = compensate(
        remaining, factor, pivots, lambda i, wanted: np.rint(4 * wanted) / 4, chunk=10
    )
    np.testing.assert_allclose(found, seen_error(remaining, factor, pivots), rtol=1e-4)


def test_an_error_that_is_large_enough_early_is_not_summed_on() -> None:
    errors = np.random.default_rng(4).standard_normal((32, 5)).astype(np.float32)
    factor, pivots = gptq_factor(random_hessian(3), 0.02)
    whole = seen_error(errors, factor, pivots, chunk=8)
    for share in (0.01, 0.5, 0.99, 1.0, 1.5):
        found = seen_error(errors, factor, pivots, share * whole, chunk=8)
        partial = found < whole * (1 - 1e-5)
        assert np.all(found <= whole * (1 + 1e-5)) and np.all(
            found[partial] >= share * whole[partial]
        )
        assert partial.any() == (share < 0.99)
        if share != 1.0:
            np.testing.assert_array_equal(share * whole > found, share * whole > whole)


def test_dequantize_repeats_each_scale_over_its_block() -> None:
    codes = np.arange(-4, 4, dtype=np.int8).reshape(1, 8)
    matrix = QuantizedMatrix(codes, np.array([[0.5, 2.0]], np.float16))
    np.testing.assert_array_equal(matrix.dequantize(), [[-2, -1.5, -1, -0.5, 0, 2, 4, 6]])


@pytest.mark.parametrize("bits", [4, 8])
def test_huge_and_tiny_weights_keep_finite_positive_scales(bits: int) -> None:
    weight = np.array([[1e6, -1e6], [1e-9, 2e-9]], np.float32)
    scale = choose_scale(weight, np.ones(2), 1, INT4 if bits == 4 else INT8)
    assert np.all(np.isfinite(scale)) and np.all(scale > 0)


def damped_error(
    w: np.ndarray, codes: np.ndarray, scale: np.ndarray, hessian: np.ndarray, damping: float
) -> np.ndarray:
    """e (H + damping diag(H)) e^T per row, in float64."""
    h = hessian.astype(np.float64) + damping * np.diag(np.diagonal(hessian))
    e = w - codes * np.repeat(scale.astype(np.float64), w.shape[1] // scale.shape[1], axis=1)
    return np.asarray(np.einsum("ok,kj,oj->o", e, h, e))


def nearest_form(w: np.ndarray, blocks: int) -> tuple[np.ndarray, np.ndarray]:
    scale = choose_scale(w, np.ones(w.shape[1], np.float32), blocks, INT4)
    step = np.repeat(scale.astype(np.float32), w.shape[1] // blocks, axis=1)
    return round_to_nearest(w, step, INT4.quant_min, INT4.quant_max), scale


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([1, 2, 4]), st.integers(1, 3))
def test_refining_never_makes_a_row_worse_and_ends_where_no_single_code_helps(
    seed: int, blocks: int, rounds: int
) -> None:
    w, hessian = random_weight(seed), random_hessian(seed + 1)
    codes, scale = nearest_form(w, blocks)
    [(better, fitted)] = refine_rounding(w, [(codes, scale)], [hessian], 0.01, rounds)
    before, after = (
        damped_error(w, c, s, hessian, 0.01) for c, s in ((codes, scale), (better, fitted))
    )
    assert np.all(after <= before * (1 + 1e-4) + 1e-9)
    assert np.any(after < before)
    # Many rounds with the scales as they are end where no single code can be moved to advantage.
    [(last, kept)] = refine_rounding(w, [(codes, scale)], [hessian], 0.01, 30)
    lowest = damped_error(w, last, kept, hessian, 0.01)
    for column in range(w.shape[1]):
        for move in (-1, 1):
            moved = last.copy()
            moved[:, column] = np.clip(moved[:, column] + move, INT4.quant_min, INT4.quant_max)
            assert np.all(damped_error(w, moved, kept, hessian, 0.01) >= lowest * (1 - 1e-3))


def test_fitted_scales_are_the_least_squares_solution() -> None:
    w, hessian = random_weight(3), random_hessian(4)
    codes, scale = nearest_form(w, 1)
    [(moved, fitted)] = refine_rounding(w, [(codes, scale)], [hessian], 0.01, 1)
    h = hessian.astype(np.float64) + 0.01 * np.diag(np.diagonal(hessian))
    root = np.linalg.cholesky(h).T  # e H e^T = |root e|^2
    for row in range(len(w)):
        basis = (root @ moved[row].astype(np.float64))[:, None]
        expected = np.linalg.lstsq(basis, root @ w[row].astype(np.float64), rcond=None)[0]
        np.testing.assert_allclose(fitted[row].astype(np.float64), expected, rtol=1e-3)


@pytest.mark.parametrize("together", [16, 128], ids=["a block at a time", "all columns at a time"])
def test_refining_by_diagonal_blocks_equals_the_whole_block_diagonal_matrix(
    together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantizers, "REFINED_TOGETHER", together)
    w = random_weight(5, columns=48)
    whole = np.zeros((48, 48), np.float32)
    # One scale's columns lie across the border of the two blocks.
    parts = [random_hessian(6, 20), random_hessian(7, 28)]
    whole[:20, :20], whole[20:, 20:] = parts
    codes, scale = nearest_form(w, 3)
    undamped = 1e-12
    apart = refine_rounding(w, [(codes, scale)], parts, undamped, 2)[0]
    joined = refine_rounding(w, [(codes, scale)], [whole], undamped, 2)[0]
    np.testing.assert_array_equal(apart[0], joined[0])
    np.testing.assert_allclose(
        apart[1].astype(np.float32), joined[1].astype(np.float32), rtol=2e-3
    )  # one FP16 ulp


def test_refining_forms_together_or_apart_gives_the_same() -> None:
    w, hessian = random_weight(8), random_hessian(9)
    forms = [nearest_form(w, blocks) for blocks in (1, 2, 4)]
    together = refine_rounding(w, forms, [hessian], 0.02, 2)
    for form, refined in zip(forms, together, strict=True):
        [alone] = refine_rounding(w, [form], [hessian], 0.02, 2)
        for one, other in zip(refined, alone, strict=True):
            np.testing.assert_array_equal(one, other)


def test_rounding_hardly_depends_on_how_large_a_column_s_input_is() -> None:
    """Scale inputs up and weights down by powers of two: the same function, so the error is the same."""
    w, hessian = random_weight(10), random_hessian(11)
    factor = 2.0 ** np.random.default_rng(12).integers(-5, 6, 32).astype(np.float32)
    step = np.full_like(w, 0.02)
    plain = gptq_codes(w, [by_column(step)], hessian, 0.05)[0]
    scaled = gptq_codes(
        w / factor, [by_column(step / factor)], hessian * factor[:, None] * factor[None], 0.05
    )[0]
    # Columns are visited by falling diagonal, so the order differs, and with it the last bit of some codes.
    error = [np.einsum("ok,kj,oj->", w - c * step, hessian, w - c * step) for c in (plain, scaled)]
    assert error[1] == pytest.approx(error[0], rel=0.15)


def naive_refined(
    w: np.ndarray, codes: np.ndarray, scale: np.ndarray, h: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """One round as its docstring states it, row by row and in float64: all columns together."""
    codes, scale, block = (
        codes.astype(np.float64),
        scale.astype(np.float64),
        w.shape[1] // scale.shape[1],
    )

    def fit(row: int) -> None:
        for b in range(scale.shape[1]):
            part = np.zeros(w.shape[1])
            part[b * block : (b + 1) * block] = codes[row, b * block : (b + 1) * block]
            error = w[row] - codes[row] * np.repeat(scale[row], block)
            best = scale[row, b] + part @ h @ error / max(part @ h @ part, 1e-30)
            rounded = float(np.float16(best))
            change = rounded - scale[row, b]
            after = error - part * change
            if 0.5 < best / scale[row, b] < 2 and after @ h @ after < error @ h @ error:
                scale[row, b] = rounded

    for row in range(len(w)):
        fit(row)
        step = np.repeat(scale[row], block)
        for k in range(w.shape[1]):
            error = w[row] - codes[row] * step
            codes[row, k] = np.clip(
                np.rint(codes[row, k] + h[k] @ error / (h[k, k] * step[k])), -8, 7
            )
        fit(row)
    return codes, scale


def test_refining_is_what_it_says() -> None:
    w, hessian = random_weight(13, rows=7), random_hessian(14)
    codes, scale = nearest_form(w, 4)
    [(found, fitted)] = refine_rounding(w, [(codes, scale)], [hessian], 0.02, 1)
    damped = hessian + 0.02 * np.diag(np.diagonal(hessian))
    expected, wanted = naive_refined(w, codes, scale, damped)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(fitted.astype(np.float64), wanted, rtol=1e-3)  # one FP16 ulp


def test_parts_of_a_block_diagonal_matrix_are_those_of_the_dense_one() -> None:
    blocks = [
        random_hessian(seed, size).astype(np.float32) for seed, size in ((1, 5), (2, 9), (3, 4))
    ]
    dense, start = np.zeros((18, 18), np.float32), 0
    for block in blocks:
        dense[start : start + len(block), start : start + len(block)] = block
        start += len(block)
    matrix, rows = (
        quantizers.BlockDiagonal(blocks),
        np.random.default_rng(0).random((18, 3), np.float32),
    )
    for first in range(18):
        for last in range(first + 1, 19):
            for columns in (np.arange(first, last), np.arange(18)[::-2][first:last]):
                square = dense[np.ix_(columns, columns)]
                np.testing.assert_array_equal(matrix.square(columns), square)
                np.testing.assert_allclose(
                    matrix.times(columns, rows), dense[columns] @ rows, rtol=1e-5, atol=1e-5
                )


@pytest.mark.parametrize("parts", [1, 3])
def test_refining_along_positions_is_refining_the_reordered_weight(parts: int) -> None:
    taps, block = 4, 8
    w = random_weight(21, rows=5)
    order = position_first(np.arange(w.shape[1])[None], taps)[0]
    hessian = random_hessian(22, w.shape[1])
    edges = np.array_split(np.arange(w.shape[1]), parts)
    moments = [hessian[np.ix_(edge, edge)] for edge in edges]
    whole = np.zeros_like(hessian)
    for edge in edges:
        whole[np.ix_(edge, edge)] = hessian[np.ix_(edge, edge)]
    codes, scale = nearest_form(w[:, order], block)
    [expected] = refine_rounding(
        w[:, order], [(codes, scale)], [whole[np.ix_(order, order)]], 0.02, 2
    )
    unordered = np.empty_like(codes)
    unordered[:, order] = codes
    [found] = refine_rounding(w, [(unordered, scale)], moments, 0.02, 2, taps)
    np.testing.assert_array_equal(found[0][:, order], expected[0])
    np.testing.assert_array_equal(found[1], expected[1])


def test_blocks_along_positions_have_one_scale_for_channels_of_a_position() -> None:
    taps, channels = 4, 6
    codes = np.ones((2, channels * taps), np.int8)
    scale = np.arange(1, 1 + 2 * 2 * taps).reshape(2, -1).astype(np.float16)
    matrix = QuantizedMatrix(codes, scale, None, taps)
    held = matrix.dequantize().reshape(2, channels, taps)
    for position in range(taps):
        half = channels // 2
        assert (held[:, :half, position] == scale[:, None, 2 * position]).all()
        assert (held[:, half:, position] == scale[:, None, 2 * position + 1]).all()
    again = QuantizedMatrix.of(matrix.arrays())
    assert again.taps == taps and "taps" not in QuantizedMatrix(codes, scale).arrays()
    np.testing.assert_array_equal(again.dequantize(), matrix.dequantize())
    np.testing.assert_array_equal(
        channel_first(position_first(codes * held.reshape(2, -1), taps), taps), held.reshape(2, -1)
    )
    assert (
        matrix.take(np.array([1])).taps
        == matrix.with_rows(np.array([1]), matrix.take(np.array([0]))).taps
        == taps
    )
