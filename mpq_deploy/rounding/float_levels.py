"""Weights whose levels are not integers: what their matrices have in common, and GPTQ onto them.

In: a weight W float32 [O, K] and a ``LevelMatrix`` with scales. Out: the matrix with codes. Rounding
compensates errors as for integers (``quantizers.compensate``), then moves each code to the best
level for the others as they stand (``quantizers.descend``).
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

# (wanted, what levels depend on) -> codes and values.
Level = Callable[..., "tuple[Array, Array]"]
Levels = TypeVar("Levels", bound="LevelMatrix")


@dataclass(frozen=True)
class LevelMatrix:
    """Codes [O, K] and whatever scales a subclass adds; arrays with O rows but for scalars."""

    codes: Array

    def levels_at(self, columns: Array) -> tuple[Level, tuple[Array, ...]]:
        """Return what rounds to the levels in ``columns`` int [n], and its further arguments, [n or 1, O] each."""
        raise NotImplementedError

    def nearest(self, wanted: Array, columns: Array) -> tuple[Array, Array]:
        """Return the codes [n, O] and values of the levels nearest to ``wanted`` [n, O], in ``columns`` int [n]."""
        level, parts = self.levels_at(columns)
        return level(wanted, *parts)

    def decode(self, codes: Array, columns: Array) -> Array:
        """Return the values float32 [n, O] of ``codes`` [n, O]."""
        raise NotImplementedError

    def dequantize(self) -> Array:
        """Return the deployed weight, float32 [O, K]."""
        xp = names_of(self.codes)
        columns = xp.arange(self.codes.shape[1])
        return xp.ascontiguousarray(self.decode(self.codes.T, columns).T, np.float32)

    def arrays(self) -> dict[str, Array]:
        """Return what is stored of it: every field."""
        return {part.name: getattr(self, part.name) for part in fields(self)}

    @property
    def mean_step(self) -> float:
        """A mean distance between levels: learning rates of a weight's latent are in units of it."""
        raise NotImplementedError

    @classmethod
    def of(cls: type[Levels], arrays: Mapping[str, Array]) -> Levels:
        """Read what ``arrays`` gave."""
        return cls(**{part.name: arrays[part.name] for part in fields(cls)})

    def rounded(self: Levels, weight: Array) -> Levels:
        """Return the matrix with the codes nearest to ``weight`` [O, K]."""
        xp = names_of(weight)
        columns = xp.arange(weight.shape[1])
        codes, _ = self.nearest(xp.ascontiguousarray(weight.T, np.float32), columns)
        return replace(self, codes=xp.ascontiguousarray(codes.T))

    def fetched(self: Levels) -> Levels:
        """Return the matrix with arrays of NumPy."""
        return type(self)(**{name: fetched(array) for name, array in self.arrays().items()})

    def take(self: Levels, rows: Array | slice) -> Levels:
        """Return some of the output channels."""
        parts = {name: a[rows] if a.ndim else a for name, a in self.arrays().items()}
        return type(self)(**parts)

    @classmethod
    def joined(cls: type[Levels], pieces: Sequence[Levels]) -> Levels:
        """Put matrices of the same columns one below the other; scalars are the first's."""
        arrays = [piece.arrays() for piece in pieces]
        first = arrays[0]
        parts = {
            n: np.concatenate([a[n] for a in arrays]) if first[n].ndim else first[n] for n in first
        }
        return cls(**parts)


def round_levels(
    weight: Array, grids: Mapping[str, LevelMatrix], moments: list[Array], how: Rounding
) -> dict[str, LevelMatrix]:
    """Round ``weight`` [O, K] onto every one of ``grids``, matrices whose codes are not yet known.

    ``moments``: the diagonal blocks of the mean of x x^T, of which ``how.gptq`` makes use. Each row is
    kept as rounded to nearest where that has the smaller error e H e^T, H damped.
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
    """Return the codes [n, O] of ``target`` [n, O]; ``seen``: GPTQ's factor and pivots, the damped Hessian."""
    factor, pivots, hessian = seen
    codes = names_of(target).empty(target.shape, grid.codes.dtype)
    encoder = _encoder(grid, columns, codes)
    compensate(cast(target, np.float32), factor, pivots, encoder)
    values = grid.decode(codes, columns)
    for _ in range(refinements):
        descend(target, values, hessian, encoder)
    return codes


def _encoder(grid: LevelMatrix, columns: Array, codes: Array) -> Nearest | GpuColumns:
    """Return what rounds one column after the other, and keeps its codes in ``codes`` [n, O]."""
    if not isinstance(codes, np.ndarray):
        from mpq_deploy.rounding.gpu_columns import GpuColumns

        return GpuColumns(*grid.levels_at(columns), codes)

    def nearest(place: int, wanted: Array) -> Array:
        column = columns[place : place + 1]
        found, values = grid.nearest(wanted[None], column)
        codes[place] = found[0]
        return np.asarray(values[0])

    return nearest
