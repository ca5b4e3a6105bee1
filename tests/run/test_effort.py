"""Counts of an effort: ordered, within a time, and never those that a user gave."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from mpq_deploy.errors import UsageError
from mpq_deploy.recipe import Recipe, make_recipe
from mpq_deploy.run.effort import COUNTS, EFFORTS, fitted, get, open_counts

HOUR = 3600.0


def cost(each: float, fixed: float = 10.0) -> Any:
    """Seconds that grow with every count, from ``fixed`` on."""
    return lambda recipe: fixed + each * sum(get(recipe, count.setting) for count in COUNTS)


def counts(recipe: Recipe) -> list[int]:
    return [get(recipe, count.setting) for count in COUNTS]


def recipe(**values: Any) -> Recipe:
    return make_recipe(values)


@pytest.mark.parametrize("each", [0.01, 1.0, 20.0, 300.0])
def test_more_effort_never_has_fewer_of_anything(each: float) -> None:
    found = [counts(fitted(recipe(effort=effort), cost(each))[0]) for effort in EFFORTS]
    for less, more in pairwise(found):
        assert all(a <= b for a, b in zip(less, more, strict=True))


def test_a_model_that_is_quick_enough_keeps_the_usual_counts() -> None:
    found, note = fitted(recipe(), cost(1.0))
    assert counts(found) == counts(Recipe()) and note == ""
    assert found.to_yaml() == Recipe().to_yaml()


def test_quick_has_fewer_and_thorough_has_more_where_there_may_be_more() -> None:
    usual = counts(Recipe())
    quick, thorough = (
        counts(fitted(recipe(effort=e), cost(0.0))[0]) for e in ("quick", "thorough")
    )
    assert all(a <= b for a, b in zip(quick, usual)) and sum(quick) < sum(usual)
    assert all(a >= b for a, b in zip(thorough, usual)) and sum(thorough) > sum(usual)


@pytest.mark.parametrize("effort", EFFORTS)
@pytest.mark.parametrize("time", ["20min", "1h", "5h"])
def test_a_time_is_kept_and_a_longer_one_has_no_fewer(effort: str, time: str) -> None:
    seconds = cost(20.0)
    found, _ = fitted(recipe(effort=effort, time=time), seconds)
    limit = {"20min": HOUR / 3, "1h": HOUR, "5h": 5 * HOUR}[time]
    assert seconds(found) <= limit
    assert found.time is None
    longer = fitted(recipe(effort=effort, time="10h"), seconds)[0]
    assert all(a <= b for a, b in zip(counts(found), counts(longer), strict=True))
    # It is a limit, not a wish: no effort has more than without it.
    free = fitted(recipe(effort=effort), cost(0.0))[0]
    assert all(a <= b for a, b in zip(counts(found), counts(free), strict=True))


def test_standard_fits_two_hours_where_that_can_be_and_says_so() -> None:
    seconds = cost(40.0)
    assert seconds(Recipe()) > 2 * HOUR
    found, note = fitted(recipe(), seconds)
    assert seconds(found) <= 2 * HOUR and note.startswith("effort standard: calibrate.timesteps ")
    # Where it cannot be, the least counts are taken without a word of complaint.
    least = fitted(recipe(), cost(40.0, fixed=10 * HOUR))[0]
    assert [get(least, count.setting) for count in COUNTS] == [count.least for count in COUNTS]


def test_a_time_below_the_least_names_the_minimum() -> None:
    with pytest.raises(UsageError, match=r"The time '5min' is less than .* about 10 min") as caught:
        fitted(recipe(time="5min"), cost(0.1, fixed=600.0))
    assert "--time 11min" in caught.value.hint


def test_counts_that_a_user_gave_stay() -> None:
    given = {
        "calibrate": {"samples": 100, "observed": 47},
        "measure": {"probes": 3, "timesteps": 18},
        "evaluate": {"samples": 31},
    }
    for effort in EFFORTS:
        found = fitted(recipe(effort=effort, **given), cost(50.0))[0]
        for section, values in given.items():
            assert {name: get(found, f"{section}.{name}") for name in values} == values
        # What is measured must have been calibrated.
        assert found.calibrate.timesteps == 20
    # A usual count that is named is given, too.
    assert (
        fitted(recipe(effort="quick", evaluate={"samples": 32}), cost(1.0))[0].evaluate.samples
        == 32
    )


def test_a_stored_recipe_is_not_fitted_again() -> None:
    stored = fitted(recipe(effort="quick"), cost(5.0))[0]
    again = make_recipe(stored.model_dump(mode="json"))
    assert open_counts(again) == []
    assert fitted(again, cost(500.0)) == (again, "")


def test_timesteps_stay_within_the_steps() -> None:
    found = fitted(recipe(effort="quick", calibrate={"steps": 6}), cost(1.0))[0]
    assert found.calibrate.timesteps == 6


def test_scales_end_with_the_least_counts_of_all() -> None:
    assert all(count.at(2**-8) == count.least for count in COUNTS)
    assert all(count.at(1.0) == get(Recipe(), count.setting) for count in COUNTS)


def test_the_documentation_has_these_counts() -> None:
    page = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text(encoding="utf-8")
    for count in COUNTS:
        cells = [*(count.at(scale) for scale, _ in EFFORTS.values()), count.least]
        assert f"| `{count.setting}` | {' | '.join(map(str, cells))} |" in page
