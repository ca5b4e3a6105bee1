"""Distances against torchmetrics and SciPy, intervals against repeated draws, and what is refused."""

import numpy as np
import pytest
import scipy.linalg
import threadpoolctl
from hypothesis import given, settings
from hypothesis import strategies as st

from mpq_deploy.errors import UsageError
from mpq_deploy.evaluate.metrics import frechet
from mpq_deploy.evaluate.metrics.frechet import (
    LEAST_OF_CONDITION,
    Moments,
    Spread,
    check_count,
    extrapolated,
    frechet_distance,
    spread_to_reference,
    strata_of,
)
from mpq_deploy.evaluate.metrics.kernel import kernel_distance
from mpq_deploy.evaluate.metrics.neighbours import precision_recall

WIDTH = 6


def features(seed, count=200, shift=0.0, scale=1.0, width=WIDTH):
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((count, width)) @ np.random.default_rng(99).standard_normal(
        (width, width)
    )
    return scale * mixed + shift


def by_scipy(a, b):
    """The textbook form: a general matrix root of the product, no symmetry used."""
    first, second = (np.cov(x, rowvar=False) for x in (a, b))
    root = scipy.linalg.sqrtm(first @ second)
    apart = np.square(a.mean(axis=0) - b.mean(axis=0)).sum()
    return float(apart + np.trace(first) + np.trace(second) - 2 * np.trace(root).real)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), shift=st.floats(-2, 2), scale=st.floats(0.3, 3))
def test_the_distance_is_scipy_s(seed, shift, scale):
    a, b = features(seed), features(seed + 1, 150, shift, scale)
    found = frechet_distance(Moments.of(a), Moments.of(b))
    assert found == pytest.approx(by_scipy(a, b), rel=1e-7, abs=1e-8)
    assert frechet_distance(Moments.of(b), Moments.of(a)) == pytest.approx(found, rel=1e-9)
    assert frechet_distance(Moments.of(a), Moments.of(a)) == pytest.approx(0, abs=1e-9)


def test_the_distance_is_torchmetrics(tmp_path):
    torch = pytest.importorskip("torch")
    fid = pytest.importorskip("torchmetrics.image.fid")
    network = torch.nn.Identity()
    network.num_features = WIDTH
    metric = fid.FrechetInceptionDistance(feature=network).set_dtype(torch.float64)
    a, b = features(1), features(2, shift=0.5)
    metric.update(torch.from_numpy(a), real=True)
    metric.update(torch.from_numpy(b), real=False)
    assert frechet_distance(Moments.of(a), Moments.of(b)) == pytest.approx(
        float(metric.compute()), rel=1e-9
    )


def test_two_gaussians_by_hand():
    a = Moments(np.array([1.0, 2.0]), np.diag([4.0, 9.0]), 10)
    b = Moments(np.zeros(2), np.eye(2), 10)
    assert frechet_distance(a, b) == pytest.approx(5 + (2 - 1) ** 2 + (3 - 1) ** 2)


@pytest.mark.parametrize("against_real", [True, False], ids=["real", "float"])
def test_the_interval_has_the_spread_of_other_noise(against_real):
    """The bootstrap's standard error against that of 150 fresh pairs of sets: not narrower, and not twice as wide."""
    count = 120
    real = Moments.of(features(0, 4000)) if against_real else None

    def pair(seed):
        reference = features(seed, count)
        ours = (
            reference + 0.3 * np.random.default_rng((seed, 1)).standard_normal((count, WIDTH)) + 0.1
        )
        return ours, reference

    def increase(seed):
        ours, reference = (Moments.of(one) for one in pair(seed))
        if real is None:
            return frechet_distance(ours, reference)
        return frechet_distance(ours, real) - frechet_distance(reference, real)

    truth = np.std([increase(1000 + seed) for seed in range(150)], ddof=1)
    errors = [
        spread_to_reference(*pair(seed), [np.arange(count)], real).increase for seed in range(3)
    ]
    assert 0.85 * truth < np.mean(errors) < 2 * truth


def test_the_interval_repeats_and_holds_its_value():
    a, b = features(1), features(2)
    strata = [np.arange(len(a))]
    assert spread_to_reference(a, b, strata) == spread_to_reference(a, b, strata)
    low, high = Spread.around(3.0, 0.5)
    assert (low, high) == pytest.approx((2.02, 3.98), abs=1e-3)


def test_draws_keep_to_the_conditions():
    """Two conditions far apart: draws that mixed their shares would spread the distance, dealt-out images do not."""
    rows = np.arange(200) % 2
    ours = features(1) + 20.0 * rows[:, None]
    real = Moments.of(features(2, 2000) + 20.0 * (np.arange(2000) % 2)[:, None])
    kept = spread_to_reference(ours, ours, strata_of(rows), real).distance
    mixed = spread_to_reference(ours, ours, [np.arange(200)], real).distance
    assert kept < mixed / 3


