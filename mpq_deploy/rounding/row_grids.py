"""Weights of 1 to 8 bits per output channel: each channel's levels, and rounding to them by GPTQ.

In: a weight matrix float32 [O, K], the second moments of its input, the forms wanted. Out:
``SimulatedMatrix``, codes and scales from which ``dequantize`` makes the weight. Everything here is
a function of its arguments.

Each output channel has one FP16 scale and one zero point: with four levels it matters on which side
of zero the third one lies, and the networks of MPQ-DM and its base are asymmetric too. Channels of
one layer may differ in their bits, and have binary residuals: W^ = q + sum_o alpha_o sign(R_o).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mpq_deploy.rounding.quantizers import (
    Nearest,
    Rounding,
    compensate,
    damped,
    descend,
    gptq_factor,
    round_scale,
)

if TYPE_CHECKING:
    from mpq_deploy.models.spec import Array

GRID_ARRAYS = ("low", "high", "scale", "residual")

# Clipping ratios of the range of a channel, by bits of its grid: the fewer levels, the more is
# clipped (our choice).
LEAST_RATIOS = {2: 0.15, 3: 0.25, 4: 0.35}
RATIO_STEPS = 24
# Zero points tried around the one that the clipped range asks for.
SHIFTS = (-1, 0, 1)
# A grid of so many levels has zero in its middle: codes are held as signed bytes, and nothing is
# gained beside it.
SYMMETRIC_BITS = 8


@dataclass(frozen=True)
class RowForm:
    """The levels of a channel: a grid of ``bits`` (0: only zero), and ``orders`` binary residuals."""

    bits: int
    orders: int = 0

    @property
    def total(self) -> int:
        """Bits per weight."""
        return self.bits + self.orders


def plain(bits: int) -> RowForm:
    """Return the grid of ``bits``; one bit is sign times size."""
    return RowForm(bits) if bits > 1 else RowForm(0, 1)


@dataclass(frozen=True)
class RowGrids:
    """The levels of O channels: ``low`` <= code <= ``high`` (int16 [O], low <= 0 <= high) times
    ``scale`` float16 [O], and plus or minus each ``residual`` float16 [Z, O] (0: none).
    """

    low: Array
    high: Array
    scale: Array
    residual: Array

    def take(self, rows: Array) -> RowGrids:
        """Return some of the channels."""
        return RowGrids(self.low[rows], self.high[rows], self.scale[rows], self.residual[:, rows])


@dataclass(frozen=True)
class SimulatedMatrix:
    """A weight under ``grids``: ``codes`` int8 [O, K] and ``signs`` int8 [Z, O, K] of the residuals (0: none)."""

    grids: RowGrids
    codes: Array
    signs: Array

    def dequantize(self) -> Array:
        """Return the weight, float32 [O, K]."""
        value = self.codes * self.grids.scale.astype(np.float32)[:, None]
        for sign, size in zip(self.signs, self.grids.residual.astype(np.float32)):
            value = value + sign * size[:, None]
        return np.asarray(value, np.float32)

    def arrays(self) -> dict[str, Array]:
        """Return what is stored of it."""
        parts = {**vars(self.grids), "levels": self.codes, "signs": self.signs}
        # Channels were picked from several forms; safetensors writes an array's memory as it lies.
        return {f"simulated.{name}": np.ascontiguousarray(a) for name, a in parts.items()}

    @classmethod
    def of(cls, arrays: Mapping[str, Array]) -> SimulatedMatrix:
        """Read what ``arrays`` gave."""
        grids = RowGrids(*(arrays[f"simulated.{name}"] for name in GRID_ARRAYS))
        return cls(grids, arrays["simulated.levels"], arrays["simulated.signs"])

    def take(self, rows: Array) -> SimulatedMatrix:
        """Return some of the channels."""
        return SimulatedMatrix(self.grids.take(rows), self.codes[rows], self.signs[:, rows])

    @property
    def grid_bits(self) -> Array:
        """Bits of each channel's grid, int64 [O]."""
        levels = self.grids.high.astype(np.int64) - self.grids.low + 1
        return np.asarray(np.rint(np.log2(levels)), np.int64)

    @property
    def orders(self) -> Array:
        """Binary residuals of each channel, int64 [O]."""
        return np.asarray((self.grids.residual > 0).sum(axis=0), np.int64)


def stacked(parts: Sequence[SimulatedMatrix]) -> SimulatedMatrix:
    """Put the channels of ``parts`` one after the other."""
    orders = max(len(part.signs) for part in parts)

    def padded(array: Array) -> Array:
        return np.concatenate(
            [array, np.zeros((orders - len(array), *array.shape[1:]), array.dtype)]
        )

    grids = RowGrids(
        np.concatenate([p.grids.low for p in parts]),
        np.concatenate([p.grids.high for p in parts]),
        np.concatenate([p.grids.scale for p in parts]),
        np.concatenate([padded(p.grids.residual) for p in parts], axis=1),
    )
    signs = np.concatenate([padded(p.signs) for p in parts], axis=1)
    return SimulatedMatrix(grids, np.concatenate([p.codes for p in parts]), signs)


