"""Symmetric weight quantizers in NumPy: scales by error search, nearest rounding, GPTQ.

A weight is a matrix W float32 [O, K]: O output channels, K products summed into one output. Scales
are stored in FP16, so every scale is rounded to FP16 before codes are computed: the returned codes
and scales are those that are deployed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from mpq_deploy.formats.interfaces import INT4, Precision
from mpq_deploy.rounding.arrays import cast, names_of

if TYPE_CHECKING:
    from mpq_deploy.models.spec import Array
    from mpq_deploy.rounding.cpu_columns import IntegerColumns
    from mpq_deploy.rounding.gpu_columns import GpuColumns, Replayed

# Smallest scale that is written: the smallest normal FP16 number over 8, so that at least 7 bits of
# the scale remain. A channel of weights below 127 times this scale uses fewer codes.
SMALLEST_SCALE = float(2.0**-17)
LARGEST_SCALE = 65504.0
# Clipping ratios tried for a scale, relative to the absolute maximum (our choice): from no clipping
# (INT4's range reaches -8, so 8/7.5 of the symmetric step) down to half.
CLIP_RATIOS = np.linspace(0.5, 1.05, 23)
# Largest multiple of the INT8 scale that an INT4 block scale may be: |-8| * 15 = 120 <= 127.
LARGEST_MULTIPLE = 15
# Bytes of the rows whose scales are searched together, so that they stay in the cache: wide layers
# take a quarter to half of the time that they take in one piece (measured).
PIECE_BYTES = 1 << 18
# The same for compiled searches, which keep to the cache by themselves (our choice).
SEARCHED_BYTES = 1 << 23
# The same on a GPU, where the pieces must only not fill the memory (our choice).
GPU_PIECE_BYTES = 1 << 26
# Minimum damping with which the correlation matrix is factored in float32 (our choice; the recipe's
# default is 0.05).
SAFE_DAMPING = 0.01
# Minimum number of columns refined together: fewer and larger products (measured). Their codes are
# moved in smaller parts, whose slopes stay in the cache.
REFINED_TOGETHER, CODES_TOGETHER = 128, 64
# Rows, over all forms of a weight, that GPTQ rounds side by side: with more, their arrays would
# dominate the memory of rounding (our choice).
ROWS_TOGETHER = 8192
# Columns of which no more need be summed are dropped where fewer than this share is left: their copy
# costs more than it saves above (our choice).
DROPPED_BELOW = 0.75
# Memory of rounding a weight [O, K], in float32 arrays (measured). To nearest: arrays [O, K], and
# one more per form.
NEAREST_ARRAYS, NEAREST_FORM_ARRAYS = 3, 1
# By GPTQ: first FACTOR_MATRICES matrices [K, K] (the ordered correlations, the factor, a part of one);
# then the factor and arrays [O, K], with so many per form, as the rows of all forms are rounded and
# refined side by side.
FACTOR_MATRICES, GPTQ_ARRAYS, GPTQ_FORM_ARRAYS = 2.25, 6, 2.6
# Those of a part alone; of the others the codes are held, in so many bytes per weight and form.
GPTQ_HELD_BYTES = 4
# A layer is rounded in parts of so many weights, whole rows and a multiple of PART_ROWS of them.
PART_WEIGHTS, PART_ROWS = 1 << 21, 64
# Layers are rounded side by side up to this memory together; a larger layer is rounded alone. With
# more threads than MOST_THREADS, they wait for Python's lock (our choice).
TOGETHER_BYTES, MOST_THREADS = 2 << 30, 8


def rounding_bytes(weights: int, width: int, forms: int, gptq: bool, lanes: int = 1) -> int:
    """Estimate the bytes for rounding ``weights`` weights to ``forms`` forms, without the Hessian.

    ``width``: columns of the Hessian's widest diagonal block; ``lanes``: parts rounded at once.
    """
    if not gptq:
        return 4 * weights * (NEAREST_ARRAYS + NEAREST_FORM_ARRAYS * forms)
    part = min(weights, lanes * PART_WEIGHTS)
    rows_of_forms = 4 * part * (GPTQ_ARRAYS + GPTQ_FORM_ARRAYS * forms)
    held = GPTQ_HELD_BYTES * forms * (weights - part)
    return int(max(4 * FACTOR_MATRICES * width**2, 4 * width**2 + rows_of_forms + held))


def lanes_of(needed: int, threads: int) -> int:
    """Return how many parts at once a layer is rounded in that takes ``needed`` bytes with one.

    As many as leave no thread idle beside the layers that TOGETHER_BYTES hold.
    """
    return max(1, threads // max(1, TOGETHER_BYTES // max(needed, 1)))


def rounding_threads(cores: int) -> int:
    """Return the maximum number of layers that are rounded side by side."""
    return min(cores, MOST_THREADS)


@dataclass(frozen=True)
class Rounding:
    """How weights are rounded.

    ``gptq``: by GPTQ with ``damping`` and ``refinements`` rounds of refinement; False: to nearest,
    with scales weighted by the Hessian's diagonal. ``rows``: maximum number of rows, over all forms
    of a weight, that are rounded side by side. ``lanes``: parts of a weight that are rounded at once.
    """

    gptq: bool
    damping: float
    refinements: int = 0
    rows: int = ROWS_TOGETHER
    lanes: int = 1


@dataclass(frozen=True)
class QuantizedMatrix:
    """Codes int8 [O, K] and FP16 scales of a weight matrix.

    ``scale`` float16 [O, B]: B = 1 for one scale per output channel, else K / B consecutive
    elements share one scale. ``channel_scale`` float16 [O]: for 4-bit storage with INT8 compute;
    every block scale is an integer multiple of it, so that quantizing the dequantized weight to
    INT8 is exact. ``taps``: kernel positions per input channel, where blocks run over the channels
    of one kernel position and then over those of the next; 1 where blocks run over columns.
    """

    codes: Array
    scale: Array
    channel_scale: Array | None = None
    taps: int = 1

    def dequantize(self) -> Array:
        """Return the dequantized weight, float32 [O, K]."""
        scale = self.effective_scale()
        if self.taps > 1:
            return np.asarray(self.codes * scale[:, self.columns()], np.float32)
        blocked = self.codes.reshape(*scale.shape, -1) * scale[:, :, None]
        return np.asarray(blocked.reshape(self.codes.shape), np.float32)

    def columns(self) -> Array:
        """Return the index of each column's scale, int [K]."""
        count = self.codes.shape[1]
        blocks = np.arange(self.scale.shape[1])
        ordered = np.repeat(blocks, count // len(blocks))
        return np.asarray(channel_first(ordered[None], self.taps)[0])

    def effective_scale(self) -> Array:
        """Return the scales that dequantize the codes, float32 [O, B]."""
        scale = cast(self.scale, np.float32)
        if self.channel_scale is None:
            return scale
        channel = cast(self.channel_scale, np.float32)[:, None]
        return names_of(scale).rint(scale / channel) * channel

    def arrays(self) -> dict[str, Array]:
        """Return the arrays to store, by name."""
        channel = {} if self.channel_scale is None else {"channel_scale": self.channel_scale}
        taps = {} if self.taps == 1 else {"taps": np.array(self.taps, np.int32)}
        return {"codes": self.codes, "scale": self.scale, **channel, **taps}

    @classmethod
    def of(cls, arrays: Mapping[str, Array]) -> QuantizedMatrix:
        """Make the matrix from the result of ``arrays``."""
        taps = int(arrays.get("taps", 1))
        return cls(arrays["codes"], arrays["scale"], arrays.get("channel_scale"), taps)

    def take(self, rows: Array) -> QuantizedMatrix:
        """Return the matrix of the output channels ``rows``."""
        channel = None if self.channel_scale is None else self.channel_scale[rows]
        return QuantizedMatrix(self.codes[rows], self.scale[rows], channel, self.taps)

    def with_rows(self, rows: Array, part: QuantizedMatrix) -> QuantizedMatrix:
        """Return the matrix with its output channels ``rows`` replaced by those of ``part``."""
        codes, scale = self.codes.copy(), self.scale.copy()
        codes[rows], scale[rows] = part.codes, part.scale
        channel = self.channel_scale
        if channel is not None and part.channel_scale is not None:
            channel = channel.copy()
            channel[rows] = part.channel_scale
        return QuantizedMatrix(codes, scale, channel, self.taps)


def row_parts(weight: Array) -> list[slice]:
    """Cut the rows of ``weight`` [O, K] into parts of about PART_WEIGHTS weights; a GPU rounds all at once.

    Each row is rounded by itself. The parts do not depend on how many of them are rounded at once, so
    neither do the bits, and their arrays bound the memory of a large layer.
    """
    if not isinstance(weight, np.ndarray):
        return [slice(None)]
    rows = max(PART_ROWS, PART_WEIGHTS // weight.shape[1] // PART_ROWS * PART_ROWS)
    return [slice(start, start + rows) for start in range(0, len(weight), rows)]


def position_first(matrix: Array, taps: int) -> Array:
    """Reorder columns [O, C * taps] (channel, position) to (position, channel): [O, taps * C]."""
    if taps == 1:
        return matrix
    return names_of(matrix).ascontiguousarray(
        matrix.reshape(len(matrix), -1, taps).swapaxes(1, 2).reshape(matrix.shape)
    )


def channel_first(matrix: Array, taps: int) -> Array:
    """Undo ``position_first``."""
    return position_first(matrix, matrix.shape[1] // taps) if taps > 1 else matrix


def round_scale(scale: Array) -> Array:
    """Round scales to FP16 within [SMALLEST_SCALE, LARGEST_SCALE]: positive and finite."""
    return cast(names_of(scale).clip(scale, SMALLEST_SCALE, LARGEST_SCALE), np.float16)


def choose_scale(weight: Array, importance: Array, blocks: int, precision: Precision) -> Array:
    """Return the FP16 scales [O, blocks] that minimize sum_k importance_k (w_k - q_k)^2.

    The search is over CLIP_RATIOS. ``importance`` float [K]: the input's mean square per column
    (llama.cpp's importance matrix).
    """
    share = cast(importance, np.float32)
    return names_of(weight).concatenate(
        [
            _chosen_scale(weight[part], share, blocks, precision)
            for part in row_pieces(weight, SEARCHED_BYTES)
        ]
    )


def row_pieces(weight: Array, size: int | None = None) -> list[slice]:
    """Cut the rows of ``weight`` [O, K] into pieces; each row's scales are chosen independently.

    ``size``: bytes of a piece on the CPU; None: PIECE_BYTES.
    """
    size = (size or PIECE_BYTES) if isinstance(weight, np.ndarray) else GPU_PIECE_BYTES
    rows = max(1, size // max(1, 4 * weight.shape[1]))
    return [slice(start, start + rows) for start in range(0, len(weight), rows)]


def _chosen_scale(weight: Array, share: Array, blocks: int, precision: Precision) -> Array:
    """Choose the scales of some rows; ``share`` float32 [K]: importance."""
    xp, columns = names_of(weight), names_of(weight).ascontiguousarray(weight.T)
    amax = xp.amax(xp.abs(columns).reshape(blocks, -1, len(weight)), axis=1)
    # In float64, so that a scale is rounded only once, to FP16.
    largest = cast(xp.where(amax > 0, amax, precision.quant_max), np.float64)
    ratios = xp.asarray(CLIP_RATIOS)[:, None, None]
    scales = round_scale(ratios * largest / precision.quant_max)
    errors = _errors_of_steps(columns, share, cast(scales, np.float32), precision)
    # Of equal errors the smallest ratio wins; a block of zeros has the scale 1.
    best = xp.where(amax > 0, errors.argmin(0), int(np.flatnonzero(CLIP_RATIOS == 1)[0]))
    return xp.ascontiguousarray(_picked(scales, best).T)


def _errors_of_steps(columns: Array, share: Array, steps: Array, precision: Precision) -> Array:
    """Return each block's error sum_k share_k (w_k - q_k)^2 for each of T steps, float32 [T, B, R].

    ``columns`` [K, R]: the weights, in B blocks; ``share`` [K]; ``steps`` [T, B, R]; all float32.
    """
    xp, limits = names_of(columns), (precision.quant_min, precision.quant_max)
    if xp is np:
        from mpq_deploy.rounding.cpu_columns import rounding_errors

        return rounding_errors(columns, share, steps, *map(np.float32, limits))
    blocked, weights = (one.reshape(steps.shape[1], -1, *one.shape[1:]) for one in (columns, share))
    missed = (_clipped_error(blocked, step[:, None], *limits) for step in steps)
    return xp.stack([xp.sum(weights[:, :, None] * xp.square(one), axis=1) for one in missed])


def _picked(tries: Array, best: Array) -> Array:
    """Return of ``tries`` [T, B, R] those with the indices ``best`` [B, R]."""
    xp = names_of(tries)
    return tries[best, xp.arange(len(best))[:, None], xp.arange(best.shape[1])]


def choose_multiple_scale(
    weight: Array, importance: Array, block_scale: Array
) -> tuple[Array, Array]:
    """Turn INT4 block scales into integer multiples of one INT8 scale per channel.

    Returns (block scales float16 [O, B], channel scales float16 [O]). The largest block scale of a
    channel becomes 8 to 15 times the channel scale, by the smallest error (our choice).
    """
    share = cast(importance, np.float32)
    found = [
        _chosen_multiple(weight[part], share, block_scale[part])
        for part in row_pieces(weight, SEARCHED_BYTES)
    ]
    scales, channels = (names_of(weight).concatenate(parts) for parts in zip(*found))
    return scales, channels


def _chosen_multiple(weight: Array, share: Array, block_scale: Array) -> tuple[Array, Array]:
    """Choose the block and channel scales of some rows; ``share`` float32 [K]: importance."""
    xp, columns = names_of(weight), names_of(weight).ascontiguousarray(weight.T)
    wanted = xp.ascontiguousarray(cast(block_scale, np.float32).T)
    largest = xp.asarray(np.arange(8, LARGEST_MULTIPLE + 1, dtype=np.float32))[:, None, None]
    channels = round_scale(xp.amax(wanted, axis=0)[None, None] / largest)
    step = cast(channels, np.float32)
    steps = xp.clip(xp.rint(wanted / step), 1, LARGEST_MULTIPLE) * step
    best = xp.sum(_errors_of_steps(columns, share, steps, INT4), axis=1).argmin(0)
    scales = _picked(cast(steps, np.float16), xp.tile(best, (len(wanted), 1)))
    return xp.ascontiguousarray(scales.T), _picked(channels, best[None])[0]


def _clipped_error(weight: Array, step: Array, quant_min: int, quant_max: int) -> Array:
    """Return ``weight`` minus its quantized value, with one temporary array."""
    xp, codes = names_of(weight), weight / step
    xp.rint(codes, out=codes)
    xp.clip(codes, quant_min, quant_max, out=codes)
    codes *= step
    return xp.subtract(weight, codes, out=codes)


def round_to_nearest(weight: Array, step: Array, quant_min: int, quant_max: int) -> Array:
    """Return int8 codes [O, K] of ``weight`` for column steps float32 [O, K]."""
    xp = names_of(weight)
    return cast(xp.clip(xp.rint(weight / step), quant_min, quant_max), np.int8)


def damped(hessian: Array, damping: float, dtype: type[np.floating[Any]] = np.float64) -> Array:
    """Return a copy of ``hessian`` [K, K] in ``dtype`` with its diagonal times 1 + ``damping``.

    GPTQ adds a share of the diagonal's mean to every column. Here the damping is relative to each
    column: it shrinks all correlations alike, so that a few columns of large inputs do not damp all
    others away. Columns that are always zero get the mean of the others (our choice).
    """
    matrix = cast(hessian, dtype)
    names_of(matrix).fill_diagonal(matrix, _damped_diagonal(hessian, damping))
    return matrix


def _damped_diagonal(hessian: Array, damping: float) -> Array:
    xp = names_of(hessian)
    diagonal = cast(xp.diagonal(hessian), np.float64)
    positive = diagonal > 0
    if xp is np:
        mean = diagonal[positive].mean() if positive.any() else np.float64(1)
    else:
        count = positive.sum()
        mean = xp.where(count > 0, xp.where(positive, diagonal, 0).sum() / count, 1.0)
    # A column with almost no input would make the factor inaccurate.
    least = 1e-9 * mean
    return xp.where(positive, (1 + damping) * xp.maximum(diagonal, least), mean)


def gptq_factor(hessian: Array, damping: float) -> tuple[Array, Array]:
    """Return GPTQ's factor, strictly upper [K, K], and pivots [K], for columns first to last.

    ``hessian`` [K, K]: H, the mean of x x^T over the layer's inputs, damped here as by ``damped``.
    With H = U U^T, U upper triangular, the factor is U_jk / U_kk: how the error of column j changes
    the value to round in column k > j. The pivots are U_kk^2: the output error e H e^T is the sum
    over k of pivot k times the squared rounding error of that value. This is GPTQ (Frantar et al.
    2023, section 3) without an inverse matrix: Chee et al., QuIP (2023), theorem 6.
    """
    xp, size = names_of(hessian), _damped_diagonal(hessian, damping)
    size = xp.sqrt(size)
    # Factor the correlation matrix: damping keeps its eigenvalues far enough from zero for float32,
    # which takes half the time.
    upper = cast(hessian, np.float32 if damping >= SAFE_DAMPING else np.float64)
    upper /= cast(size[:, None], upper.dtype)
    upper /= cast(size, upper.dtype)
    xp.fill_diagonal(upper, 1)
    _upper_cholesky(upper)
    diagonal = size * xp.diagonal(upper)
    upper *= cast(size[:, None], upper.dtype)
    upper /= cast(diagonal, upper.dtype)
    xp.fill_diagonal(upper, 0)
    return xp.asarray(upper, np.float32), xp.square(diagonal)


def _upper_cholesky(matrix: Array, chunk: int = 96) -> None:
    """Overwrite a positive definite ``matrix`` [K, K] by the upper U with U U^T equal to it.

    Works from the last columns to the first, ``chunk`` at a time, each from those right of it: nearly
    all work is matrix products that write every number once. The LAPACK in NumPy's wheels takes 2.5
    times as long at a thousand columns (measured).
    """
    xp = names_of(matrix)
    for stop in range(len(matrix), 0, -chunk):
        start = max(0, stop - chunk)
        columns, own = matrix[:stop, start:stop], matrix[start:stop, start:stop]
        if stop < len(matrix):
            columns -= matrix[:stop, stop:] @ matrix[start:stop, stop:].T
        corner = xp.flip(xp.linalg.cholesky(cast(xp.flip(own), np.float64)))
        columns[:start] = columns[:start] @ cast(xp.linalg.inv(corner).T, matrix.dtype)
        own[:] = corner
        matrix[start:stop, :start] = 0


@dataclass(frozen=True)
class Grid:
    """The levels of a weight [O, K]: the multiples ``quant_min`` to ``quant_max`` of a step.

    ``step`` float32 [O, B]; ``columns`` int [K]: the index in B of each column's step; ``factors``
    float32 [K]: multiply the steps by column.
    """

    step: Array
    columns: Array
    quant_min: int
    quant_max: int
    factors: Array | None = None

    def cut(self, span: slice) -> Grid:
        """Return the grid of some columns."""
        factors = None if self.factors is None else self.factors[span]
        return replace(self, columns=self.columns[span], factors=factors)

    def of_rows(self, part: slice) -> Grid:
        """Return the grid of some rows."""
        return replace(self, step=self.step[part])

    def steps(self, order: Array) -> Array:
        """Return the steps of the columns ``order`` int [n], float32 [n, O]."""
        steps = names_of(self.step).ascontiguousarray(self.step.T)[self.columns[order]]
        return steps if self.factors is None else steps * self.factors[order, None]

    def nearest(self, weight: Array) -> Array:
        """Return the codes int8 [O, K] of ``weight``."""
        steps = self.steps(names_of(weight).arange(weight.shape[1])).T
        return round_to_nearest(weight, steps, self.quant_min, self.quant_max)


@dataclass(frozen=True)
class Factored:
    """GPTQ's ``factor`` and ``pivots`` of a Hessian whose columns are visited in ``order`` int [K]."""

    order: Array
    factor: Array
    pivots: Array

    @classmethod
    def of(cls, hessian: Array, damping: float, factors: Array | None = None) -> Factored:
        """Factor ``hessian`` [K, K]; arguments as for ``gptq_codes``."""
        xp = names_of(hessian)
        moved = xp.diagonal(hessian) * (1 if factors is None else xp.square(xp.asarray(factors)))
        order = xp.argsort(-moved, kind="stable")
        return cls(order, *gptq_factor(hessian[order[:, None], order], damping))


def gptq_codes(
    weight: Array,
    grids: list[Grid],
    hessian: Array | Factored,
    damping: float,
    factors: Array | None = None,
    rows: int = ROWS_TOGETHER,
) -> list[Array]:
    """Round ``weight`` [O, K] by GPTQ to each of ``grids``; return codes int8 [O, K] per grid.

    Columns are visited in descending order of the diagonal of ``hessian`` times ``factors``^2 [K]
    (GPTQ's act-order; the scales are fixed beforehand, so the order costs nothing at run time).
    Each output row is GPTQ's or rounded to nearest, whichever has the smaller error e H e^T with H
    damped. ``rows``: maximum number of rows, over all grids, rounded side by side. A ``hessian`` that
    is factored has ``damping`` and ``factors`` in it.
    """
    xp = names_of(weight)
    known = hessian if isinstance(hessian, Factored) else Factored.of(hessian, damping, factors)
    order, factor, pivots = known.order, known.factor, known.pivots
    # Transposed to [K, O], so that a column of the weight is contiguous.
    ordered = xp.ascontiguousarray(weight.T)[order]
    found: list[Array] = []
    together = max(1, rows // len(weight))
    for start in range(0, len(grids), together):
        for codes in _visited(ordered, grids[start : start + together], order, factor, pivots):
            restored = xp.empty_like(codes)
            restored[order] = codes
            found.append(xp.ascontiguousarray(restored.T))
    return found


def _visited(
    ordered: Array, grids: list[Grid], order: Array, factor: Array, pivots: Array
) -> Iterator[Array]:
    """Yield the codes int8 [K, O] of ``ordered`` [K, O] for each of ``grids``, rounded together."""
    xp, rows = names_of(ordered), ordered.shape[1]
    step = xp.concatenate([grid.steps(order) for grid in grids], axis=1)
    limits = np.array([(grid.quant_min, grid.quant_max) for grid in grids], np.float32)
    low, high = (xp.asarray(ends) for ends in np.repeat(limits.T, rows, axis=1))
    codes, remaining = xp.empty(step.shape, np.int8), xp.tile(ordered, (1, len(grids)))
    error = compensate(remaining, factor, pivots, _to_multiples(step, low, high, codes))
    for number, grid in enumerate(grids):
        part = slice(number * rows, (number + 1) * rows)
        own, steps = codes[:, part], step[:, part]
        plain = xp.clip(xp.rint(ordered / steps), grid.quant_min, grid.quant_max)
        worse = error[part] > seen_error(ordered - plain * steps, factor, pivots, error[part])
        own[:] = xp.where(worse, cast(plain, np.int8), own)
        yield own


def _to_multiples(
    step: Array, low: Array, high: Array, codes: Array
) -> GpuColumns | IntegerColumns:
    """Return an encoder that fills ``codes`` [K, R], ``low`` to ``high``, in units of ``step``."""
    if not isinstance(step, np.ndarray):
        from mpq_deploy.rounding.gpu_columns import GpuColumns, integer_level

        return GpuColumns(integer_level, (step, low[None], high[None]), codes)
    from mpq_deploy.rounding.cpu_columns import IntegerColumns

    return IntegerColumns(step, low, high, codes)


# (column, wanted values of all rows [R]) -> the dequantized values that they are rounded to [R].
Nearest = Callable[[int, "Array"], "Array"]


def compensate(
    remaining: Array,
    factor: Array,
    pivots: Array,
    nearest: Nearest | GpuColumns | IntegerColumns,
    chunk: int = 128,
) -> Array:
    """Run GPTQ over the columns of ``remaining`` [K, R]; each compensates the errors before it.

    ``remaining`` holds the weights and is overwritten by their errors e. ``factor`` [K, K] and
    ``pivots`` [K]: from ``gptq_factor`` of H. ``nearest``: rounds to the number format, once per
    column. Returns e H e^T, float64 [R].
    """
    xp = names_of(remaining)
    error = xp.zeros(remaining.shape[1], np.float64)
    for start in range(0, len(factor), chunk):
        stop = min(start + chunk, len(factor))
        wanted = remaining[start:stop] + factor[:start, start:stop].T @ remaining[:start]
        if callable(nearest):
            for i, own in enumerate(wanted, start):
                own += factor[start:i, i] @ remaining[start:i]
                given = nearest(i, own)
                remaining[i] -= given
                own -= given
        else:
            corner = factor[start:stop, start:stop]
            nearest.compensate(start, wanted, remaining[start:stop], corner)
        error += pivots[start:stop] @ cast(xp.square(wanted, out=wanted), np.float64)
    return error


def seen_error(
    errors: Array, factor: Array, pivots: Array, enough: Array | None = None, chunk: int = 256
) -> Array:
    """Return e H e^T of every column of ``errors`` [K, R], float64 [R].

    ``factor``, ``pivots``: as for ``compensate``. ``enough`` [R]: a column that has reached this
    error may have a partial sum, to which the remaining terms only add.
    """
    xp = names_of(errors)
    error = xp.zeros(errors.shape[1], np.float64)
    left: Any = slice(None)
    for start in range(0, len(factor), chunk):
        if enough is not None and xp is np:
            short = np.flatnonzero(error[left] < enough[left])
            if not len(short):
                break
            if len(short) < DROPPED_BELOW * errors.shape[1]:
                left = np.arange(len(error))[left][short]
                errors = errors[:, short]
        stop = min(start + chunk, len(factor))
        missed = errors[start:stop] + factor[:stop, start:stop].T @ errors[:stop]
        error[left] += pivots[start:stop] @ cast(xp.square(missed, out=missed), np.float64)
    return error


Rounded = tuple["Array", "Array"]


def refine_rounding(
    weight: Array,
    forms: list[Rounded],
    moments: list[Array] | BlockDiagonal,
    damping: float,
    rounds: int,
    taps: int = 1,
) -> list[Rounded]:
    """Lower the error e H e^T of INT4 ``forms`` (codes, block scales) of a weight [O, K].

    Each round goes over the columns once, some blocks at a time. It fits each block's scale to its
    codes by least squares, then moves every code to its best level while all others are fixed
    (coordinate descent). No step increases a row's error. ``moments``: the diagonal blocks of the
    Hessian, together K wide, damped here as for GPTQ; or all of it, damped. ``taps``:
    ``QuantizedMatrix``. Our choice.
    """
    if not rounds:
        return forms
    hessian = (
        moments if isinstance(moments, BlockDiagonal) else BlockDiagonal.damped(moments, damping)
    )
    columns = weight.shape[1]
    order = position_first(np.arange(columns)[None], taps)[0] if taps > 1 else None
    spans = [_refined_together(columns // scale.shape[1]) for _, scale in forms]
    found: dict[int, Rounded] = {}
    for span in sorted(set(spans)):
        # All forms share the Hessian, so forms with the same span are refined together.
        alike = [number for number, own in enumerate(spans) if own == span]
        if not isinstance(weight, np.ndarray):
            alike.sort(key=lambda number: forms[number][1].shape[1])
        state = _Descent(weight, [forms[number] for number in alike], order)
        for _ in range(rounds):
            for start in range(0, columns, span):
                state.visit(start, min(start + span, columns), hessian)
        found.update(zip(alike, state.forms()))
    return [found[number] for number in range(len(forms))]


def _refined_together(block: int) -> int:
    """Return how many columns are refined together: whole blocks of ``block`` columns."""
    return -(-REFINED_TOGETHER // block) * block


class BlockDiagonal:
    """A symmetric matrix [K, K] of diagonal ``blocks``, float32."""

    def __init__(self, blocks: list[Array]) -> None:
        edges = np.cumsum([0, *map(len, blocks)])
        self._blocks = list(zip(blocks, edges[:-1].tolist(), edges[1:].tolist()))

    @classmethod
    def damped(cls, moments: list[Array], damping: float) -> BlockDiagonal:
        """Return the matrix of the blocks ``moments``, each damped as for GPTQ."""
        return cls([damped(block, damping, np.float32) for block in moments])

    def times(self, columns: Array, rows: Array) -> Array:
        """Return the matrix's rows ``columns`` int [n] times ``rows`` [K, R], float32 [n, R]."""
        xp = names_of(rows)
        found = xp.empty((len(columns), rows.shape[1]), np.float32)
        for block, low, high in self._blocks:
            own = np.flatnonzero((columns >= low) & (columns < high))
            if len(own):
                found[xp.asarray(own)] = block[xp.asarray(columns[own] - low)] @ rows[low:high]
        return found

    def square(self, columns: Array) -> Array:
        """Return the submatrix [n, n] of the rows and columns ``columns`` int [n]."""
        xp = names_of(self._blocks[0][0])
        found = xp.zeros((len(columns), len(columns)), np.float32)
        for block, low, high in self._blocks:
            own = np.flatnonzero((columns >= low) & (columns < high))
            inside, place = xp.asarray(columns[own] - low), xp.asarray(own)
            found[place[:, None], place] = block[inside[:, None], inside]
        return found


class _Descent:
    """The state of ``refine_rounding``: arrays [K, R], the rows of all forms side by side.

    ``order`` int [K]: the columns in the order in which blocks run over them; None: as they are.
    """

    def __init__(self, weight: Array, forms: list[Rounded], order: Array | None) -> None:
        xp, self._rows, columns = names_of(weight), len(weight), weight.shape[1]
        self._xp = xp
        self._best = _best if xp is np else _best_on_gpu()
        self._blocks = [columns // scale.shape[1] for _, scale in forms]
        self._fits = _alike(self._blocks, self._rows, xp is not np)
        self._order = np.arange(columns) if order is None else order
        self._along = order is None
        step = xp.concatenate([_per_column(cast(scale, np.float32), columns) for _, scale in forms])
        if order is not None:
            step[:, xp.asarray(order)] = cast(step, np.float32)
        self._step = xp.ascontiguousarray(step.T)
        self._levels = xp.ascontiguousarray(
            xp.concatenate([codes for codes, _ in forms]).T, np.float32
        )
        self._error = xp.tile(weight.T, (1, len(forms))) - self._levels * self._step

    def visit(self, start: int, stop: int, hessian: BlockDiagonal) -> None:
        """Refine the columns ``start`` to ``stop`` of the order: scales, codes, scales again."""
        columns = self._order[start:stop]
        square, slope = hessian.square(columns), hessian.times(columns, self._error)
        self._fit_all(start, stop, square, slope)
        for first in range(start, stop, CODES_TOGETHER):
            self._move(first, min(first + CODES_TOGETHER, stop), start, square, slope)
        self._fit_all(start, stop, square, slope)

    def _fit_all(self, start: int, stop: int, square: Array, slope: Array) -> None:
        for block, part in self._fits:
            for first in range(start, stop, block):
                local = slice(first - start, first - start + block)
                self._fit(self._at(first, first + block), part, local, square, slope[:, part])

    def _at(self, start: int, stop: int) -> slice | Array:
        """Return the columns ``start`` to ``stop`` of the order, as a slice if adjacent."""
        return slice(start, stop) if self._along else self._xp.asarray(self._order[start:stop])

    def _fit(
        self, columns: slice | Array, part: slice, local: slice, square: Array, slope: Array
    ) -> None:
        """Fit one block's scale: a change d lowers the error by 2 d gradient - d^2 curvature."""
        levels, old = self._levels[columns, part], self._step[columns, part][0]
        raised = square[:, local] @ levels
        xp = self._xp
        gradient = xp.einsum("kr,kr->r", levels, slope[local])
        curvature = xp.einsum("kr,kr->r", levels, raised[local])
        # A block of zero codes has no curvature: its scale stays.
        wanted = old + gradient / xp.maximum(curvature, np.finfo(np.float32).tiny)
        sensible = (wanted > 0.5 * old) & (wanted < 2 * old)
        change = cast(round_scale(xp.where(sensible, wanted, old)), np.float32) - old
        change *= change * (2 * gradient - change * curvature) > 0
        self._error[columns, part] -= levels * change
        self._step[columns, part] += change
        slope -= raised * change

    def _move(self, first: int, last: int, start: int, square: Array, slope: Array) -> None:
        """Move the codes of some columns; update the ``slope`` of all columns of the visit."""
        own, columns = slice(first - start, last - start), self._at(first, last)
        levels, step, within = self._levels[columns], self._step[columns], square[own, own]
        wanted, moved = cast(slope[own], np.float32), self._xp.empty_like(levels)
        self._best((wanted, moved), (levels, step, within))
        self._levels[columns] = wanted
        self._error[columns] -= moved
        slope -= square[:, own] @ moved

    def forms(self) -> list[Rounded]:
        """Return the codes [O, K] and scales [O, B] of each form."""
        xp, codes, parts = self._xp, cast(self._levels.T, np.int8), range(len(self._blocks))
        cut = [slice(form * self._rows, (form + 1) * self._rows) for form in parts]
        first = [xp.asarray(self._order[:: self._blocks[form]]) for form in parts]
        scales = [cast(self._step[first[form], cut[form]].T, np.float16) for form in parts]
        return [
            (xp.ascontiguousarray(codes[cut[form]]), xp.ascontiguousarray(scales[form]))
            for form in parts
        ]


def _alike(blocks: list[int], rows: int, joined: bool) -> list[tuple[int, slice]]:
    """Return (block size, rows) of each form, or ``joined`` of adjacent forms of one block size."""
    found: list[tuple[int, slice]] = []
    for form, block in enumerate(blocks):
        part = slice(form * rows, (form + 1) * rows)
        if joined and found and found[-1][0] == block:
            part = slice(found.pop()[1].start, part.stop)
        found.append((block, part))
    return found


def _best(changed: tuple[Array, Array], read: tuple[Array, Array, Array]) -> None:
    """Choose the best codes column by column; arguments as for ``gpu_columns.move_codes``."""
    from mpq_deploy.rounding.cpu_columns import move_codes

    levels, step, within = read
    limits = np.float32(INT4.quant_min), np.float32(INT4.quant_max)
    move_codes(*changed, levels, step, np.ascontiguousarray(within), limits)


def _best_on_gpu() -> Replayed:
    from mpq_deploy.rounding.gpu_columns import Replayed, move_codes

    return Replayed(partial(move_codes, (INT4.quant_min, INT4.quant_max)))


def descend(
    target: Array,
    values: Array,
    hessian: Array,
    nearest: Nearest | GpuColumns,
    chunk: int = 64,
) -> None:
    """Set every column of ``values`` [K, R] once to its best level while the others are fixed.

    ``values`` is overwritten; ``target`` [K, R]: the float weight; ``hessian`` [K, K]: damped.
    """
    error = target - values
    for start in range(0, len(hessian), chunk):
        stop = min(start + chunk, len(hessian))
        slope, span = hessian[start:stop] @ error, slice(start, stop)
        if not callable(nearest):
            square = hessian[span, span]
            nearest.descend(start, (values[span], error[span], slope), target[span], square)
            continue
        for i in range(start, stop):
            found = nearest(i, target[i] - error[i] + slope[i - start] / hessian[i, i])
            moved = values[i] - found
            error[i] += moved
            values[i] = found
            slope[i + 1 - start :] += hessian[i + 1 : stop, i, None] * moved


def _per_column(scale: Array, columns: int) -> Array:
    """Repeat scales [O, B] to one per column, [O, columns]."""
    return names_of(scale).repeat(scale, columns // scale.shape[1], axis=1)
