"""Bootstrap intervals: their relations, their coverage, and the figures of each image that they rest on."""

import numpy as np
import pytest

from mpq_deploy.evaluate.images import EQUAL_IMAGE_DB, psnr_db, psnr_db_each, ssim, ssim_each
from mpq_deploy.evaluate.interval import (
    error_interval,
    mean_interval,
    paired_interval,
    student_quantile,
)


def test_the_interval_repeats_and_holds_the_mean():
    values = np.random.default_rng(0).normal(40, 3, 32)
    low, high = mean_interval(values)
    assert (low, high) == mean_interval(values)
    assert values.min() < low < values.mean() < high < values.max()


def test_the_interval_is_that_of_the_normal_approximation_for_many_images():
    values = np.random.default_rng(1).normal(40, 3, 2000)
    low, high = mean_interval(values)
    half = 1.96 * values.std() / np.sqrt(len(values))
    assert (low, high) == pytest.approx(
        (values.mean() - half, values.mean() + half), abs=0.1 * half
    )


def test_more_images_make_it_narrower_and_equal_ones_a_point():
    values = np.random.default_rng(2).normal(40, 3, 400)
    widths = [np.ptp(mean_interval(values[:count])) for count in (10, 100, 400)]
    assert widths == sorted(widths, reverse=True)
    assert mean_interval([3.0] * 5) == (3.0, 3.0)


def test_it_covers_the_true_mean_as_often_as_it_says():
    rng = np.random.default_rng(3)
    ends = [mean_interval(rng.normal(0, 1, 60)) for _ in range(200)]
    assert 0.88 <= np.mean([low <= 0 <= high for low, high in ends]) <= 0.99


@pytest.mark.parametrize("values", [[], [40.0]])
def test_below_two_images_there_is_none(values):
    assert mean_interval(values) is None


def test_pairing_takes_out_what_both_have_in_common():
    rng = np.random.default_rng(4)
    hard = rng.normal(40, 8, 32)
    better = hard + 0.5 + 0.1 * rng.standard_normal(32)
    low, high = paired_interval(better, hard)
    assert 0 < low < 0.5 < high < 1
    assert np.ptp(mean_interval(better)) > 10 * (high - low)
    with pytest.raises(ValueError, match="zip"):
        paired_interval(better, hard[:-1])


def test_the_figures_of_each_image_are_those_of_the_image_alone():
    rng = np.random.default_rng(5)
    x = rng.random((4, 3, 16, 16))
    y = np.clip(x + 0.05 * rng.standard_normal(x.shape), 0, 1)
    y[2] = x[2]
    dbs, alike = psnr_db_each(x, y), ssim_each(x, y)
    for number in (0, 1, 3):
        one = slice(number, number + 1)
        assert dbs[number] == pytest.approx(psnr_db(x[one], y[one]))
        assert alike[number] == pytest.approx(ssim(x[one], y[one]))
    assert dbs[2] == pytest.approx(EQUAL_IMAGE_DB)
    assert psnr_db(x, y) == pytest.approx(dbs.mean())
    assert ssim(x, y) == pytest.approx(alike.mean())


def drawn_errors(rng, count, available=48, steps=10, probes=4):
    """Squared probes of ``count`` calls at each timestep in turn: skewed, and alike for one call at all timesteps."""
    owners = np.arange(steps * count).reshape(steps, count) % available
    hard = np.exp(rng.normal(0, 0.5, available) - 0.125)
    scale = np.geomspace(1, 20, steps)[:, None, None]
    values = scale * hard[owners][..., None] * rng.standard_normal((steps, count, probes)) ** 2
    truth = np.geomspace(1, 20, steps).mean()
    return values.reshape(steps, -1), np.repeat(owners, probes, axis=1), truth


@pytest.mark.parametrize("count", [3, 12, 24])
def test_an_error_s_interval_covers_it_as_often_as_it_says(count):
    rng, inside = np.random.default_rng(count), []
    for _ in range(400):
        values, owners, truth = drawn_errors(rng, count)
        low, high = error_interval(values, owners)
        inside.append(low <= truth <= high)
    assert {3: 0.86, 12: 0.91, 24: 0.91}[count] <= np.mean(inside) <= 0.99


def test_entries_of_one_call_are_not_taken_for_independent():
    """Copies of each call's values say nothing new: the interval stays as it is."""
    values, owners, _ = drawn_errors(np.random.default_rng(0), 12)
    again = [np.tile(one, (1, 3)) for one in (values, owners)]
    assert error_interval(*again) == pytest.approx(error_interval(values, owners))


def test_fewer_calls_make_an_error_s_interval_wider():
    rng, widths = np.random.default_rng(1), {3: [], 12: [], 48: []}
    for count, found in widths.items():
        for _ in range(20):
            found.append(np.ptp(np.log(error_interval(*drawn_errors(rng, count)[:2]))))
    means = [np.mean(found) for found in widths.values()]
    assert means[0] > 1.5 * means[1] > 1.5 * means[2]


def test_one_call_at_a_timestep_and_no_error_have_no_interval():
    values, owners, _ = drawn_errors(np.random.default_rng(2), 1)
    assert error_interval(values, owners) is None
    assert error_interval(np.zeros((2, 4)), np.arange(8).reshape(2, 4)) is None


def test_the_quantile_is_student_s():
    stats = pytest.importorskip("scipy.stats")
    for freedom in (1, 2, 3, 5, 30, 1000):
        assert student_quantile(freedom, 0.025) == pytest.approx(
            stats.t.ppf(0.975, freedom), rel=0.01
        )
