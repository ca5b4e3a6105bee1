"""Looking several times: the intervals hold together, and clear differences need few images."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from mpq_deploy.evaluate.interval import MARGIN_DB, Difference, student_quantile
from mpq_deploy.evaluate.sequential import GROUP, groups_of, paired_difference

IMAGES, RUNS = 32, 2000


def test_groups_hold_every_image_once() -> None:
    assert groups_of(5) == [range(5)]
    assert [len(group) for group in groups_of(19)] == [8, 8, 3]
    assert [image for group in groups_of(19) for image in group] == list(range(19))


def test_the_interval_is_that_of_students_test() -> None:
    rng = np.random.default_rng(0)
    values, others = rng.normal(30, 3, (2, 11))
    found = paired_difference(values.tolist(), others.tolist(), looks=1)
    expected = stats.ttest_rel(values, others).confidence_interval(0.95)
    assert found is not None
    assert found[1:] == pytest.approx((expected.low, expected.high))
    wider = paired_difference(values.tolist(), others.tolist(), looks=4)
    expected = stats.ttest_rel(values, others).confidence_interval(1 - 0.05 / 4)
    assert wider is not None and wider[1:] == pytest.approx((expected.low, expected.high))
    assert paired_difference([1.0], [2.0], 1) is None


@pytest.mark.parametrize("freedom", [1, 2, 7, 31, 5000])
@pytest.mark.parametrize("tail", [0.2, 0.025, 0.025 / 125])
def test_quantiles_of_student(freedom: int, tail: float) -> None:
    expected = stats.t.isf(tail, freedom)
    assert student_quantile(freedom, tail) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("spread", [0.3, 3.0])
def test_looking_often_misses_the_true_difference_no_more_often_than_said(spread: float) -> None:
    """The difference is none, so that a settled comparison is an error, as is an interval without 0."""
    rng = np.random.default_rng(1)
    missed = settled = 0
    for differences in rng.normal(0, spread, (RUNS, IMAGES)):
        found = stopped(differences)[0]
        missed += not found.low <= 0 <= found.high
        settled += found.settled
    # Three standard errors of a share of 5 % above it.
    assert missed / RUNS <= 0.05 + 3 * (0.05 * 0.95 / RUNS) ** 0.5
    assert settled <= missed


@pytest.mark.parametrize(
    ("difference", "least", "most"), [(5.0, 8, 9), (0.6, 24, 32), (-5.0, 8, 9)]
)
def test_large_differences_need_the_first_images_alone(
    difference: float, least: int, most: int
) -> None:
    rng = np.random.default_rng(2)
    needed = [stopped(row)[1] for row in rng.normal(difference, 1.0, (300, IMAGES))]
    assert least <= np.mean(needed) <= most


def stopped(differences: np.ndarray[tuple[int], np.dtype[np.float64]]) -> tuple[Difference, int]:
    """Return the interval at which a comparison stops, and the images that it took."""
    groups = groups_of(IMAGES)
    for group in groups:
        found = paired_difference(
            differences[: group.stop].tolist(), [0.0] * group.stop, len(groups)
        )
        assert found is not None
        if found.settled or group.stop == IMAGES:
            return found, group.stop
    raise AssertionError


def test_a_difference_within_the_margin_settles_nothing() -> None:
    assert not Difference(0.3, 0.1, MARGIN_DB).settled
    assert Difference(1.0, MARGIN_DB + 0.01, 2.0).settled
    assert Difference(-1.0, -2.0, -MARGIN_DB - 0.01).settled
    assert GROUP == 8