def round_to_grids(weight: Array, grids: RowGrids) -> SimulatedMatrix:
    """Round ``weight`` [O, K] to the nearest level of the grid, then sign by sign to the residuals."""
    step, low, high = (a.astype(np.float32)[:, None] for a in (grids.scale, grids.low, grids.high))
    codes = np.clip(np.rint(weight / step), low, high)
    value, signs = codes * step, []
    for size in grids.residual.astype(np.float32):
        sign = np.where(weight >= value, 1, -1) * (size > 0)[:, None]
        value = value + sign * size[:, None]
        signs.append(sign)
    held = np.asarray(signs, np.int8).reshape(len(signs), *weight.shape)
    return SimulatedMatrix(grids, codes.astype(np.int8), held)


def choose_grids(weight: Array, importance: Array, form: RowForm) -> RowGrids:
    """Choose each channel's levels for ``weight`` [O, K] by importance-weighted error.

    The grid's clip and zero point are searched jointly with the residuals' sizes, the weighted
    means of |R_o|.
    """
    share = (importance if importance.sum() > 0 else np.ones_like(importance)).astype(np.float32)
    best_error = np.full(len(weight), np.inf, np.float32)
    best: RowGrids | None = None
    for base in _bases(weight, form.bits):
        grids = _with_residuals(weight, share, base, form.orders)
        error = np.square(weight - round_to_grids(weight, grids).dequantize()) @ share
        better = error < best_error
        best = grids if best is None else _merged(best, grids, better)
        best_error = np.where(better, error, best_error)
    assert best is not None
    return best


def _bases(weight: Array, bits: int) -> list[RowGrids]:
    """Return the grids to try: every clipping ratio of the range of a channel, and zero points around its own."""
    rows = len(weight)
    none = np.zeros((0, rows), np.float16)
    if bits == 0:
        zero = np.zeros(rows, np.int16)
        return [RowGrids(zero, zero, np.ones(rows, np.float16), none)]
    levels = 2**bits - 1
    low, high = np.minimum(weight.min(axis=1), 0), np.maximum(weight.max(axis=1), 0)
    if bits == SYMMETRIC_BITS:
        high = np.maximum(high, -low) * (levels / (levels - 1))
        low = -high
    found = []
    for ratio in np.geomspace(LEAST_RATIOS.get(bits, 0.5), 1.05, RATIO_STEPS):
        scale = round_scale(ratio * (high - low) / levels)
        middle = np.rint(-ratio * low / scale.astype(np.float32))
        for shift in SHIFTS if bits < SYMMETRIC_BITS else (0,):
            zero_point = (
                np.clip(middle + shift, 0, levels) if bits < SYMMETRIC_BITS else np.full(rows, 128)
            )
            first = -zero_point.astype(np.int16)
            found.append(RowGrids(first, (first + levels).astype(np.int16), scale, none))
    return found


def _with_residuals(weight: Array, share: Array, base: RowGrids, orders: int) -> RowGrids:
    grids = base
    for _ in range(orders):
        rest = np.abs(weight - round_to_grids(weight, grids).dequantize())
        size = round_scale(rest @ share / share.sum())
        grids = RowGrids(
            base.low, base.high, base.scale, np.concatenate([grids.residual, size[None]])
        )
    return grids


def _merged(first: RowGrids, second: RowGrids, taken: Array) -> RowGrids:
    return RowGrids(
        np.where(taken, second.low, first.low),
        np.where(taken, second.high, first.high),
        np.where(taken, second.scale, first.scale),
        np.where(taken, second.residual, first.residual),
    )


def round_forms(
    weight: Array, forms: Sequence[RowForm], moments: list[Array], how: Rounding
) -> dict[RowForm, SimulatedMatrix]:
    """Round ``weight`` [O, K] in every one of ``forms``; ``moments``: the diagonal blocks of the mean of x x^T."""
    importance = np.concatenate([np.diagonal(block) for block in moments])
    together = stacked(
        [round_to_grids(weight, choose_grids(weight, importance, form)) for form in forms]
    )
    target = np.tile(weight, (len(forms), 1))
    if how.gptq:
        together = _compensated(target, together, moments, how.damping)
        hessians = [damped(block, how.damping, np.float32) for block in moments]
        for _ in range(how.refinements):
            together = _refitted(target, together, hessians)
            together = _descended(target, together, hessians)
    spans = np.split(np.arange(len(target)), len(forms))
    return dict(zip(forms, (together.take(span) for span in spans)))


def row_errors(weight: Array, matrix: SimulatedMatrix, moments: list[Array]) -> Array:
    """Return e H e^T of every channel, float64 [O]: its share of the mean squared error of the layer's output."""
    error = (weight - matrix.dequantize()).astype(np.float64)
    if all(len(block) == 1 for block in moments):
        return np.asarray(np.square(error) @ np.concatenate(moments)[:, 0])
    cuts = np.cumsum([len(block) for block in moments])[:-1]
    parts = np.split(error, cuts, axis=1)
    return np.asarray(
        sum(np.einsum("ok,ok->o", part @ block, part) for part, block in zip(parts, moments))
    )


