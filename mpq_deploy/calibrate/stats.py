"""Statistics of every activation that a layer reads, as calibration leaves them behind."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from mpq_deploy.calibrate.scales import float_scale, simulated_grid
from mpq_deploy.formats.interfaces import ActivationGrid
from mpq_deploy.formats.minifloat import Minifloat
from mpq_deploy.formats.shifts import SHIFT_FORMS
from mpq_deploy.models.spec import Array
from mpq_deploy.system.array_file import read_arrays
from mpq_deploy.system.inputs import whole


@dataclass(frozen=True)
class ActivationStats:
    """Statistics of one activation tensor over all sampled timesteps and samples.

    Per channel (axis 1 of a tensor that a Conv reads, else the last axis): ``amax``,
    ``second_moment`` (mean of x^2), ``fourth_moment`` (mean of x^4), float64 [C]. ``reservoir``
    float32 [R]: a fixed-size uniform random sample of the values. ``scale``: the INT8 scale,
    already rounded to FP16; ``amax_by_timestep`` float32 [K, C], and ``timesteps`` float32 [K]: what
    the timestep's input was given then, empty without one. ``outliers`` int32 [C]: the channels,
    those that stretch the range most first; ``scales_without`` float64 [S]: the scale when the
    first 1, 2 ... thirty-seconds of them are left out (``formats.branches.cols.SHARES``).
    ``factors`` float16 [A, C]: by what the channels are multiplied to even out their ranges, for
    each of ``formats.branches.prescaled.TENTHS``, and ``scales_rescaled`` float64 [A]: the scale
    then; ``exponents`` int32 [A]: their positions, that of the least expected error of the readers'
    own outputs first. ``shifts`` int16 [F, C], in codes, and ``shift_scales`` float64 [F, 2], the INT8
    scale then and the largest magnitude in units of the largest code, for each of ``SHIFT_FORMS``;
    a scale of 0 for none. ``count``: the number of values behind it all.
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
    timesteps: Array
    exponents: Array
    shifts: Array = field(default_factory=lambda: np.zeros((0, 0), np.int16))
    shift_scales: Array = field(default_factory=lambda: np.zeros((0, 2)))

    def shifted(self, grid: ActivationGrid, form: str) -> ActivationGrid:
        """Return ``grid`` of a quantizer's ``form`` with its shift, where it has one."""
        row = SHIFT_FORMS.index(form) if form in SHIFT_FORMS else len(self.shifts)
        if row >= len(self.shifts) or not self.shift_scales[row, 0]:
            return grid
        scale, reach = self.shift_scales[row].tolist()
        return replace(grid, scale=scale, zeros=tuple(self.shifts[row].tolist()), reach=reach)

    def simulated(self, bits: int) -> ActivationGrid:
        """Return the quantizer of a simulated format of ``bits``, found by a search of its own."""
        if bits not in self._searched:
            self._searched[bits] = simulated_grid(
                bits, self.reservoir, float(self.amax.max()), self.count
            )
        return self._searched[bits]

    def float_scale(self, minifloat: Minifloat) -> float:
        """Return the FP16 scale of a small float of minimum expected squared error."""
        if minifloat.name not in self._float_scales:
            self._float_scales[minifloat.name] = float_scale(
                minifloat, self.reservoir, float(self.amax.max()), self.count
            )
        return self._float_scales[minifloat.name]

    @cached_property
    def _searched(self) -> dict[int, ActivationGrid]:
        return {}

    @cached_property
    def _float_scales(self) -> dict[str, float]:
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
            for item in fields(ActivationStats):
                stored = getattr(self.activations[name], item.name)
                arrays[f"{number}.{item.name}"] = np.asarray(stored)
        np.savez(path, **arrays)  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: Path) -> CalibrationStats:
        """Read what ``save`` wrote."""
        arrays = [item.name for item in fields(ActivationStats)]
        data = read_arrays(path)
        with whole(path):
            names = json.loads(str(data["index"]))
            read = {
                name: ActivationStats(
                    **{f: data[f"{i}.{f}"] for f in arrays if f not in ("scale", "count")},
                    scale=float(data[f"{i}.scale"]),
                    count=float(data[f"{i}.count"]),
                )
                for i, name in enumerate(names)
            }
        return cls(read)
