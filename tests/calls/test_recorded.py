"""Rounding and measuring must not see the same calls."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mpq_deploy.calls.recorded import CalibrationSet
from mpq_deploy.recipe import Recipe


def recorded(calls: int) -> CalibrationSet:
    samples = np.arange(2 * calls, dtype=np.float32).reshape(2, calls, 1)
    return CalibrationSet(samples, np.array([9.0, 1.0], np.float32), np.arange(calls))


@given(st.integers(2, 60), st.integers(1, 30))
def test_the_parts_share_no_call_and_lose_none(calls: int, measured: int) -> None:
    whole = recorded(calls)
    rounded_on, measured_on = whole.split(measured)
    if calls - measured < calls / 5:
        assert rounded_on is whole and measured_on is whole
        return
    assert len(measured_on.rows) == measured
    assert sorted([*rounded_on.rows, *measured_on.rows]) == list(range(calls))
    for part in (rounded_on, measured_on):
        # A call's samples and its condition stay together, at every timestep.
        np.testing.assert_array_equal(part.samples[0, :, 0], part.rows)
        np.testing.assert_array_equal(part.samples[1, :, 0], part.rows + calls)


def test_the_split_is_the_same_every_time_and_mixes_conditions() -> None:
    one, other = recorded(64).split(32), recorded(64).split(32)
    np.testing.assert_array_equal(one[0].rows, other[0].rows)
    # Conditions are dealt out in turns: no stride through the calls may pick always the same ones.
    assert {int(row) % 8 for row in one[1].rows} == set(range(8))


def test_every_condition_is_measured_equally_often() -> None:
    samples = np.zeros((2, 40, 1), np.float32)
    whole = CalibrationSet(samples, np.array([9.0, 1.0], np.float32), np.arange(40) % 8)
    for part, each in zip(whole.split(16), (3, 2), strict=True):
        np.testing.assert_array_equal(np.bincount(part.rows), [each] * 8)


def test_the_defaults_leave_calls_for_both() -> None:
    recipe = Recipe(model="emoji", budget="0.35")
    whole = recorded(recipe.calibrate.samples)
    rounded_on, measured_on = whole.split(recipe.measure.samples)
    assert not set(map(int, rounded_on.rows)) & set(map(int, measured_on.rows))
    assert len(measured_on.rows) == recipe.measure.samples
