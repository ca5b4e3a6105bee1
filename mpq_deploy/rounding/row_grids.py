"""Weights of 1 to 8 bits per output channel: each channel's levels, and rounding to them by GPTQ.

In: a weight matrix float32 [O, K], the second moments of its input, the forms wanted. Out:
``SimulatedMatrix``, codes and scales from which ``dequantize`` makes the weight.

Each output channel has one FP16 scale and one zero point: with four levels it matters on which side
of zero two of them lie. MPQ-DM and its base are asymmetric, too. Channels of one layer may differ
in bits and have binary residuals: W^ = q + sum_o alpha_o sign(R_o), where R_o is the error before
residual o.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mpq_deploy.rounding.arrays import cast, fetched, names_of
from mpq_deploy.rounding.quantizers import (
    Factored,
    Nearest,
    Rounding,
    compensate,
    damped,
    descend,
    round_scale,
    row_parts,
)

if TYPE_CHECKING:
    from mpq_deploy.models.spec import Array
    from mpq_deploy.rounding.gpu_columns import GpuColumns

GRID_ARRAYS = ("low", "high", "scale", "residual")

# Smallest clipping ratio of a channel's range, by bits of its grid: with fewer levels more clipping
# is tried (our choice).
LEAST_RATIOS = {2: 0.15, 3: 0.25, 4: 0.35}
RATIO_STEPS = 24
# Zero points tried, relative to that of the clipped range.
SHIFTS = (-1, 0, 1)
# A grid of 8 bits has its zero point in the middle, so that codes fit int8: other zero points gain
# nothing.
SYMMETRIC_BITS = 8


@dataclass(frozen=True)
class RowForm:
    """The levels of a channel: a grid of ``bits`` (0: zero only), ``orders`` binary residuals."""

    bits: int
    orders: int = 0

    @property
    def total(self) -> int:
        """Bits per weight."""
        return self.bits + self.orders


def plain(bits: int) -> RowForm:
    """Return the form of ``bits`` without extra residuals; one bit is a single residual."""
    return RowForm(bits) if bits > 1 else RowForm(0, 1)


@dataclass(frozen=True)
class RowGrids:
    """The levels of O channels: code * ``scale`` float16 [O], +- each ``residual`` float16 [Z, O].

    ``low``, ``high`` int16 [O]: limits of the codes, low <= 0 <= high. A residual of 0 is none.
    """

    low: Array
    high: Array
    scale: Array
    residual: Array

    def take(self, rows: Array) -> RowGrids:
        """Return the grids of the channels ``rows``."""
        return RowGrids(self.low[rows], self.high[rows], self.scale[rows], self.residual[:, rows])


@dataclass(frozen=True)
class SimulatedMatrix:
    """A weight on ``grids``: ``codes`` int8 [O, K], residual ``signs`` int8 [Z, O, K] (0: none)."""

    grids: RowGrids
    codes: Array
    signs: Array

    def dequantize(self) -> Array:
        """Return the dequantized weight, float32 [O, K]."""
        value = self.codes * cast(self.grids.scale, np.float32)[:, None]
        for sign, size in zip(self.signs, cast(self.grids.residual, np.float32)):
            value = value + sign * size[:, None]
        return value

    def arrays(self) -> dict[str, Array]:
        """Return the arrays to store, by name."""
        parts = {**vars(self.grids), "levels": self.codes, "signs": self.signs}
        # Channels picked from several forms are not contiguous; safetensors writes memory as is.
        return {f"simulated.{name}": np.ascontiguousarray(a) for name, a in parts.items()}

    @classmethod
    def of(cls, arrays: Mapping[str, Array]) -> SimulatedMatrix:
        """Make the matrix from the result of ``arrays``."""
        grids = RowGrids(*(arrays[f"simulated.{name}"] for name in GRID_ARRAYS))
        return cls(grids, arrays["simulated.levels"], arrays["simulated.signs"])

    def take(self, rows: Array) -> SimulatedMatrix:
        """Return the matrix of the channels ``rows``."""
        return SimulatedMatrix(self.grids.take(rows), self.codes[rows], self.signs[:, rows])

    def fetched(self) -> SimulatedMatrix:
        """Return the matrix with NumPy arrays."""
        grids = RowGrids(*(fetched(getattr(self.grids, name)) for name in GRID_ARRAYS))
        return SimulatedMatrix(grids, fetched(self.codes), fetched(self.signs))

    @property
    def grid_bits(self) -> Array:
        """Bits of each channel's grid, int64 [O]."""
        levels = self.grids.high.astype(np.int64) - self.grids.low + 1
        return np.asarray(np.rint(np.log2(levels)), np.int64)

    @property
    def orders(self) -> Array:
        """Number of binary residuals of each channel, int64 [O]."""
        return np.asarray((self.grids.residual > 0).sum(axis=0), np.int64)


