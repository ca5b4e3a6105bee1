"""The loops of ``quantizers`` over columns on the CPU, compiled by numba; ``gpu_columns`` has the GPU's.

Each kernel takes some rows of a weight at a time, whose columns then fit the cache. Loops over a
constant number of lanes become vector instructions; those over ``lanes``, the rows that there are,
only copy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mpq_deploy.system.compiled import HALVES, compiled

if TYPE_CHECKING:
    from mpq_deploy.models.spec import Array

# Rows side by side (measured): where scales are searched, so that their columns and tries fit the L1
# cache; where columns are rounded one by one, so that reads of adjacent numbers are long enough.
SEARCHED_LANES, LANES = 64, 256
# Columns whose squared errors are added before their sum is added to the total: sums of few numbers
# lose few bits of float32.
SUMMED = 64


@compiled
def rounding_errors(
    columns: Array, share: Array, steps: Array, low: np.float32, high: np.float32
) -> Array:
    """Return each block's weighted squared error for each of T steps, float32 [T, B, R].

    ``columns`` [K, R]: the weights, in B blocks of K / B columns; ``share`` [K]: importances;
    ``steps`` [T, B, R]; codes are ``low`` to ``high``. All are float32.
    """
    tries, blocks, rows = steps.shape
    size = len(columns) // blocks
    errors = np.empty(steps.shape, np.float32)
    held = np.zeros((SUMMED, SEARCHED_LANES), np.float32)
    totals = np.empty((tries, SEARCHED_LANES), np.float32)
    step, partial = np.ones(SEARCHED_LANES, np.float32), np.empty(SEARCHED_LANES, np.float32)
    for row in range(0, rows, SEARCHED_LANES):
        lanes = min(SEARCHED_LANES, rows - row)
        for block in range(blocks):
            totals[:] = 0
            for start in range(block * size, (block + 1) * size, SUMMED):
                count = min(SUMMED, (block + 1) * size - start)
                for k in range(count):
                    for lane in range(lanes):
                        held[k, lane] = columns[start + k, row + lane]
                for t in range(tries):
                    for lane in range(lanes):
                        step[lane] = steps[t, block, row + lane]
                    partial[:] = 0
                    for k in range(count):
                        weight = share[start + k]
                        for lane in range(SEARCHED_LANES):
                            code = min(max(held[k, lane] / step[lane], low), high)
                            missed = held[k, lane] - ((code + HALVES) - HALVES) * step[lane]
                            partial[lane] += weight * (missed * missed)
                    for lane in range(SEARCHED_LANES):
                        totals[t, lane] += partial[lane]
            for t in range(tries):
                for lane in range(lanes):
                    errors[t, block, row + lane] = totals[t, lane]
    return errors


@compiled
def _add_products(total: Array, factors: Array, rows: Array, count: int) -> None:
    """Add the first ``count`` of ``rows`` [n, LANES], times their ``factors`` [n], to ``total``.

    Four at a time: the total is read and written less often.
    """
    whole = count - count % 4
    for j in range(0, whole, 4):
        a, b, c, d = factors[j], factors[j + 1], factors[j + 2], factors[j + 3]
        for lane in range(LANES):
            own = total[lane] + a * rows[j, lane] + b * rows[j + 1, lane]
            total[lane] = own + c * rows[j + 2, lane] + d * rows[j + 3, lane]
    for j in range(whole, count):
        factor = factors[j]
        for lane in range(LANES):
            total[lane] += factor * rows[j, lane]


@dataclass(frozen=True)
class IntegerColumns:
    """Rounds columns [K, R] to integer multiples of ``step`` [K, R], and writes their ``codes``.

    ``low``, ``high`` [R]: the limits of the codes; all float32 but for ``codes`` int8 [K, R].
    """

    step: Array
    low: Array
    high: Array
    codes: Array

    def compensate(self, start: int, wanted: Array, errors: Array, corner: Array) -> None:
        """Round some columns from ``start``, as ``GpuColumns.compensate`` does."""
        part = slice(start, start + len(wanted))
        corner = np.ascontiguousarray(corner)
        limits, codes = (self.low, self.high), self.codes[part]
        _compensate(wanted, errors, corner, self.step[part], limits, codes)


@compiled
def _compensate(
    wanted: Array,
    errors: Array,
    corner: Array,
    step: Array,
    limits: tuple[Array, Array],
    codes: Array,
) -> None:
    count, rows = wanted.shape
    missed, value = np.zeros((count, LANES), np.float32), np.zeros(LANES, np.float32)
    size, code = np.ones(LANES, np.float32), np.zeros(LANES, np.float32)
    least, most = np.zeros(LANES, np.float32), np.zeros(LANES, np.float32)
    low, high = limits
    for row in range(0, rows, LANES):
        lanes = min(LANES, rows - row)
        for lane in range(lanes):
            least[lane], most[lane] = low[row + lane], high[row + lane]
        for i in range(count):
            for lane in range(lanes):
                value[lane], size[lane] = wanted[i, row + lane], step[i, row + lane]
            _add_products(value, corner[:, i], missed, i)
            for lane in range(LANES):
                code[lane] = min(max(value[lane] / size[lane], least[lane]), most[lane])
            for lane in range(LANES):
                code[lane] = (code[lane] + HALVES) - HALVES
                size[lane] *= code[lane]
            for lane in range(lanes):
                own = row + lane
                codes[i, own] = np.int8(code[lane])
                missed[i, lane] = errors[i, own] - size[lane]
                errors[i, own] = missed[i, lane]
                wanted[i, own] = value[lane] - size[lane]


@compiled
def move_codes(
    slope: Array,
    moved: Array,
    levels: Array,
    step: Array,
    square: Array,
    limits: tuple[np.float32, np.float32],
) -> None:
    """Choose the best codes of n columns, one after the other, while all others are fixed.

    ``slope`` [n, R]: ends as the new codes; ``moved`` [n, R]: receives the changes of the values.
    ``levels`` and ``step`` [n, R]: the old codes, their steps; ``square`` [n, n]: the Hessian's
    diagonal part; ``limits``: the smallest and the largest code.
    """
    low, high = limits
    count, rows = slope.shape
    change, value = np.zeros((count, LANES), np.float32), np.zeros(LANES, np.float32)
    size, old = np.ones(LANES, np.float32), np.zeros(LANES, np.float32)
    for row in range(0, rows, LANES):
        lanes = min(LANES, rows - row)
        for i in range(count):
            for lane in range(lanes):
                own = row + lane
                value[lane], size[lane], old[lane] = slope[i, own], step[i, own], levels[i, own]
            _add_products(value, square[i], change, i)
            curvature = square[i, i]
            for lane in range(LANES):
                best = value[lane] / (curvature * size[lane]) + old[lane]
                value[lane] = (min(max(best, low), high) + HALVES) - HALVES
            for lane in range(LANES):
                change[i, lane] = (old[lane] - value[lane]) * size[lane]
            for lane in range(lanes):
                slope[i, row + lane] = value[lane]
                moved[i, row + lane] = -change[i, lane]
