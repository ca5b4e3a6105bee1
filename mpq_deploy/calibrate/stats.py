"""What calibration leaves behind: the inputs of the denoiser at K timesteps, and statistics of every activation."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from mpq_deploy.calibrate.scales import simulated_grid
from mpq_deploy.formats.interfaces import ActivationGrid
from mpq_deploy.models.spec import Array

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
        """Split the calls into those that weights are rounded on and ``measured`` others, conditions evenly in both.

        Rounding fits its own inputs (GPTQ most of all), so a loss measured on them is too small. Where the others
        would leave less than a fifth of the calls to round on, both parts are the whole set.
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
        with np.load(path, allow_pickle=False) as data:
            return cls(data["samples"], data["timesteps"], data["rows"])


def dealt(rows: Array, order: Array) -> Array:
    """Return ``order`` (positions of calls, int [N]) dealt out so that every stretch has all conditions about equally.

    Conditions differ in how hard they are: each gives its first call before any gives its second.
    """
    seen: dict[int, int] = {}
    turns = []
    for row in rows[order]:
        turns.append(seen.get(int(row), 0))
        seen[int(row)] = turns[-1] + 1
    return np.asarray(order[np.argsort(turns, kind="stable")])


@dataclass(frozen=True)
class ActivationStats:
    """Statistics of one activation tensor over all sampled timesteps and samples.

    Per channel (axis 1 of a tensor that a Conv reads, else the last axis): ``amax``, ``second_moment`` (mean of x^2),
    ``fourth_moment`` (mean of x^4), float64 [C]. ``reservoir`` float32 [R]: a fixed-size uniform random sample of
    the values. ``scale``: the INT8 scale, already rounded to FP16; ``amax_by_timestep`` float32 [K].
    ``outliers`` int32 [C]: the channels, those that stretch the range most first; ``scales_without`` float64 [S]: the
    scale when the first 1, 2 ... thirty-seconds of them are left out (``formats.branches.cols.SHARES``).
    ``factors`` float16 [A, C]: by what the channels are multiplied to even out their ranges, for each of
    ``formats.branches.prescaled.TENTHS``, and ``scales_rescaled`` float64 [A]: the scale then.
    ``count``: the number of values behind it all.
    """

    amax: Array
    second_moment: Array
    fourth_moment: Array
    reservoir: Array
    amax_by_timestep: Array
    scale: float
    outliers: Array
    scales_without: Array
    factors: Array
    scales_rescaled: Array
    count: float

    def simulated(self, bits: int) -> ActivationGrid:
        """Return the quantizer of a simulated format of ``bits``, found by a search of its own."""
        if bits not in self._searched:
            self._searched[bits] = simulated_grid(bits, self.reservoir, float(self.amax.max()), self.count)
        return self._searched[bits]

    @cached_property
    def _searched(self) -> dict[int, ActivationGrid]:
        return {}


@dataclass(frozen=True)
class CalibrationStats:
    """Statistics of every activation that a layer reads, by tensor name."""

    activations: dict[str, ActivationStats]

    def save(self, path: Path) -> None:
        """Write all arrays into one .npz file; names of tensors go into an index array."""
        names = sorted(self.activations)
        arrays: dict[str, Array] = {"index": np.array(json.dumps(names))}
        for number, name in enumerate(names):
            for field in ActivationStats.__dataclass_fields__:
                arrays[f"{number}.{field}"] = np.asarray(getattr(self.activations[name], field))
        np.savez(path, **arrays)  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: Path) -> CalibrationStats:
        """Read what ``save`` wrote."""
        fields = ActivationStats.__dataclass_fields__
        with np.load(path, allow_pickle=False) as data:
            names = json.loads(str(data["index"]))
            read = {
                name: ActivationStats(
                    **{f: data[f"{i}.{f}"] for f in fields if f not in ("scale", "count")},
                    scale=float(data[f"{i}.scale"]),
                    count=float(data[f"{i}.count"]),
                )
                for i, name in enumerate(names)
            }
        return cls(read)
