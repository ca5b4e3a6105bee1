"""Turn recorded calls into the arrays that the ONNX graph is fed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mpq_deploy.calibrate.stats import CalibrationSet
from mpq_deploy.models.spec import Array, DenoiserSpec
from mpq_deploy.runtime.ort import model_feeds


@dataclass(frozen=True)
class Batch:
    """Some calls of one timestep: ``step`` indexes CalibrationSet.timesteps, ``calls`` int64 [M] its calls."""

    step: int
    timestep: float
    calls: Array
    feed: dict[str, Array]


def feed_rows(
    spec: DenoiserSpec, sample: Array, timestep: float, rows: Array, conditions: dict[str, Array]
) -> dict[str, Array]:
    """Return the graph's inputs for ``sample`` [M, ...] at one timestep, by name.

    ``rows`` int64 [M] picks each call's row of the arrays in ``conditions``.
    """
    return model_feeds(spec, sample, timestep, {name: values[rows] for name, values in conditions.items()})


@dataclass(frozen=True)
class RecordedCalls:
    """Recorded calls of the model ``spec`` with all rows of its condition inputs."""

    recorded: CalibrationSet
    conditions: dict[str, Array]
    spec: DenoiserSpec

    def batches(self, size: int, steps: range | None = None, calls: range | None = None) -> Iterator[Batch]:
        """Yield the calls, ``size`` of one timestep at a time; ``steps`` and ``calls`` choose a part of them."""
        if not all(condition.batched for condition in self.spec.conditions):
            size = 1
        chosen = np.asarray(calls if calls is not None else range(len(self.recorded.rows)), np.int64)
        for step in steps if steps is not None else range(len(self.recorded.timesteps)):
            timestep = float(self.recorded.timesteps[step])
            for start in range(0, len(chosen), size):
                picked = chosen[start : start + size]
                sample, rows = self.recorded.samples[step, picked], self.recorded.rows[picked]
                yield Batch(step, timestep, picked, feed_rows(self.spec, sample, timestep, rows, self.conditions))
