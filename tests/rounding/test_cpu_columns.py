"""The compiled loops equal the same loops in NumPy, for any number of rows and columns."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpq_deploy.models.spec import Array
from mpq_deploy.rounding.cpu_columns import (
    LANES,
    SEARCHED_LANES,
    SUMMED,
    IntegerColumns,
    move_codes,
    rounding_errors,
)

ROWS = st.sampled_from([1, 5, SEARCHED_LANES, LANES - 1, LANES, LANES + 3])


def normal(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def steps(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).uniform(0.02, 0.5, shape).astype(np.float32)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10_000),
    ROWS,
    st.integers(1, 3),
    st.sampled_from([1, 3, SUMMED, SUMMED + 1, 2 * SUMMED + 5]),
    st.sampled_from([(-8, 7), (-127, 127)]),
)
def test_errors_of_steps_are_those_of_rounding_to_each(
    seed: int, rows: int, blocks: int, size: int, limits: tuple[int, int]
) -> None:
    columns, tries = normal(seed, blocks * size, rows), steps(seed + 1, 4, blocks, rows)
    share = steps(seed + 2, blocks * size)
    found = rounding_errors(columns, share, tries, *map(np.float32, limits))
    blocked, weights = columns.reshape(blocks, size, rows), share.reshape(blocks, size, 1)
    for one, error in zip(tries, found, strict=True):
        step = one[:, None]
        missed = blocked - np.clip(np.rint(blocked / step), *limits) * step
        expected = (weights * missed.astype(np.float64) ** 2).sum(axis=1)
        np.testing.assert_allclose(error, expected, rtol=2e-5, atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), ROWS, st.sampled_from([1, 2, 5, 9, 64]))
def test_each_column_compensates_the_errors_before_it(seed: int, rows: int, count: int) -> None:
    weight, wanted, step = normal(seed, count, rows), normal(seed + 1, count, rows), steps(0, rows)
    corner = np.triu(0.1 * normal(seed + 2, count, count), 1)
    low = np.where(np.arange(rows) % 2, -8, -127).astype(np.float32)
    codes = np.full((count + 4, rows), 99, np.int8)
    every = np.broadcast_to(step, codes.shape).copy()
    errors, values = weight.copy(), wanted.copy()
    columns = IntegerColumns(every, low, -low, codes)
    columns.compensate(3, values, errors, corner)
    own = codes[3 : 3 + count]
    # Only these columns have codes.
    assert (codes[:3] == 99).all() and (codes[3 + count :] == 99).all()
    np.testing.assert_allclose(errors, weight - own * step, rtol=1e-5, atol=1e-6)
    asked = wanted + corner.T.astype(np.float64) @ errors
    np.testing.assert_allclose(values, asked - own * step, rtol=1e-4, atol=2e-5)
    # Each code is the nearest level, but for sums whose order differs.
    nearest = np.clip(asked / step, low, -low)
    assert (np.abs(nearest - own) <= 0.5 + 1e-3).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), ROWS, st.sampled_from([1, 2, 5, 9, 64]))
def test_codes_move_to_their_best_levels_one_by_one(seed: int, rows: int, count: int) -> None:
    factor = normal(seed, 2 * count, count)
    square = (factor.T @ factor / count).astype(np.float32)
    levels = np.clip(np.rint(4 * normal(seed + 1, count, rows)), -8, 7).astype(np.float32)
    step, slope = steps(seed + 2, count, rows), normal(seed + 3, count, rows)
    codes, moved = slope.copy(), np.empty_like(slope)
    move_codes(codes, moved, levels, step, square, (np.float32(-8), np.float32(7)))
    np.testing.assert_allclose(moved, (codes - levels) * step, rtol=1e-6)
    for i in range(count):
        left = slope[i] - square[i, :i].astype(np.float64) @ moved[:i]
        best = np.clip(levels[i] + left / (square[i, i] * step[i]), -8, 7)
        assert (np.abs(best - codes[i]) <= 0.5 + 1e-3).all()


@pytest.mark.parametrize("place", [0, 7, LANES - 1])
def test_a_row_is_rounded_as_if_it_were_alone(place: int) -> None:
    columns, tries, share = normal(1, 40, LANES), steps(2, 3, 2, LANES), steps(3, 40)
    limits = np.float32(-8), np.float32(7)
    together = rounding_errors(columns, share, tries, *limits)
    own = slice(place, place + 1)
    alone = rounding_errors(columns[:, own].copy(), share, tries[:, :, own].copy(), *limits)
    np.testing.assert_array_equal(together[:, :, own], alone)
