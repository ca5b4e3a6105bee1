"""At which timesteps to train: where the plan's measured error is largest."""

from __future__ import annotations

import numpy as np

from mpq_deploy.models.spec import Array

# Share of the draws that go to all timesteps alike, so that none is forgotten.
UNIFORM_SHARE = 0.25


def timestep_shares(errors: Array, mode: str) -> Array:
    """Return the probability of each timestep, float64 [K], of sum 1.

    ``errors`` [K]: the plan's measured NMSE at each. "sensitivity" draws a timestep in proportion to its root, mixed
    with equal shares: with each draw weighed by ``draw_weights`` the loss stays the mean over timesteps, and its
    gradient, whose size goes with the root of the error, has about the least variance (our choice).
    """
    count = len(errors)
    equal = np.full(count, 1.0 / count)
    if mode == "uniform" or not np.any(errors > 0):
        return equal
    roots = np.sqrt(np.maximum(errors, 0.0))
    return np.asarray(UNIFORM_SHARE * equal + (1 - UNIFORM_SHARE) * roots / roots.sum())


def draw_weights(shares: Array) -> Array:
    """Return the weight of a draw of each timestep, so that the expectation is the mean over timesteps, [K]."""
    return np.asarray(1.0 / (len(shares) * shares))


def drawn_timesteps(shares: Array, count: int, rng: np.random.Generator) -> Array:
    """Draw ``count`` positions of timesteps, int64: one in each of equal stretches of the distribution (stratified)."""
    points = (np.arange(count) + rng.random(count)) / count
    return np.minimum(np.searchsorted(np.cumsum(shares), points), len(shares) - 1).astype(np.int64)