def _better(
    weight: Array, old: SimulatedMatrix, new: SimulatedMatrix, moments: list[Array]
) -> SimulatedMatrix:
    """Take each channel from whichever has the smaller error."""
    better = row_errors(weight, new, moments) < row_errors(weight, old, moments)
    rows = np.arange(len(weight)) + np.where(better, len(weight), 0)
    return stacked([old, new]).take(rows)


class _Encoder:
    """Rounds column by column to the levels of ``grids``, and keeps the codes."""

    def __init__(self, grids: RowGrids, columns: int) -> None:
        self._grids = grids
        self._low, self._high, self._step = (
            a.astype(np.float32) for a in (grids.low, grids.high, grids.scale)
        )
        self._sizes = grids.residual.astype(np.float32)
        self._codes = np.zeros((columns, len(grids.scale)), np.int8)
        self._signs = np.zeros((len(grids.residual), columns, len(grids.scale)), np.int8)
        self._start = 0

    def over(self, start: int) -> _Encoder:
        """Let columns count from ``start``."""
        self._start = start
        return self

    def __call__(self, column: int, wanted: Array) -> Array:
        code = np.clip(np.rint(wanted / self._step), self._low, self._high)
        self._codes[self._start + column] = code
        value = code * self._step
        for order, size in enumerate(self._sizes):
            sign = np.where(wanted >= value, 1, -1) * (size > 0)
            self._signs[order, self._start + column] = sign
            value = value + sign * size
        return np.asarray(value, np.float32)

    def matrix(self) -> SimulatedMatrix:
        """Return what was rounded."""
        signs = np.ascontiguousarray(self._signs.transpose(0, 2, 1))
        return SimulatedMatrix(self._grids, np.ascontiguousarray(self._codes.T), signs)


def _compensated(
    weight: Array, nearest: SimulatedMatrix, moments: list[Array], damping: float
) -> SimulatedMatrix:
    """Round by GPTQ, columns by falling diagonal; channels for which ``nearest`` is better stay there."""
    encoder = _Encoder(nearest.grids, weight.shape[1])
    start = 0
    for block in moments:
        order = np.argsort(-np.diagonal(block), kind="stable")
        factor, pivots = gptq_factor(block[np.ix_(order, order)], damping)
        remaining = np.ascontiguousarray(weight[:, start + order].T)
        compensate(remaining, factor, pivots, _reordered(encoder.over(start), order))
        start += len(block)
    return _better(weight, nearest, encoder.matrix(), moments)


def _reordered(encoder: _Encoder, order: Array) -> Nearest:
    return lambda column, wanted: encoder(int(order[column]), wanted)


def _descended(weight: Array, matrix: SimulatedMatrix, hessians: list[Array]) -> SimulatedMatrix:
    """Visit every code once and move it to the best level for the others as they stand."""
    encoder = _Encoder(matrix.grids, weight.shape[1])
    values = matrix.dequantize()
    start = 0
    for hessian in hessians:
        span = slice(start, start + len(hessian))
        target, held = (np.ascontiguousarray(a[:, span].T) for a in (weight, values))
        descend(target, held, hessian, encoder.over(start))
        start += len(hessian)
    return _better(weight, matrix, encoder.matrix(), hessians)


def _refitted(weight: Array, matrix: SimulatedMatrix, hessians: list[Array]) -> SimulatedMatrix:
    """Fit each channel's scale and residual sizes to its codes by least squares under the Hessian."""
    old = np.concatenate([matrix.grids.scale[None], matrix.grids.residual]).astype(np.float32)
    basis = np.concatenate([matrix.codes[None], matrix.signs]).astype(np.float32)
    cuts = np.cumsum([len(block) for block in hessians])[:-1]
    blocks = list(zip(np.split(basis, cuts, axis=2), np.split(weight, cuts, axis=1), hessians))
    seen = [(part, part @ hessian, target) for part, target, hessian in blocks]
    normal = np.asarray(
        sum(np.einsum("iok,jok->oij", through, part) for part, through, _ in seen), np.float64
    )
    wanted = np.asarray(
        sum(np.einsum("iok,ok->oi", through, target) for _, through, target in seen), np.float64
    )
    ridge = 1e-6 * np.einsum("oii->o", normal) / len(basis) + np.finfo(np.float32).tiny
    normal += ridge[:, None, None] * np.eye(len(basis))
    fitted = np.linalg.solve(normal, wanted[:, :, None])[:, :, 0].T
    sensible = np.isfinite(fitted) & (fitted > 0.5 * old) & (fitted < 2 * old)
    sizes = np.where(old > 0, round_scale(np.where(sensible, fitted, old)), 0).astype(np.float16)
    grids = RowGrids(matrix.grids.low, matrix.grids.high, sizes[0], sizes[1:])
    return _better(weight, matrix, SimulatedMatrix(grids, matrix.codes, matrix.signs), hessians)