def stacked(parts: Sequence[SimulatedMatrix]) -> SimulatedMatrix:
    """Concatenate ``parts`` along the channels; missing residuals become 0."""
    xp, orders = names_of(parts[0].codes), max(len(part.signs) for part in parts)

    def padded(array: Array) -> Array:
        return xp.concatenate(
            [array, xp.zeros((orders - len(array), *array.shape[1:]), array.dtype)]
        )

    grids = RowGrids(
        xp.concatenate([p.grids.low for p in parts]),
        xp.concatenate([p.grids.high for p in parts]),
        xp.concatenate([p.grids.scale for p in parts]),
        xp.concatenate([padded(p.grids.residual) for p in parts], axis=1),
    )
    signs = xp.concatenate([padded(p.signs) for p in parts], axis=1)
    return SimulatedMatrix(grids, xp.concatenate([p.codes for p in parts]), signs)


def round_to_grids(weight: Array, grids: RowGrids) -> SimulatedMatrix:
    """Round ``weight`` [O, K] to the nearest code, then choose residual signs one by one."""
    step, low, high = (cast(a, np.float32)[:, None] for a in (grids.scale, grids.low, grids.high))
    sizes = cast(grids.residual, np.float32)[:, :, None]
    held, _ = _nearest_level(weight, step, low, high, sizes)
    return SimulatedMatrix(grids, held[0], held[1:])


def _nearest_level(
    wanted: Array, step: Array, low: Array, high: Array, sizes: Array
) -> tuple[Array, Array]:
    """Return the codes and signs nearest to ``wanted``, int8 [1 + Z, ...], and their values.

    ``sizes`` [Z, ...]: the residuals. Codes and signs are chosen greedily, one after the other.
    """
    xp = names_of(wanted)
    held = [xp.clip(xp.rint(wanted / step), low, high)]
    value = held[0] * step
    for size in sizes:
        held.append(((wanted >= value) * 2 - 1) * (size > 0))
        value = value + held[-1] * size
    return xp.stack([cast(part, np.int8) for part in held]), xp.asarray(value, np.float32)


def choose_grids(weight: Array, importance: Array, form: RowForm) -> RowGrids:
    """Choose each channel's levels for ``weight`` [O, K] by the importance-weighted squared error.

    ``importance`` [K]: the input's mean square. Every clipping ratio and zero point of the grid is
    tried with its residuals, whose sizes are the weighted means of |R_o|.
    """
    xp = names_of(weight)
    share = cast(xp.where(importance.sum() > 0, importance, 1.0), np.float32)
    best_error = xp.full_like(weight[:, 0], np.inf)
    best: RowGrids | None = None
    for base in _bases(weight, form.bits):
        grids = _with_residuals(weight, share, base, form.orders)
        error = xp.square(weight - round_to_grids(weight, grids).dequantize()) @ share
        better = error < best_error
        best = grids if best is None else _merged(best, grids, better)
        best_error = xp.where(better, error, best_error)
    assert best is not None
    return best


