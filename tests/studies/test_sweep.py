"""Budgets as the sweep takes them, and its table."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpq_deploy.errors import UsageError
from mpq_deploy.studies.sweep import DEFAULT_POINTS, parse_budgets, sweep_table


def test_a_range_without_step_has_even_points_including_both_ends() -> None:
    budgets = parse_budgets("0.26:0.5")
    assert len(budgets) == DEFAULT_POINTS
    assert budgets[0] == 0.26 and budgets[-1] == 0.5


@given(st.integers(1, 60), st.integers(0, 39), st.integers(1, 20))
def test_a_range_with_step_stays_within_its_ends(low: int, width: int, step: int) -> None:
    budgets = parse_budgets(f"{low / 100}:{(low + width) / 100}:{step / 100}")
    assert budgets[0] == low / 100
    assert budgets[-1] <= (low + width) / 100 + 1e-9
    assert budgets[-1] + step / 100 > (low + width) / 100 - 1e-9
    assert budgets == sorted(set(budgets))


def test_a_list_is_sorted_and_said_once() -> None:
    assert parse_budgets("0.35,0.28,0.35") == [0.28, 0.35]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "0.5:0.2",
        "0:0.5",
        "0.2:0.5:0",
        "0.2:0.5:-1",
        "1:2:3:4",
        "0.2,,0.3",
        "nan",
        "1.5",
        "0.1:1:1e-6",
    ],
)
def test_what_is_no_list_of_budgets_is_refused_with_its_text(text: str) -> None:
    with pytest.raises(UsageError):
        parse_budgets(text)


def test_the_table_tells_a_budget_that_nothing_fits_from_one_that_was_not_measured() -> None:
    measured = {"budget": 0.35, "size_ratio": 0.35, "size_bytes": 350, "predicted_nmse": 1e-6}
    result = {
        "points": [{"budget": 0.2, "smallest_feasible_bytes": 260}, measured],
        "controls": {"int8": {"size_ratio": 0.5, "measured_nmse": 1e-3, "psnr_db": 44.0}},
    }
    lines = sweep_table(result).splitlines()
    assert "260 bytes" in lines[1] and lines[2].split()[-2:] == ["-", "-"] and "44.0" in lines[3]
    assert max(map(len, lines)) <= 80
