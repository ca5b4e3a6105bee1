"""Weights whose levels are no integers: what their matrices have in common, and GPTQ onto them.

In: a weight W float32 [O, K] and a ``LevelMatrix`` with scales. Out: the matrix with codes. Rounding
compensates errors as for integers (``quantizers.compensate``), then moves each code to the best
level for the others as they stand (``quantizers.descend``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, TypeVar

import numpy as np

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

# Rows whose scales are searched together take so much (as in ``quantizers``).
PIECE_BYTES = 1 << 18
Levels = TypeVar("Levels", bound="LevelMatrix")


@dataclass(frozen=True)
class LevelMatrix:
    """Codes [O, K] and whatever scales a subclass adds; arrays with O rows but for scalars."""

    codes: Array

    def nearest(self, wanted: Array, columns: Array) -> tuple[Array, Array]:
        """Return the codes [n, O] and values of the levels nearest to ``wanted`` [n, O], in ``columns`` int [n]."""
        raise NotImplementedError

    def decode(self, codes: Array, columns: Array) -> Array:
        """Return the values float32 [n, O] of ``codes`` [n, O]."""
        raise NotImplementedError

    def dequantize(self) -> Array:
        """Return the deployed weight, float32 [O, K]."""
        columns = np.arange(self.codes.shape[1])
        return np.ascontiguousarray(self.decode(self.codes.T, columns).T, np.float32)

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
        columns = np.arange(weight.shape[1])
        codes, _ = self.nearest(np.ascontiguousarray(weight.T, np.float32), columns)
        return replace(self, codes=np.ascontiguousarray(codes.T))

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
    codes = {form: matrix.codes.copy() for form, matrix in nearest.items()}
    start = 0
    for block in moments:
        order = np.argsort(-np.diagonal(block), kind="stable")
        factor, pivots = gptq_factor(block[np.ix_(order, order)], how.damping)
        hessian = damped(block[np.ix_(order, order)], how.damping, np.float32)
        columns = start + order
        target = np.ascontiguousarray(weight[:, columns].T)
        for form, grid in grids.items():
            plain = codes[form][:, columns].T
            own = _compensated(target, grid, columns, (factor, pivots, hessian), how.refinements)
            errors = [target - grid.decode(one, columns) for one in (own, plain)]
            better, other = (seen_error(error, factor, pivots) for error in errors)
            codes[form][:, columns] = np.where(better < other, own, plain).T
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
    codes = np.empty(target.shape, grid.codes.dtype)
    encoder = _encoder(grid, columns, codes)
    compensate(target.copy(), factor, pivots, encoder)
    values = grid.decode(codes, columns)
    for _ in range(refinements):
        descend(target, values, hessian, encoder)
    return codes


def _encoder(grid: LevelMatrix, columns: Array, codes: Array) -> Nearest:
    """Return what rounds one column, and keeps its codes in ``codes`` [n, O]."""

    def nearest(place: int, wanted: Array) -> Array:
        column = columns[place : place + 1]
        found, values = grid.nearest(wanted[None], column)
        codes[place] = found[0]
        return np.asarray(values[0])

    return nearest


def row_pieces(weight: Array) -> list[slice]:
    """Cut the rows of ``weight`` [O, K] into pieces that stay in the cache while scales are searched."""
    rows = max(1, PIECE_BYTES // max(1, 4 * weight.shape[1]))
    return [slice(start, start + rows) for start in range(0, len(weight), rows)]
