"""Recorded calls of a denoiser: saved, split, and turned into the graph's inputs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mpq_deploy.errors import InputError
from mpq_deploy.models.spec import Array, DenoiserSpec
from mpq_deploy.runtime.ort import model_feeds
from mpq_deploy.system.array_file import read_arrays

SPLIT_SEED = 3


@dataclass(frozen=True)
class CalibrationSet:
    """Calls of the denoiser recorded along float trajectories: K timesteps x N calls.

    ``samples`` float32 [K, N, *sample shape] as the denoiser gets them (after scale_model_input);
    ``timesteps`` float32 [K]; ``rows`` int64 [N], the row of conditions.npz of each call.
    """

    samples: Array
    timesteps: Array
    rows: Array

    def take(self, calls: Array) -> CalibrationSet:
        """Return the set with only the given calls, int64 [M], at every timestep."""
        return CalibrationSet(self.samples[:, calls], self.timesteps, self.rows[calls])

    def at(self, steps: Array) -> CalibrationSet:
        """Return the set at only the given positions of its timesteps, int64 [M]."""
        return CalibrationSet(self.samples[steps], self.timesteps[steps], self.rows)

    def split(self, measured: int) -> tuple[CalibrationSet, CalibrationSet]:
        """Split the calls into those to round weights on and ``measured`` others, both evenly.

        Rounding fits its own inputs (GPTQ most of all), so a loss measured on them is too small.
        Where the others would leave less than a fifth of the calls to round on, both parts are the
        whole set.
        """
        count = len(self.rows)
        if count - measured < count / 5:
            return self, self
        order = dealt(self.rows, np.random.default_rng(SPLIT_SEED).permutation(count))
        return self.take(np.sort(order[measured:])), self.take(np.sort(order[:measured]))

    def save(self, path: Path) -> None:
        """Write the set as one .npz file (no pickle)."""
        np.savez(path, samples=self.samples, timesteps=self.timesteps, rows=self.rows)

    @classmethod
    def load(cls, path: Path) -> CalibrationSet:
        """Read what ``save`` wrote."""
        data = read_arrays(path, ("samples", "timesteps", "rows"))
        read = cls(data["samples"], data["timesteps"], data["rows"])
        counts = (len(read.timesteps), len(read.rows))
        numbers = read.rows.dtype.kind in "iu" and read.timesteps.dtype.kind == "f"
        if read.samples.shape[:2] != counts or 0 in counts or not numbers or read.rows.min() < 0:
            what = f"{path} holds samples {read.samples.shape}, timesteps {read.timesteps.shape}"
            raise InputError(
                f"{what} and rows {read.rows.shape}, which do not fit.", "Calibrate again."
            )
        return read


def dealt(rows: Array, order: Array) -> Array:
    """Return ``order`` (int [N]) dealt out so that every stretch has all conditions evenly.

    Conditions differ in how hard they are: each gives its first call before any gives its second.
    """
    seen: dict[int, int] = {}
    turns = []
    for row in rows[order]:
        turns.append(seen.get(int(row), 0))
        seen[int(row)] = turns[-1] + 1
    return np.asarray(order[np.argsort(turns, kind="stable")])


@dataclass(frozen=True)
class Batch:
    """Some calls of one timestep: ``step`` indexes the timesteps, ``calls`` int64 [M] the calls."""

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
    return model_feeds(
        spec, sample, timestep, {name: values[rows] for name, values in conditions.items()}
    )


@dataclass(frozen=True)
class RecordedCalls:
    """Recorded calls of the model ``spec`` with all rows of its condition inputs."""

    recorded: CalibrationSet
    conditions: dict[str, Array]
    spec: DenoiserSpec

    def batches(
        self, size: int, steps: range | None = None, calls: range | None = None
    ) -> Iterator[Batch]:
        """Yield the calls, ``size`` of one timestep at a time, or a part of them."""
        if not all(condition.batched for condition in self.spec.conditions):
            size = 1
        chosen = np.asarray(
            calls if calls is not None else range(len(self.recorded.rows)), np.int64
        )
        for step in steps if steps is not None else range(len(self.recorded.timesteps)):
            timestep = float(self.recorded.timesteps[step])
            for start in range(0, len(chosen), size):
                picked = chosen[start : start + size]
                sample, rows = self.recorded.samples[step, picked], self.recorded.rows[picked]
                yield Batch(
                    step,
                    timestep,
                    picked,
                    feed_rows(self.spec, sample, timestep, rows, self.conditions),
                )