def test_conditions_with_few_images_are_one_group():
    assert [len(group) for group in strata_of(np.arange(40) % 2)] == [20, 20]
    few = np.arange(4 * (LEAST_OF_CONDITION - 1)) % 4
    assert [len(group) for group in strata_of(few)] == [len(few)]


def test_the_extrapolation_takes_the_bias_away():
    """Both sets of one distribution: the distance of few images is far from zero, its extrapolation is not."""
    real = Moments.of(features(7, 60_000, width=20))
    found = [features(seed, 200, width=20) for seed in range(6)]
    whole = np.mean([frechet_distance(Moments.of(one), real) for one in found])
    endless = np.mean([extrapolated(one, [np.arange(200)], real) for one in found])
    assert abs(endless) < 0.3 * whole
    assert extrapolated(found[0][:30], [np.arange(30)], real) is None


@pytest.mark.parametrize(("count", "width"), [(64, 64), (2, 2)])
def test_too_few_images_say_the_minimum(count, width):
    with pytest.raises(UsageError, match=f"at least {width + 1}") as caught:
        check_count(count, width, "images", "demo")
    assert str(count) in caught.value.message
    check_count(width + 1, width, "images", "demo")


def test_kid_by_hand():
    pytest.importorskip("torchmetrics")
    a, b = features(1, 40), features(2, 50, shift=0.4)

    def kernel(x, y):
        return (x @ y.T / WIDTH + 1) ** 3

    def off_diagonal(x):
        whole = kernel(x, x)
        return (whole.sum() - np.trace(whole)) / (len(x) * (len(x) - 1))

    expected = off_diagonal(a) + off_diagonal(b[:40]) - 2 * kernel(a, b[:40]).mean()
    assert kernel_distance(a, b[:40]) == pytest.approx(expected, rel=1e-9)
    # Unequal sets are drawn from: seeded, and other draws of the process are left as they are.
    torch = pytest.importorskip("torch")
    torch.manual_seed(5)
    following = torch.rand(1)
    torch.manual_seed(5)
    assert kernel_distance(a, b) == kernel_distance(a, b)
    assert torch.rand(1) == following


def test_precision_and_recall_are_the_slow_definition(tmp_path):
    a, b = features(1, 60, shift=0.8), features(2, 45, scale=1.5)

    def covered(points, support):
        inside = 0
        for point in points:
            for i, centre in enumerate(support):
                others = np.sort(np.linalg.norm(np.delete(support, i, 0) - centre, axis=1))
                if np.linalg.norm(point - centre) <= others[2]:
                    inside += 1
                    break
        return inside / len(points)

    assert precision_recall(a, b) == pytest.approx((covered(a, b), covered(b, a)))
    assert precision_recall(a, a) == (1.0, 1.0)
    assert precision_recall(a + 1e3, b) == (0.0, 0.0)


def blas_threads():
    return {
        pool["num_threads"]
        for pool in threadpoolctl.threadpool_info()
        if pool["user_api"] == "blas"
    }


@pytest.mark.parametrize("cores", [1, 3])
def test_draws_run_side_by_side_on_one_thread_each(monkeypatch, cores):
    """BLAS threads wait for each other: 64 features took 19 s in place of 0.2 s beside other work."""
    seen, before = set(), blas_threads()
    real = Moments.of(features(3))
    a, b = features(1), features(2)
    plain = Moments.of

    def watched(found):
        seen.update(blas_threads())
        return plain(found)

    monkeypatch.setattr(Moments, "of", watched)
    monkeypatch.setattr(frechet, "DRAWS", 3)
    monkeypatch.setattr(frechet, "available_cores", lambda: cores)
    found = spread_to_reference(a, b, strata_of(np.zeros(len(a))), real)
    assert seen == {1}
    assert blas_threads() == before
    monkeypatch.setattr(frechet, "available_cores", lambda: 8)
    assert spread_to_reference(a, b, strata_of(np.zeros(len(a))), real) == found
    assert extrapolated(a, strata_of(np.zeros(len(a))), real) is not None


def test_the_smallest_network_is_not_recommended_to_itself():
    with pytest.raises(UsageError) as small:
        check_count(10, 64, "images", "demo")
    with pytest.raises(UsageError) as wide:
        check_count(10, 1280, "images", "efficientnet-lite0")
    assert small.value.hint == "Give at least 65."
    assert "demo: 64" in wide.value.hint