def _bases(weight: Array, bits: int) -> list[RowGrids]:
    """Return the grids to try: each clipping ratio of the range, with each shift of zero point."""
    xp, rows = names_of(weight), len(weight)
    none = xp.zeros((0, rows), np.float16)
    if bits == 0:
        zero = xp.zeros(rows, np.int16)
        return [RowGrids(zero, zero, cast(zero + 1, np.float16), none)]
    levels = 2**bits - 1
    low = xp.clip(xp.amin(weight, axis=1), None, 0)
    high = xp.clip(xp.amax(weight, axis=1), 0, None)
    if bits == SYMMETRIC_BITS:
        high = xp.maximum(high, -low) * (levels / (levels - 1))
        low = -high
    found = []
    span, low = cast(high - low, np.float64), cast(low, np.float64)
    for ratio in np.geomspace(LEAST_RATIOS.get(bits, 0.5), 1.05, RATIO_STEPS).tolist():
        scale = round_scale(ratio * span / levels)
        middle = xp.rint(-ratio * low / cast(scale, np.float32))
        for shift in SHIFTS if bits < SYMMETRIC_BITS else (0,):
            zero_point = (
                xp.clip(middle + shift, 0, levels)
                if bits < SYMMETRIC_BITS
                else xp.full_like(middle, 128)
            )
            first = -cast(zero_point, np.int16)
            found.append(RowGrids(first, cast(first + levels, np.int16), scale, none))
    return found


def _with_residuals(weight: Array, share: Array, base: RowGrids, orders: int) -> RowGrids:
    xp, grids = names_of(weight), base
    for _ in range(orders):
        rest = xp.abs(weight - round_to_grids(weight, grids).dequantize())
        size = round_scale(rest @ share / share.sum())
        grids = RowGrids(
            base.low, base.high, base.scale, xp.concatenate([grids.residual, size[None]])
        )
    return grids


def _merged(first: RowGrids, second: RowGrids, taken: Array) -> RowGrids:
    where = names_of(taken).where
    return RowGrids(
        where(taken, second.low, first.low),
        where(taken, second.high, first.high),
        where(taken, second.scale, first.scale),
        where(taken, second.residual, first.residual),
    )


def round_forms(
    weight: Array, forms: Sequence[RowForm], moments: list[Array], how: Rounding
) -> dict[RowForm, SimulatedMatrix]:
    """Round ``weight`` [O, K] to ``forms``; ``moments``: diagonal blocks of the mean of x x^T."""
    xp = names_of(weight)
    importance = xp.concatenate([xp.diagonal(block) for block in moments])
    factored = [Factored.of(block, how.damping) for block in moments] if how.gptq else []
    hessians = [damped(block, how.damping, np.float32) for block in moments] if how.gptq else []
    found: dict[RowForm, list[SimulatedMatrix]] = {form: [] for form in forms}
    # Rows are rounded apart: parts of them bound the memory.
    for part in row_parts(weight):
        own = weight[part]
        together = stacked(
            [round_to_grids(own, choose_grids(own, importance, form)) for form in forms]
        )
        target = xp.tile(own, (len(forms), 1))
        if how.gptq:
            together = _compensated(target, together, moments, factored)
            for _ in range(how.refinements):
                together = _refitted(target, together, hessians)
                together = _descended(target, together, hessians)
        for number, form in enumerate(forms):
            span = xp.arange(number * len(own), (number + 1) * len(own))
            found[form].append(together.take(span))
    return {form: stacked(parts) for form, parts in found.items()}


def row_errors(weight: Array, matrix: SimulatedMatrix, moments: list[Array]) -> Array:
    """Return each channel's mean squared output error e H e^T, float64 [O]."""
    xp, error = names_of(weight), cast(weight - matrix.dequantize(), np.float64)
    if all(len(block) == 1 for block in moments):
        return xp.square(error) @ cast(xp.concatenate(moments)[:, 0], np.float64)
    pairs = ((error[:, span], cast(block, np.float64)) for span, block in _spans(moments))
    return sum(xp.einsum("ok,ok->o", part @ block, part) for part, block in pairs)


def _spans(blocks: list[Array]) -> Iterator[tuple[slice, Array]]:
    """Yield diagonal blocks with the columns that they cover."""
    start = 0
    for block in blocks:
        yield slice(start, start + len(block)), block
        start += len(block)


def _better(
    weight: Array, old: SimulatedMatrix, new: SimulatedMatrix, moments: list[Array]
) -> SimulatedMatrix:
    """Take each channel from ``new`` where its error e H e^T is smaller, else from ``old``."""
    better = row_errors(weight, new, moments) < row_errors(weight, old, moments)
    xp = names_of(weight)
    rows = xp.arange(len(weight)) + xp.where(better, len(weight), 0)
    return stacked([old, new]).take(rows)


