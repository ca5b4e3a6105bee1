"""Weights whose levels are not integers (FP8, NVFP4): their common matrix class, and GPTQ for them.

In: a weight W float32 [O, K] and a ``LevelMatrix`` with scales. Out: the matrix with codes. GPTQ
compensates errors as for integers (``quantizers.compensate``), then moves each code to its best
level while the other codes are fixed (``quantizers.descend``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from mpq_deploy.rounding.arrays import cast, fetched, names_of
from mpq_deploy.rounding.quantizers import (
    Nearest,
    Rounding,
    compensate,
    damped,
    descend,
    gptq_factor,
    seen_error,
)

if TYPE_CHECKING:
    from mpq_deploy.models.spec import Array
    from mpq_deploy.rounding.gpu_columns import GpuColumns

# (wanted values, scales and other arguments) -> codes and values of the nearest levels.
Level = Callable[..., "tuple[Array, Array]"]
Levels = TypeVar("Levels", bound="LevelMatrix")


@dataclass(frozen=True)
class LevelMatrix:
    """Codes [O, K]; subclasses add scales. All fields are scalars or arrays with O rows."""

    codes: Array

    def levels_at(self, columns: Array) -> tuple[Level, tuple[Array, ...]]:
        """Return the ``Level`` function for ``columns`` int [n] and its arguments [n or 1, O]."""
        raise NotImplementedError

    def nearest(self, wanted: Array, columns: Array) -> tuple[Array, Array]:
        """Return the codes and values [n, O] nearest to ``wanted`` [n, O] in ``columns`` [n]."""
        level, parts = self.levels_at(columns)
        return level(wanted, *parts)

    def decode(self, codes: Array, columns: Array) -> Array:
        """Return the values float32 [n, O] of ``codes`` [n, O]."""
        raise NotImplementedError

    def dequantize(self) -> Array:
        """Return the dequantized weight, float32 [O, K]."""
        xp = names_of(self.codes)
        columns = xp.arange(self.codes.shape[1])
        return xp.ascontiguousarray(self.decode(self.codes.T, columns).T, np.float32)

    def arrays(self) -> dict[str, Array]:
        """Return the arrays to store, by name: every field."""
        return {part.name: getattr(self, part.name) for part in fields(self)}

    @property
    def mean_step(self) -> float:
        """The mean distance between levels: the unit of learning rates for latent weights."""
        raise NotImplementedError

    @classmethod
    def of(cls: type[Levels], arrays: Mapping[str, Array]) -> Levels:
        """Make the matrix from the result of ``arrays``."""
        return cls(**{part.name: arrays[part.name] for part in fields(cls)})

    def rounded(self: Levels, weight: Array) -> Levels:
        """Return the matrix with the codes nearest to ``weight`` [O, K]."""
        xp = names_of(weight)
        columns = xp.arange(weight.shape[1])
        codes, _ = self.nearest(xp.ascontiguousarray(weight.T, np.float32), columns)
        return replace(self, codes=xp.ascontiguousarray(codes.T))

    def fetched(self: Levels) -> Levels:
        """Return the matrix with NumPy arrays."""
        return type(self)(**{name: fetched(array) for name, array in self.arrays().items()})

    def take(self: Levels, rows: Array | slice) -> Levels:
        """Return the matrix of the output channels ``rows``."""
        parts = {name: a[rows] if a.ndim else a for name, a in self.arrays().items()}
        return type(self)(**parts)

    @classmethod
    def joined(cls: type[Levels], pieces: Sequence[Levels]) -> Levels:
        """Concatenate matrices along the output channels; scalars are taken from the first."""
        arrays = [piece.arrays() for piece in pieces]
        first = arrays[0]
        parts = {
            n: np.concatenate([a[n] for a in arrays]) if first[n].ndim else first[n] for n in first
        }
        return cls(**parts)


def round_levels(
    weight: Array, grids: Mapping[str, LevelMatrix], moments: list[Array], how: Rounding
) -> dict[str, LevelMatrix]:
    """Round ``weight`` [O, K] onto each of ``grids`` (form -> matrix whose codes are placeholders).

    ``moments``: the diagonal blocks of H, the mean of x x^T; used when ``how.gptq``. GPTQ's row is
    kept where its error e H e^T (H damped) is smaller than that of rounding to nearest.
    """
    nearest = {form: grid.rounded(weight) for form, grid in grids.items()}
    if not how.gptq:
        return nearest
    xp = names_of(weight)
    codes = {form: cast(matrix.codes, matrix.codes.dtype) for form, matrix in nearest.items()}
    start = 0
    for block in moments:
        order = xp.argsort(-xp.diagonal(block), kind="stable")
        ordered = block[order[:, None], order]
        factor, pivots = gptq_factor(ordered, how.damping)
        hessian = damped(ordered, how.damping, np.float32)
        columns = start + order
        target = xp.ascontiguousarray(weight[:, columns].T)
        for form, grid in grids.items():
            plain = codes[form][:, columns].T
            own = _compensated(target, grid, columns, (factor, pivots, hessian), how.refinements)
            errors = [target - grid.decode(one, columns) for one in (own, plain)]
            better, other = (seen_error(error, factor, pivots) for error in errors)
            codes[form][:, columns] = xp.where(better < other, own, plain).T
        start += len(block)
    return {form: replace(matrix, codes=codes[form]) for form, matrix in nearest.items()}


def _compensated(
    target: Array,
    grid: LevelMatrix,
    columns: Array,
    seen: tuple[Array, Array, Array],
    refinements: int,
) -> Array:
    """Return the codes [n, O] of ``target``; ``seen``: GPTQ's factor, pivots, damped Hessian."""
    factor, pivots, hessian = seen
    codes = names_of(target).empty(target.shape, grid.codes.dtype)
    encoder = _encoder(grid, columns, codes)
    compensate(cast(target, np.float32), factor, pivots, encoder)
    values = grid.decode(codes, columns)
    for _ in range(refinements):
        descend(target, values, hessian, encoder)
    return codes


def _encoder(grid: LevelMatrix, columns: Array, codes: Array) -> Nearest | GpuColumns:
    """Return an encoder that rounds one column after the other and writes ``codes`` [n, O]."""
    if not isinstance(codes, np.ndarray):
        from mpq_deploy.rounding.gpu_columns import GpuColumns

        return GpuColumns(*grid.levels_at(columns), codes)

    def nearest(place: int, wanted: Array) -> Array:
        column = columns[place : place + 1]
        found, values = grid.nearest(wanted[None], column)
        codes[place] = found[0]
        return np.asarray(values[0])

    return nearest
