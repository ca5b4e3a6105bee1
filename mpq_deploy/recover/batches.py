"""Calls to learn from, drawn out of recorded trajectories, as the graph takes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from mpq_deploy.models.spec import Array, DenoiserSpec
from mpq_deploy.recover.training_timesteps import drawn_timesteps
from mpq_deploy.recover.training_trajectories import Trajectories
from mpq_deploy.runtime.ort import model_feeds

Tensor = Any  # torch.Tensor; torch is not followed by mypy here


@dataclass(frozen=True)
class Batch:
    """M calls: ``steps`` int64 [M], positions of their timesteps; ``feeds``, the graph's inputs; ``expected`` [M, ...],
    the float model's outputs; ``earlier``: the inputs of the same trajectories one sampler step before (of the first
    step: the step itself).
    """

    steps: Array
    timesteps: Array
    feeds: dict[str, Array]
    expected: Array
    earlier: dict[str, Array]


class Batches:
    """Draws batches. A model whose timestep (or conditions) has no batch axis gets one timestep (or call) at once."""

    def __init__(self, spec: DenoiserSpec, conditions: dict[str, Array], size: int) -> None:
        self._spec, self._conditions = spec, conditions
        self.size = size if all(item.batched for item in spec.conditions) else 1

    def draw(self, pool: Trajectories, shares: Array, rng: np.random.Generator) -> Batch:
        """Return a batch with timesteps by ``shares`` [K] and any of the pool's calls."""
        steps = drawn_timesteps(shares, self.size, rng)
        if self._spec.timestep is not None and not self._spec.timestep.batched:
            steps = np.full(self.size, rng.choice(steps))
        return self.of(pool, steps, rng.integers(len(pool.rows), size=self.size))

    def of(self, pool: Trajectories, steps: Array, calls: Array) -> Batch:
        """Return the batch of the given positions of timesteps and calls, int64 [M] each."""
        return Batch(
            steps,
            pool.timesteps[steps],
            self._feeds(pool, steps, calls),
            pool.outputs[steps, calls],
            self._feeds(pool, np.maximum(steps - 1, 0), calls),
        )

    def _feeds(self, pool: Trajectories, steps: Array, calls: Array) -> dict[str, Array]:
        rows = pool.rows[calls]
        taken = {item.name: self._conditions[item.name][rows] for item in self._spec.conditions}
        timestep: Any = pool.timesteps[steps].astype(np.float64)
        return model_feeds(self._spec, pool.inputs[steps, calls], timestep, taken)