class _Encoder:
    """Rounds column by column to the levels of ``grids``, and keeps the codes."""

    def __init__(self, grids: RowGrids, columns: int) -> None:
        self._grids, self._xp = grids, names_of(grids.scale)
        level = (cast(a, np.float32) for a in (grids.scale, grids.low, grids.high))
        self._level = (*level, cast(grids.residual, np.float32))
        shape = columns, 1 + len(grids.residual), len(grids.scale)
        self._held = self._xp.zeros(shape, np.int8)

    @contextmanager
    def over(self, columns: Array) -> Iterator[Nearest | GpuColumns]:
        """Yield an encoder that rounds ``columns`` int [n], one after the other."""
        if self._xp is not np:
            from mpq_deploy.rounding.gpu_columns import GpuColumns

            held = self._xp.empty((len(columns), *self._held.shape[1:]), np.int8)
            yield GpuColumns(_nearest_level, [part[None] for part in self._level], held)
            self._held[columns] = held
            return

        def nearest(place: int, wanted: Array) -> Array:
            self._held[columns[place]], value = _nearest_level(wanted, *self._level)
            return value

        yield nearest

    def matrix(self) -> SimulatedMatrix:
        """Return the rounded matrix."""
        held = self._xp.ascontiguousarray(self._held.swapaxes(0, 1).swapaxes(1, 2))
        return SimulatedMatrix(self._grids, held[0], held[1:])


def _compensated(
    weight: Array, nearest: SimulatedMatrix, moments: list[Array], factored: list[Factored]
) -> SimulatedMatrix:
    """Round by GPTQ in act-order; channels for which ``nearest`` is better keep its codes."""
    xp, encoder = names_of(weight), _Encoder(nearest.grids, weight.shape[1])
    for (span, _), known in zip(_spans(moments), factored, strict=True):
        columns = span.start + known.order
        remaining = xp.ascontiguousarray(weight[:, columns].T)
        with encoder.over(columns) as rounding:
            compensate(remaining, known.factor, known.pivots, rounding)
    return _better(weight, nearest, encoder.matrix(), moments)


def _descended(weight: Array, matrix: SimulatedMatrix, hessians: list[Array]) -> SimulatedMatrix:
    """Move every code once to its best level while the others are fixed."""
    xp, encoder = names_of(weight), _Encoder(matrix.grids, weight.shape[1])
    values = matrix.dequantize()
    for span, hessian in _spans(hessians):
        target, held = (xp.ascontiguousarray(a[:, span].T) for a in (weight, values))
        with encoder.over(xp.arange(span.start, span.stop)) as rounding:
            descend(target, held, hessian, rounding)
    return _better(weight, matrix, encoder.matrix(), hessians)


def _refitted(weight: Array, matrix: SimulatedMatrix, hessians: list[Array]) -> SimulatedMatrix:
    """Fit each channel's scale and residuals to its codes by least squares under the Hessian."""
    xp = names_of(weight)
    old = cast(xp.concatenate([matrix.grids.scale[None], matrix.grids.residual]), np.float32)
    basis = cast(xp.concatenate([matrix.codes[None], matrix.signs]), np.float32)
    blocks = [(basis[:, :, span], weight[:, span], block) for span, block in _spans(hessians)]
    seen = [(part, part @ hessian, target) for part, target, hessian in blocks]
    normal = cast(
        sum(xp.einsum("iok,jok->oij", through, part) for part, through, _ in seen), np.float64
    )
    wanted = cast(
        sum(xp.einsum("iok,ok->oi", through, target) for _, through, target in seen), np.float64
    )
    ridge = 1e-6 * xp.einsum("oii->o", normal) / len(basis) + float(np.finfo(np.float32).tiny)
    normal += ridge[:, None, None] * xp.eye(len(basis))
    fitted = xp.linalg.solve(normal, wanted[:, :, None])[:, :, 0].T
    sensible = xp.isfinite(fitted) & (fitted > 0.5 * old) & (fitted < 2 * old)
    fitted = round_scale(xp.where(sensible, fitted, old))
    sizes = cast(xp.where(old > 0, fitted, 0), np.float16)
    grids = RowGrids(matrix.grids.low, matrix.grids.high, sizes[0], sizes[1:])
    return _better(weight, matrix, SimulatedMatrix(grids, matrix.codes, matrix.signs), hessians)
