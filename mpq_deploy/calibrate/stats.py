"""Statistics of every activation that a layer reads: the result of calibration."""

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

    Channels C: axis 1 of a tensor that a Conv reads, else the last axis. ``amax``,
    ``second_moment`` (mean of x^2), ``fourth_moment`` (mean of x^4): float64 [C]. ``reservoir``
    float32 [R]: a uniform random sample of the ``count`` values. ``scale``: the INT8 scale, rounded
    to FP16. ``amax_by_timestep`` float32 [K, C]. ``timesteps`` float32 [K]: the values of the
    timestep input, empty without one.

    ``outliers`` int32 [C]: the channels in descending order of how much they stretch the range.
    ``scales_without`` float64 [S]: the scale without the first outliers, for each share in
    ``formats.branches.cols.SHARES``. For each exponent in ``formats.branches.prescaled.TENTHS``:
    ``factors`` float16 [A, C], which multiply the channels to even out their ranges, and
    ``scales_rescaled`` float64 [A], the scale with them. ``exponents`` int32 [A]: indices of the
    exponents in ascending order of the expected error of the readers' outputs. For each of
    ``SHIFT_FORMS``: ``shifts`` int16 [F, C], in codes, and ``shift_scales`` float64 [F, 2], the
    INT8 scale with them (0: no shift) and the largest magnitude over that of the largest code.
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
        """Return ``grid`` with the shift and its scale where the activation ``form`` has one."""
        row = SHIFT_FORMS.index(form) if form in SHIFT_FORMS else len(self.shifts)
        if row >= len(self.shifts) or not self.shift_scales[row, 0]:
            return grid
        scale, reach = self.shift_scales[row].tolist()
        return replace(grid, scale=scale, zeros=tuple(self.shifts[row].tolist()), reach=reach)

    def simulated(self, bits: int) -> ActivationGrid:
        """Return the simulated quantizer of ``bits`` bits (``simulated_grid``); searched once."""
        if bits not in self._searched:
            self._searched[bits] = simulated_grid(
                bits, self.reservoir, float(self.amax.max()), self.count
            )
        return self._searched[bits]

    def float_scale(self, minifloat: Minifloat) -> float:
        """Return the FP16 scale for ``minifloat`` (``scales.float_scale``); searched once."""
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
        """Write all arrays into one .npz file; the array "index" holds the tensor names as JSON."""
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
