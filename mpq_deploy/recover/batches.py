"""Calls to learn from, drawn from trajectories, mostly at the timesteps of largest error."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mpq_deploy.calls.recorded import RecordedCalls
from mpq_deploy.models.spec import Array, DenoiserSpec
from mpq_deploy.recover.training_trajectories import Trajectories

# Share of the draws that go to all timesteps alike, so that none is forgotten.
UNIFORM_SHARE = 0.25


@dataclass(frozen=True)
class Batch:
    """M calls: ``feeds``, the graph's inputs, and ``expected`` [M, ...], the float model's outputs.

    ``steps`` int64 [M]: positions of their ``timesteps``. ``earlier``: the inputs of the same
    trajectories one sampler step before (of the first step: the step itself).
    """

    steps: Array
    timesteps: Array
    feeds: dict[str, Array]
    expected: Array
    earlier: dict[str, Array]


class Batches:
    """Draws batches: of one timestep (or call) where the timestep (or a condition) is not batched."""

    def __init__(self, spec: DenoiserSpec, size: int) -> None:
        self._spec = spec
        self.size = size if all(item.batched for item in spec.conditions) else 1

    def draw(self, pool: Trajectories, shares: Array, rng: np.random.Generator) -> Batch:
        """Return a batch with timesteps by ``shares`` [K] and any of the pool's calls."""
        steps = drawn_timesteps(shares, self.size, rng)
        if self._spec.timestep is not None and not self._spec.timestep.batched:
            steps = np.full(self.size, rng.choice(steps))
        return self.of(pool, steps, rng.integers(pool.calls.count, size=self.size))

    def of(self, pool: Trajectories, steps: Array, calls: Array) -> Batch:
        """Return the batch of the given positions of timesteps and calls, int64 [M] each."""
        return Batch(
            steps,
            pool.calls.timesteps[steps],
            self._feeds(pool, steps, calls),
            pool.outputs[steps, calls],
            self._feeds(pool, np.maximum(steps - 1, 0), calls),
        )

    def _feeds(self, pool: Trajectories, steps: Array, calls: Array) -> dict[str, Array]:
        return RecordedCalls(pool.calls, self._spec).feed(steps, calls)


def timestep_shares(errors: Array, mode: str) -> Array:
    """Return the probability of each timestep, float64 [K], of sum 1.

    ``errors`` [K]: the plan's measured NMSE at each. "sensitivity" draws a timestep in proportion
    to its root, mixed with equal shares: with each draw weighted by ``draw_weights`` the loss stays
    the mean over timesteps, and its gradient, whose size goes with the root of the error, has about
    the minimum variance (our choice).
    """
    count = len(errors)
    equal = np.full(count, 1.0 / count)
    if mode == "uniform" or not np.any(errors > 0):
        return equal
    roots = np.sqrt(np.maximum(errors, 0.0))
    return np.asarray(UNIFORM_SHARE * equal + (1 - UNIFORM_SHARE) * roots / roots.sum())


def draw_weights(shares: Array) -> Array:
    """Return the weight of a draw of each timestep [K]: its expectation is the mean over all."""
    return np.asarray(1.0 / (len(shares) * shares))


def drawn_timesteps(shares: Array, count: int, rng: np.random.Generator) -> Array:
    """Draw ``count`` positions of timesteps, int64, stratified: one in each equal part of
    ``shares``.
    """
    points = (np.arange(count) + rng.random(count)) / count
    return np.minimum(np.searchsorted(np.cumsum(shares), points), len(shares) - 1).astype(np.int64)
