"""Factors of an input's channels: which exponent promises the smallest error, against rounding itself."""

from __future__ import annotations

import numpy as np
import pytest

from mpq_deploy.formats.branches.prescaled import TENTHS, exponent_order, scale_factors


@pytest.mark.parametrize("spread", [0.2, 1.0, 2.0])
@pytest.mark.parametrize("seed", range(4))
def test_the_order_of_exponents_is_that_of_the_errors_of_rounding(spread: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.uniform(-1, 1, (4000, 48)) * np.exp(spread * rng.standard_normal(48))
    # Every channel's largest weight is what stands for the channel.
    weight = rng.choice([-1.0, 1.0], (16, 48)) * np.exp(spread * rng.standard_normal(48))
    amax, largest = np.abs(x).max(axis=0), np.abs(weight).max(axis=0)
    factors = np.array([scale_factors(largest, amax, tenths / 10) for tenths in TENTHS])
    errors = []
    for row in factors.astype(np.float64):
        step = (amax * row).max() / 127
        rounded = np.rint(x * row / step) * step / row
        errors.append(np.mean(((rounded - x) @ weight.T) ** 2))
    order = exponent_order(largest, amax[None], factors)
    ranked = np.array(errors)[order]
    assert sorted(order) == list(range(len(TENTHS)))
    assert np.all(np.diff(ranked) > -0.15 * ranked[:-1])
