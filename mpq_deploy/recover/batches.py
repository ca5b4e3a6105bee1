"""Training batches: calls drawn from trajectories, mostly at the timesteps of largest error."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mpq_deploy.calls.recorded import RecordedCalls
from mpq_deploy.models.spec import Array, DenoiserSpec
from mpq_deploy.recover.training_trajectories import Trajectories

# Share of the draws that is uniform over timesteps, so that every timestep is trained (our choice).
UNIFORM_SHARE = 0.25


@dataclass(frozen=True)
class Batch:
    """M calls: ``feeds``, the graph's inputs, and ``expected`` [M, ...], the float model's outputs.

    ``steps`` int64 [M]: step indices of the calls' ``timesteps``. ``earlier``: the inputs of the
    same trajectories one sampler step before (for the first step, of the same step).
    """

    steps: Array
    timesteps: Array
    feeds: dict[str, Array]
    expected: Array
    earlier: dict[str, Array]


class Batches:
    """Draws batches of at most ``size`` calls.

    A batch has one timestep where the timestep input has no batch axis, and one call where a
    condition has none.
    """

    def __init__(self, spec: DenoiserSpec, size: int) -> None:
        self._spec = spec
        self.size = size if all(item.batched for item in spec.conditions) else 1

    def draw(self, pool: Trajectories, shares: Array, rng: np.random.Generator) -> Batch:
        """Return a batch with timesteps drawn by ``shares`` [K] and calls drawn uniformly."""
        steps = drawn_timesteps(shares, self.size, rng)
        if self._spec.timestep is not None and not self._spec.timestep.batched:
            steps = np.full(self.size, rng.choice(steps))
        return self.of(pool, steps, rng.integers(pool.calls.count, size=self.size))

    def of(self, pool: Trajectories, steps: Array, calls: Array) -> Batch:
        """Return the batch of the given step indices and calls, int64 [M] each."""
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

    ``errors`` [K]: the plan's measured NMSE at each timestep. ``mode`` "uniform": equal shares.
    "sensitivity": in proportion to the root of the NMSE, mixed with equal shares. With each draw
    weighted by ``draw_weights`` the expected loss stays the mean over timesteps. The gradient is
    about proportional to the root of the error, so its variance is about minimal (our choice).
    """
    count = len(errors)
    equal = np.full(count, 1.0 / count)
    if mode == "uniform" or not np.any(errors > 0):
        return equal
    roots = np.sqrt(np.maximum(errors, 0.0))
    return np.asarray(UNIFORM_SHARE * equal + (1 - UNIFORM_SHARE) * roots / roots.sum())


def draw_weights(shares: Array) -> Array:
    """Return the weight of a draw of each timestep [K], so that the expected loss is the mean."""
    return np.asarray(1.0 / (len(shares) * shares))


def drawn_timesteps(shares: Array, count: int, rng: np.random.Generator) -> Array:
    """Draw ``count`` step indices, int64, stratified: one in each of ``count`` equal shares."""
    points = (np.arange(count) + rng.random(count)) / count
    return np.minimum(np.searchsorted(np.cumsum(shares), points), len(shares) - 1).astype(np.int64)
