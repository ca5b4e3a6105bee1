"""Paired metrics against independent references and relations."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpq_deploy.errors import ModelError
from mpq_deploy.evaluate.images import (
    EQUAL_IMAGE_DB,
    data_range,
    pooled_psnr_db,
    psnr_db,
    ssim,
    to_uint8,
    to_unit,
)
from mpq_deploy.evaluate.output_error import nmse, sqnr_db, stride_midpoints, taken_turns


def pair(seed, shape=(3, 3, 20, 24), noise=0.05):
    rng = np.random.default_rng(seed)
    x = rng.random(shape)
    return x, np.clip(x + noise * rng.standard_normal(shape), 0, 1)


def ssim_by_loops(x, y, window, sigma=1.5):
    """The definition, window by window, with two-dimensional weights."""
    radius = window // 2
    grid = np.arange(-radius, radius + 1)
    weights = np.exp(-(grid[:, None] ** 2 + grid[None, :] ** 2) / (2 * sigma**2))
    weights /= weights.sum()
    values = []
    for image_x, image_y in zip(
        x.reshape(-1, *x.shape[2:]), y.reshape(-1, *y.shape[2:]), strict=True
    ):
        for i in range(image_x.shape[0] - window + 1):
            for j in range(image_x.shape[1] - window + 1):
                a, b = (
                    image_x[i : i + window, j : j + window],
                    image_y[i : i + window, j : j + window],
                )
                ma, mb = (weights * a).sum(), (weights * b).sum()
                va, vb = (weights * (a - ma) ** 2).sum(), (weights * (b - mb) ** 2).sum()
                cov = (weights * (a - ma) * (b - mb)).sum()
                c1, c2 = 1e-4, 9e-4
                values.append(
                    (2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2))
                )
    return float(np.mean(values))


@pytest.mark.parametrize(
    ("shape", "window"), [((2, 3, 13, 15), 11), ((2, 1, 8, 9), 7), ((1, 1, 3, 3), 3)]
)
def test_ssim_agrees_with_its_definition(shape, window):
    x, y = pair(0, shape)
    assert ssim(x, y) == pytest.approx(ssim_by_loops(x, y, window), rel=1e-9)


def test_ssim_agrees_with_scikit_image():
    metrics = pytest.importorskip("skimage.metrics")
    x, y = pair(1, (2, 3, 32, 32))
    theirs = [
        metrics.structural_similarity(
            a,
            b,
            channel_axis=0,
            data_range=1.0,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        for a, b in zip(x, y, strict=True)
    ]
    assert ssim(x, y) == pytest.approx(np.mean(theirs), rel=1e-9)


def test_equal_images():
    x, _ = pair(2)
    assert psnr_db(x, x) == math.inf
    assert ssim(x, x) == pytest.approx(1.0)


def test_psnr_of_a_known_error():
    x = np.full((2, 1, 4, 4), 0.5)
    assert psnr_db(x, x + 0.01) == pytest.approx(40.0)


def test_psnr_is_the_mean_over_images_and_the_pooled_one_is_stricter():
    x, y = pair(3)
    y[0] = x[0] + 0.5 * (y[0] - x[0])
    each = [psnr_db(a[None], b[None]) for a, b in zip(x, y, strict=True)]
    assert psnr_db(x, y) == pytest.approx(np.mean(each))
    assert pooled_psnr_db(x, y) < psnr_db(x, y)
    assert pooled_psnr_db(x[:1], y[:1]) == pytest.approx(each[0])


def test_an_equal_image_among_others_keeps_the_mean_finite():
    x, y = pair(3)
    y[0] = x[0]
    rest = [psnr_db(a[None], b[None]) for a, b in zip(x[1:], y[1:], strict=True)]
    assert psnr_db(x, y) == pytest.approx((EQUAL_IMAGE_DB + sum(rest)) / len(x))


def test_more_noise_is_worse():
    scores = [(psnr_db(*pair(4, noise=n)), ssim(*pair(4, noise=n))) for n in (0.01, 0.05, 0.2)]
    assert scores == sorted(scores, reverse=True)


def test_samples_are_clipped_to_the_pixel_range():
    samples = np.array([-3.0, -1.0, 0.0, 1.0, 9.0]).reshape(1, 1, 1, 5)
    assert to_unit(samples, (-1, 1)).ravel().tolist() == [0, 0, 0.5, 1, 1]
    assert to_uint8(samples, (-1, 1)).shape == (1, 1, 5, 1)
    assert to_uint8(samples, (-1, 1)).ravel().tolist() == [0, 0, 128, 255, 255]


def test_data_range_of_a_constant_is_not_empty():
    assert data_range(np.zeros(4)) == (0.0, 1.0)
    assert data_range(np.array([-2.0, 5.0])) == (-2.0, 5.0)


def test_bad_input_is_refused():
    with pytest.raises(ModelError, match=r"\[1, 1\]"):
        to_unit(np.zeros(3), (1, 1))
    with pytest.raises(ModelError, match="shape"):
        psnr_db(np.zeros((1, 1, 4, 4)), np.zeros((1, 1, 4, 5)))


def test_nmse_is_relative_and_adds_up():
    rng = np.random.default_rng(5)
    f, e = rng.standard_normal((2, 8, 3)).astype(np.float32)
    assert nmse(f, f) == 0
    assert nmse(f, 1.1 * f) == pytest.approx(0.01, rel=1e-5)
    assert nmse(1000 * f, 1000 * (f + e)) == pytest.approx(nmse(f, f + e), rel=1e-4)
    assert sqnr_db(1e-3) == pytest.approx(30) and sqnr_db(0.0) == math.inf
    with pytest.raises(ModelError, match="zero everywhere"):
        nmse(0 * f, f)


@pytest.mark.parametrize(("steps", "count"), [(20, 10), (20, 7), (5, 5), (3, 9), (1, 1)])
def test_stride_midpoints_are_distinct_and_inside(steps, count):
    indices = stride_midpoints(steps, count)
    assert len(indices) == min(steps, count)
    assert np.all(np.diff(indices) > 0) and indices[0] >= 0 and indices[-1] < steps


@given(st.integers(1, 70), st.integers(1, 30), st.none() | st.integers(1, 80))
def test_every_call_has_its_turn_and_none_twice_at_a_timestep(available, timesteps, calls):
    turns = taken_turns(available, timesteps, calls)
    least = -(-available // timesteps)
    assert turns.shape == (
        timesteps,
        available if calls is None else min(available, max(calls, least)),
    )
    assert all(len(set(turn)) == len(turn) for turn in turns.tolist())
    assert set(turns.ravel().tolist()) == set(range(available))
