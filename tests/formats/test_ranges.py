"""Tables of ranges by timestep: what they hold at, between and beyond the calibrated timesteps."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpq_deploy.formats.interfaces import ActivationGrid
from mpq_deploy.formats.ranges import BY_TIMESTEP, ENTRIES, SMALLEST_RATIO, STATIC, RangeTable
from mpq_deploy.formats.scheme import SCHEMES, schemes_named

WIDTHS = st.floats(1e-3, 1e3, allow_nan=False)
# FP16 holds each step of a ratio to 2^-12.
ROUNDING = ENTRIES * 2.0**-12


@st.composite
def recordings(draw: st.DrawFn, most: int = ENTRIES) -> tuple[np.ndarray, np.ndarray]:
    """Timesteps 0 to 1000 or sigmas 0.01 to 80, at least a thousandth apart, in any order."""
    count = draw(st.integers(1, most))
    sigmas = draw(st.booleans())
    places = np.sort(draw(st.permutations(range(500)))[:count]) / 499
    values = 0.01 * 8000**places if sigmas else 1000 * places
    order = draw(st.permutations(range(count)))
    return values[order], np.array(draw(st.lists(WIDTHS, min_size=count, max_size=count)))


@given(recordings(), st.floats(0, 1))
def test_a_table_is_linear_between_the_calibrated_timesteps(
    recorded: tuple[np.ndarray, np.ndarray], share: float
) -> None:
    timesteps, ranges = recorded
    table = RangeTable.of(timesteps, ranges)
    order = np.argsort(timesteps)
    ratios = np.maximum(ranges / ranges.max(), SMALLEST_RATIO)[order]
    between = timesteps.min() + share * (timesteps.max() - timesteps.min())
    for timestep in (*timesteps, between, timesteps.min() - 5, timesteps.max() * 3):
        # The deployed graph has the timestep in float32.
        seen = float(np.float32(timestep))
        expected = np.interp(seen, timesteps[order], ratios)
        gap = np.diff(np.sort(timesteps)).min(initial=np.inf)
        steepest = 1e-6 * max(abs(seen), 1.0) / gap
        assert table.at(seen) == pytest.approx(expected, abs=ROUNDING + steepest)


@given(recordings(most=60))
def test_no_recorded_range_is_wider_than_the_table_says(
    recorded: tuple[np.ndarray, np.ndarray],
) -> None:
    timesteps, ranges = recorded
    table = RangeTable.of(timesteps, ranges)
    for timestep, width in zip(timesteps, ranges):
        slack = ROUNDING + 1e-4
        assert table.at(float(timestep)) >= width / ranges.max() - slack


def test_equal_timesteps_count_with_their_widest_range() -> None:
    table = RangeTable.of(np.array([10.0, 10.0, 0.0]), np.array([1.0, 4.0, 8.0]))
    assert table.at(10.0) == pytest.approx(0.5, abs=1e-3)


def test_the_ratio_is_the_same_for_arrays_and_numbers() -> None:
    table = RangeTable.of(np.array([0.0, 100.0, 900.0]), np.array([1.0, 3.0, 2.0]))
    grid = ActivationGrid(0.5, table=table)
    timesteps = np.array([0.0, 40.0, 500.0, 2000.0], np.float32)
    each = BY_TIMESTEP.ratios_at(grid, timesteps)
    np.testing.assert_allclose(each, [table.at(float(t)) for t in timesteps], atol=1e-6)
    assert BY_TIMESTEP.at(grid, 500.0).scale == pytest.approx(0.5 * table.at(500.0))
    assert STATIC.at(grid, 500.0) is grid


def test_names_say_the_range_and_a_family_is_static() -> None:
    scheme = SCHEMES["w4a8-b128-timestep+scale7"]
    assert (scheme.series, scheme.family, scheme.body.name) == (
        "w4a8",
        "w4a8",
        "w4a8-b128-timestep",
    )
    assert scheme.static == SCHEMES["w4a8-b128"]
    assert scheme.weight_form == SCHEMES["w4a8-b128+scale7"].weight_form
    assert scheme.activation_form != SCHEMES["w4a8-b128+scale7"].activation_form
    assert [s.name for s in schemes_named(["w8a8"])] == ["w8a8"]
    # Branches that read the input beside the body see it undivided.
    assert "w8a8-timestep+cols1" not in SCHEMES
    assert not [s for s in SCHEMES.values() if s.range.moves and s.activation is None]
