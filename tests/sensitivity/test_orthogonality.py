"""ORM, importances and their weights against CKA on the features themselves, which shares no code with it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpq_deploy.errors import UsageError
from mpq_deploy.sensitivity.orthogonality import (
    dependence,
    gamma,
    importances,
    orthogonality,
    timestep_weights,
)

Array = np.ndarray[Any, Any]


def cka(a: Array, b: Array) -> float:
    """Linear CKA by its definition on features [N, d]: ||A^T B||^2 / (||A^T A|| ||B^T B||), columns centred."""
    a, b = a - a.mean(0), b - b.mean(0)
    norms = np.linalg.norm(a.T @ a) * np.linalg.norm(b.T @ b)
    return float(np.linalg.norm(a.T @ b) ** 2 / norms)


def hsic_1(a: Array, b: Array) -> float:
    """HSIC_1 by equation 5 of Song et al. 2012, on features."""
    k, m, n = a @ a.T, b @ b.T, len(a)
    np.fill_diagonal(k, 0)
    np.fill_diagonal(m, 0)
    one = np.ones(n)
    middle = (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2))
    return float((np.trace(k @ m) + middle - 2 / (n - 2) * (one @ k @ m @ one)) / (n * (n - 3)))


def debiased_cka(a: Array, b: Array) -> float:
    return hsic_1(a, b) / float(np.sqrt(hsic_1(a, a) * hsic_1(b, b)))


def features(count: int, seed: int = 0) -> list[Array]:
    """Related and unrelated features of four layers, [count, d]."""
    rng = np.random.default_rng(seed)
    common = rng.standard_normal((count, 6))
    mixed = common @ rng.standard_normal((6, 20)) + rng.standard_normal((count, 20))
    return [common + 3, mixed, rng.standard_normal((count, 40)) - 5, common[:, :2] ** 2]


def grams(rows: list[Array]) -> Array:
    return np.stack([f @ f.T for f in rows])


@pytest.mark.parametrize(("estimator", "reference"), [("biased", cka), ("debiased", debiased_cka)])
@pytest.mark.parametrize("count", [4, 8, 33])
def test_orm_is_cka_of_the_features(estimator: Any, reference: Any, count: int) -> None:
    rows = features(count)
    orm = orthogonality(dependence(grams(rows), estimator))
    expected = np.array([[reference(a, b) for b in rows] for a in rows])
    np.testing.assert_allclose(orm, np.clip(expected, -1, 1), atol=1e-9)


@pytest.mark.parametrize("estimator", ["biased", "debiased"])
@given(seed=st.integers(0, 1000), count=st.integers(5, 20))
def test_orm_knows_neither_scale_nor_rotation_nor_offset(
    estimator: Any, seed: int, count: int
) -> None:
    rows = features(count, seed)
    orm = orthogonality(dependence(grams(rows), estimator))
    assert np.array_equal(orm, orm.T) and np.array_equal(np.diagonal(orm), np.ones(4))
    assert orm.min() >= (0 if estimator == "biased" else -1) and orm.max() <= 1
    rng = np.random.default_rng(seed)
    moved = [
        factor * f @ np.linalg.qr(rng.standard_normal((f.shape[1],) * 2))[0]
        + rng.standard_normal(f.shape[1])
        for f, factor in zip(rows, (1e-3, -2, 7, 100))
    ]
    np.testing.assert_allclose(orthogonality(dependence(grams(moved), estimator)), orm, atol=1e-6)


def test_independent_features_are_orthogonal_only_without_bias() -> None:
    found = {"biased": [], "debiased": []}
    for seed in range(40):
        rng = np.random.default_rng(seed)
        pair = grams([rng.standard_normal((12, 50)), rng.standard_normal((12, 50))])
        for estimator, values in found.items():
            values.append(orthogonality(dependence(pair, estimator))[0, 1])
    assert np.mean(found["biased"]) > 0.6
    assert abs(np.mean(found["debiased"])) < 0.05


def test_dependence_of_batches_adds_up_in_any_order() -> None:
    rows = features(24)
    parts = [dependence(grams([f[i : i + 8] for f in rows]), "debiased") for i in (0, 8, 16)]
    merged = orthogonality(parts[0] + parts[1] + parts[2])
    np.testing.assert_allclose(orthogonality(parts[2] + (parts[1] + parts[0])), merged, atol=1e-12)
    chunks = [[f[i : i + 8] for f in rows] for i in (0, 8, 16)]
    top = sum(hsic_1(c[0], c[1]) for c in chunks)
    bottom = sum(hsic_1(c[0], c[0]) for c in chunks) * sum(hsic_1(c[1], c[1]) for c in chunks)
    assert merged[0, 1] == pytest.approx(top / np.sqrt(bottom), abs=1e-9)


def test_a_constant_layer_is_orthogonal_to_all() -> None:
    stack = np.concatenate([grams(features(8)), np.zeros((1, 8, 8))])
    orm = orthogonality(dependence(stack, "biased"))
    assert np.array_equal(orm[-1], [0, 0, 0, 0, 1])
    theta = importances(gamma(orm), 2.0)
    assert theta[-1] == 1 and theta[:-1].max() < 1


def test_the_debiased_estimator_refuses_three_calls() -> None:
    with pytest.raises(ValueError, match="4 calls"):
        dependence(grams(features(3)), "debiased")


def test_theta_falls_with_what_a_layer_shares() -> None:
    orm = np.array([[1, 0.9, 0.8], [0.9, 1, 0.1], [0.8, 0.1, 1]])
    assert gamma(orm) == pytest.approx([0.85, 0.5, 0.45])
    theta = importances(gamma(orm), 3.0)
    assert theta == pytest.approx(np.exp([-2.55, -1.5, -1.35]))
    assert theta[0] < theta[1] < theta[2]
    assert importances(gamma(orm), 0.0) == pytest.approx([1, 1, 1])
    later = importances(gamma(orm), 3.0, "later")
    assert later == pytest.approx([theta.mean(), theta[1:].mean(), theta[2]])


def test_a_single_layer_has_importance_one() -> None:
    assert importances(gamma(np.ones((1, 1))), 5.0) == [1.0]


def test_a_beta_under_which_all_vanishes_is_refused_with_its_value() -> None:
    with pytest.raises(UsageError, match=r"beta 1e\+06"):
        importances(np.array([0.5, 0.6]), 1e6)


def test_both_readings_of_the_timesteps() -> None:
    even = np.full(5, 0.2)
    assert timestep_weights(even, "mean", 3.0) == pytest.approx(even)
    expected = np.exp(3.0 * np.arange(5) / 5)
    assert timestep_weights(even, "exponential", 3.0) == pytest.approx(expected / expected.sum())
    assert timestep_weights(even, "exponential", 0.0) == pytest.approx(even)
    # The later timesteps, nearer to the image, count for more; a negative eta turns that round.
    assert np.all(np.diff(timestep_weights(even, "exponential", 1.0)) > 0)
    assert np.all(np.diff(timestep_weights(even, "exponential", -1.0)) < 0)
    assert timestep_weights(np.array([3.0, 1.0]), "mean", 0) == pytest.approx([0.75, 0.25])
    assert np.isfinite(timestep_weights(even, "exponential", 1e6)).all()
