"""Symmetric weight quantizers in NumPy: scales by error search, nearest rounding, GPTQ.

A weight is a matrix W float32 [O, K]: O output channels, K products summed into one output. Scales
are stored in FP16, so every scale here is rounded to FP16 before codes are computed; what is
returned is what is deployed.
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
    from mpq_deploy.rounding.gpu_columns import GpuColumns, Replayed

# Smallest scale that is written: the smallest normal FP16 number over 8, so that at least 7 bits of
# the scale remain. A channel with smaller weights than 127 times this is a channel of zeros for any
# FP16 network.
SMALLEST_SCALE = float(2.0**-17)
LARGEST_SCALE = 65504.0
# Clipping ratios tried for a scale, of the absolute maximum: our choice, from no clipping (INT4's
# range reaches -8, so 8/7.5 of the symmetric step) down to half.
CLIP_RATIOS = np.linspace(0.5, 1.05, 23)
# Largest multiple of the INT8 scale that an INT4 block scale may be: |-8| * 15 = 120 <= 127.
LARGEST_MULTIPLE = 15
# Rows of a weight whose scales are searched together take so much, so that the search stays in the
# cache: a quarter to half of the time that a wide layer takes as a whole (measured).
PIECE_BYTES = 1 << 18
# On a GPU they only must not fill its memory (our choice).
GPU_PIECE_BYTES = 1 << 26
# The least damping of correlations that may be factored in float32 (our choice; the recipe's is
# 0.05).
SAFE_DAMPING = 0.01
# Columns that are refined together, at least: fewer products of more rows each (measured). Their
# codes are moved in smaller parts, whose slopes stay in the cache.
REFINED_TOGETHER, CODES_TOGETHER = 128, 64
# Rows of a weight's grids that GPTQ visits side by side: of more, the arrays would be all the memory
# that rounding takes (our choice).
ROWS_TOGETHER = 8192
# What rounding a weight [O, K] holds, as arrays of float32 (measured). To nearest: arrays [O, K],
# and one per form.
NEAREST_ARRAYS, NEAREST_FORM_ARRAYS = 3, 1
# By GPTQ: matrices [K, K] for the factor (the correlations as columns are visited, the factor, a
# product); then the factor, arrays [O, K], and those of each form, whose rows are rounded and
# refined side by side.
FACTOR_MATRICES, GPTQ_ARRAYS, GPTQ_FORM_ARRAYS = 3, 6, 2.6
# Layers are rounded side by side as far as they take no more together; a larger one alone. Beyond
# so many, threads wait for Python's lock (our choice).
TOGETHER_BYTES, MOST_THREADS = 2 << 30, 8


def rounding_bytes(weights: int, width: int, forms: int, gptq: bool) -> int:
    """Estimate the bytes that rounding ``weights`` to ``forms`` takes, the Hessian aside.

    ``width``: columns of the Hessian's widest diagonal block.
    """
    if not gptq:
        return 4 * weights * (NEAREST_ARRAYS + NEAREST_FORM_ARRAYS * forms)
    rows_of_forms = 4 * weights * (GPTQ_ARRAYS + GPTQ_FORM_ARRAYS * forms)
    return int(max(4 * FACTOR_MATRICES * width**2, 4 * width**2 + rows_of_forms))


def rounding_threads(cores: int) -> int:
    """Return how many layers are rounded side by side, at most."""
    return min(cores, MOST_THREADS)


@dataclass(frozen=True)
class Rounding:
    """``gptq`` (False: to the nearest, by the moments' diagonals), its ``damping``, rounds of refinement after it.

    ``rows``: rows of a weight's grids that are visited side by side, at most.
    """

    gptq: bool
    damping: float
    refinements: int = 0
    rows: int = ROWS_TOGETHER


@dataclass(frozen=True)
class QuantizedMatrix:
    """Codes int8 [O, K] and FP16 scales of a weight matrix.

    ``scale`` float16 [O, B]: B = 1 for one scale per output channel, else K / B consecutive
    elements share one. ``channel_scale`` float16 [O] is given for 4-bit storage with INT8 compute:
    every block scale is an integer multiple of it, so that quantizing the dequantized weight again
    to INT8 is exact. ``taps``: columns of an input channel, where blocks run over the channels of
    one position of the kernel and then over those of the next; 1 where they run as columns do.
    """

    codes: Array
    scale: Array
    channel_scale: Array | None = None
    taps: int = 1

    def dequantize(self) -> Array:
        """Return the deployed weight, float32 [O, K]."""
        scale = self.effective_scale()
        if self.taps > 1:
            return np.asarray(self.codes * scale[:, self.columns()], np.float32)
        blocked = self.codes.reshape(*scale.shape, -1) * scale[:, :, None]
        return np.asarray(blocked.reshape(self.codes.shape), np.float32)

    def columns(self) -> Array:
        """Return which of the B scales each column has, int [K]."""
        count = self.codes.shape[1]
        blocks = np.arange(self.scale.shape[1])
        ordered = np.repeat(blocks, count // len(blocks))
        return np.asarray(channel_first(ordered[None], self.taps)[0])

    def effective_scale(self) -> Array:
        """Scales float32 [O, B] with which the codes become the deployed weight."""
        scale = cast(self.scale, np.float32)
        if self.channel_scale is None:
            return scale
        channel = cast(self.channel_scale, np.float32)[:, None]
        return names_of(scale).rint(scale / channel) * channel

    def arrays(self) -> dict[str, Array]:
        """Return what is stored of it."""
        channel = {} if self.channel_scale is None else {"channel_scale": self.channel_scale}
        taps = {} if self.taps == 1 else {"taps": np.array(self.taps, np.int32)}
        return {"codes": self.codes, "scale": self.scale, **channel, **taps}

    @classmethod
    def of(cls, arrays: Mapping[str, Array]) -> QuantizedMatrix:
        """Read what ``arrays`` gave."""
        taps = int(arrays.get("taps", 1))
        return cls(arrays["codes"], arrays["scale"], arrays.get("channel_scale"), taps)

    def take(self, rows: Array) -> QuantizedMatrix:
        """Return some of the output channels."""
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


def position_first(matrix: Array, taps: int) -> Array:
    """Bring columns [O, C * taps] into the order of positions, channels within each: [O, taps * C]."""
    if taps == 1:
        return matrix
    return names_of(matrix).ascontiguousarray(
        matrix.reshape(len(matrix), -1, taps).swapaxes(1, 2).reshape(matrix.shape)
    )


def channel_first(matrix: Array, taps: int) -> Array:
    """Bring columns back from the order of ``position_first``."""
    return position_first(matrix, matrix.shape[1] // taps) if taps > 1 else matrix


def round_scale(scale: Array) -> Array:
    """Round positive scales to FP16 within the range that TensorRT takes (positive and finite)."""
    return cast(names_of(scale).clip(scale, SMALLEST_SCALE, LARGEST_SCALE), np.float16)


def choose_scale(weight: Array, importance: Array, blocks: int, precision: Precision) -> Array:
    """Choose FP16 scales [O, blocks] minimizing sum_k importance_k (w_k - q_k)^2 over clips.

    ``importance`` float [K]: the input's mean square per column (llama.cpp calls it the importance
    matrix).
    """
    share = cast(importance.reshape(1, blocks, -1), np.float32)
    return names_of(weight).concatenate(
        [_chosen_scale(weight[part], share, precision) for part in row_pieces(weight)]
    )


def row_pieces(weight: Array) -> list[slice]:
    """Cut the rows of ``weight`` [O, K] into pieces; rows are independent in all that is done to them."""
    size = PIECE_BYTES if isinstance(weight, np.ndarray) else GPU_PIECE_BYTES
    rows = max(1, size // max(1, 4 * weight.shape[1]))
    return [slice(start, start + rows) for start in range(0, len(weight), rows)]


def _chosen_scale(weight: Array, share: Array, precision: Precision) -> Array:
    """Choose the scales of some rows; ``share`` float32 [1, blocks, columns of one]."""
    xp = names_of(weight)
    blocked = weight.reshape(len(weight), *share.shape[1:])
    amax = xp.amax(xp.abs(blocked), axis=2, keepdims=True)
    best_error = xp.full_like(amax, np.finfo(np.float32).max)
    best = round_scale(xp.where(amax > 0, amax, precision.quant_max) / precision.quant_max)
    # Rounded once, from double precision to FP16.
    exact = cast(amax, np.float64)
    # By one scale per channel fine codes lose little: what a small ratio clips of the largest
    # weight alone is then more. Of equal errors the smallest ratio wins.
    ends = _ends(blocked, share, precision) if xp is np and share.shape[1] == 1 else None
    for ratio in CLIP_RATIOS[::-1].tolist():
        scale = round_scale(ratio * exact / precision.quant_max)
        step = cast(scale, np.float32)
        some: Any = slice(None)
        if ends is not None:
            some = np.flatnonzero(ends.clipped(step[:, 0, 0]) <= best_error[:, 0, 0])
        error = _clipped_error(blocked[some], step[some], precision.quant_min, precision.quant_max)
        error = xp.sum(share * xp.square(error, out=error), axis=2, keepdims=True)
        better = (error <= best_error[some]) & (amax[some] > 0)
        best[some] = xp.where(better, scale[some], best[some])
        best_error[some] = xp.where(better, error, best_error[some])
    return best[:, :, 0]


@dataclass(frozen=True)
class _Ends:
    """The largest weight of each row on either side of zero [2, O], its shares, and the largest codes [2, 1]."""

    size: Array
    share: Array
    codes: Array

    def clipped(self, step: Array) -> Array:
        """Return the larger of both weights' errors for steps float32 [O]: no more than the row's error."""
        missed = self.size - self.codes * step
        return (self.share * np.square(np.maximum(missed, 0))).max(axis=0)


def _ends(blocked: Array, share: Array, precision: Precision) -> _Ends:
    rows, places = blocked[:, 0], np.arange(len(blocked))
    at = np.stack([rows.argmax(axis=1), rows.argmin(axis=1)])
    size = np.abs(rows[places, at])
    # A row of one sign has no weight on the other side.
    size[0] *= rows.max(axis=1) > 0
    size[1] *= rows.min(axis=1) < 0
    codes = np.array([[precision.quant_max], [-precision.quant_min]], np.float32)
    return _Ends(size, share[0, 0, at], codes)


def choose_multiple_scale(
    weight: Array, importance: Array, block_scale: Array
) -> tuple[Array, Array]:
    """Turn INT4 block scales into integer multiples of one INT8 scale per channel.

    Returns (block scales float16 [O, B], channel scales float16 [O]). Tries the multiples 8 to 15
    for the largest block of a channel (our choice).
    """
    share = cast(importance[None], np.float32)
    found = [
        _chosen_multiple(weight[part], share, block_scale[part]) for part in row_pieces(weight)
    ]
    scales, channels = (names_of(weight).concatenate(parts) for parts in zip(*found))
    return scales, channels


def _chosen_multiple(weight: Array, share: Array, block_scale: Array) -> tuple[Array, Array]:
    """Choose block scales and channel scales of some rows; ``share`` float32 [1, K]."""
    xp, columns = names_of(weight), weight.shape[1]
    wanted = cast(block_scale, np.float32)
    largest_block = xp.amax(wanted, axis=1)
    best_error = xp.full_like(largest_block, np.inf)
    best_scale, best_channel = xp.zeros_like(block_scale), xp.ones_like(block_scale[:, 0])
    for largest in range(8, LARGEST_MULTIPLE + 1):
        channel = round_scale(largest_block / largest)
        step = cast(channel, np.float32)[:, None]
        multiple = xp.clip(xp.rint(wanted / step), 1, LARGEST_MULTIPLE)
        column_step = _per_column(multiple * step, columns)
        error = _clipped_error(weight, column_step, INT4.quant_min, INT4.quant_max)
        error = xp.sum(share * xp.square(error, out=error), axis=1)
        better = error < best_error
        scale = cast(multiple * step, np.float16)
        best_scale = xp.where(better[:, None], scale, best_scale)
        best_channel = xp.where(better, channel, best_channel)
        best_error = xp.where(better, error, best_error)
    return best_scale, best_channel


def _clipped_error(weight: Array, step: Array, quant_min: int, quant_max: int) -> Array:
    """Return ``weight`` minus what it becomes in multiples of ``step``, in one array of its own."""
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
    """Return a copy of ``hessian`` [K, K] in ``dtype``, its diagonal raised by ``damping``.

    GPTQ adds a share of the diagonal's mean; ours is relative to each column, which shrinks all
    correlations alike, so that a few columns of large inputs do not damp all the others away.
    Columns that are always zero get the mean.
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
    # A column of hardly any input would leave the factor without accuracy.
    least = 1e-9 * mean
    return xp.where(positive, (1 + damping) * xp.maximum(diagonal, least), mean)


def gptq_factor(hessian: Array, damping: float) -> tuple[Array, Array]:
    """Return what earlier columns' errors add to each column, strictly upper [K, K].

    And the pivots [K]: a column's share of the error is its pivot times the square of what rounding
    missed of the value that the column was to make up for. ``hessian``: mean of x x^T over the
    layer's inputs, damped here by ``damped``. With H = U U^T, U upper triangular, they are U_jk /
    U_kk and U_kk^2, and columns are rounded from the first to the last. That is GPTQ (Frantar et
    al. 2023, section 3) without its inverse matrix: Chee et al., QuIP (2023), theorem 6.
    """
    xp, size = names_of(hessian), _damped_diagonal(hessian, damping)
    size = xp.sqrt(size)
    # Correlations: damping keeps their eigenvalues far enough from zero for float32, which takes
    # half the time.
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


def _upper_cholesky(matrix: Array, chunk: int = 256) -> None:
    """Replace a positive definite ``matrix`` [K, K] by upper U with U U^T equal to it.

    From the last columns to the first, some at a time, so that nearly all of the work is products
    of matrices: LAPACK's own routine, as NumPy's wheels bring it, took longer at thousands of
    columns.
    """
    xp = names_of(matrix)
    for stop in range(len(matrix), 0, -chunk):
        start = max(0, stop - chunk)
        own, above = matrix[start:stop, start:stop], matrix[:start, start:stop]
        corner = xp.flip(xp.linalg.cholesky(cast(xp.flip(own), np.float64)))
        above[:] = above @ cast(xp.linalg.inv(corner).T, matrix.dtype)
        matrix[:start, :start] -= above @ above.T
        own[:] = corner
        matrix[start:stop, :start] = 0


@dataclass(frozen=True)
class Grid:
    """The grid of a weight [O, K]: multiples ``quant_min`` to ``quant_max`` of its step.

    ``step`` float32 [O, B]; ``columns`` int [K] says which of the B each column has, ``factors``
    float32 [K] by what it is multiplied there.
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

    def steps(self, order: Array) -> Array:
        """Return the step of every row in the columns ``order`` int [n], float32 [n, O]."""
        steps = names_of(self.step).ascontiguousarray(self.step.T)[self.columns[order]]
        return steps if self.factors is None else steps * self.factors[order, None]

    def nearest(self, weight: Array) -> Array:
        """Return the codes int8 [O, K] of ``weight``."""
        steps = self.steps(names_of(weight).arange(weight.shape[1])).T
        return round_to_nearest(weight, steps, self.quant_min, self.quant_max)


def gptq_codes(
    weight: Array,
    grids: list[Grid],
    hessian: Array,
    damping: float,
    factors: Array | None = None,
    rows: int = ROWS_TOGETHER,
) -> list[Array]:
    """Round ``weight`` [O, K] by GPTQ to each of ``grids``: codes int8 [O, K], ``rows`` side by side.

    Columns are visited by falling diagonal of the Hessian of the input times ``factors`` [K] (GPTQ's
    act-order; the scales are fixed beforehand, so the order costs nothing at run time). Each output
    row is kept from GPTQ or from rounding to nearest, whichever has the smaller error e H e^T, H
    damped, so the result is never worse than nearest.
    """
    xp = names_of(weight)
    moved = xp.diagonal(hessian) * (1 if factors is None else xp.square(xp.asarray(factors)))
    order = xp.argsort(-moved, kind="stable")
    factor, pivots = gptq_factor(hessian[order[:, None], order], damping)
    # Columns of the weight are contiguous rows, [K, O].
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
    """Yield the codes int8 [K, O] of ``ordered`` for each of ``grids``, whose rows are visited side by side."""
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


def _to_multiples(step: Array, low: Array, high: Array, codes: Array) -> Nearest | GpuColumns:
    """Return what rounds columns to multiples of ``step`` [K, R] from ``low`` to ``high`` [R], into ``codes``."""
    if not isinstance(step, np.ndarray):
        from mpq_deploy.rounding.gpu_columns import GpuColumns, integer_level

        return GpuColumns(integer_level, (step, low[None], high[None]), codes)
    value = np.empty(len(low), np.float32)

    def nearest(i: int, wanted: Array) -> Array:
        np.divide(wanted, step[i], out=value)
        np.rint(value, out=value)
        np.maximum(value, low, out=value)
        np.minimum(value, high, out=value)
        codes[i] = value
        value[:] *= step[i]
        return value

    return nearest


# (column, wanted values of all rows [R]) -> the values that they get.
Nearest = Callable[[int, "Array"], "Array"]


def compensate(
    remaining: Array,
    factor: Array,
    pivots: Array,
    nearest: Nearest | GpuColumns,
    chunk: int = 128,
) -> Array:
    """GPTQ's pass over columns of ``remaining`` [K, R], each making up for those before.

    In the end ``remaining`` holds the errors e. Returns e H e^T, float64 [R], H being what
    ``factor`` [K, K] and ``pivots`` [K] come from (``gptq_factor``). The number format is
    ``nearest``, which is called once per column.
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
    errors: Array, factor: Array, pivots: Array, enough: Array | None = None, chunk: int = 512
) -> Array:
    """Return e H e^T of every column of ``errors`` [K, R], float64 [R]; the others as for ``compensate``.

    Or of the first rows of the factor alone, where that is ``enough`` [R] for every column already:
    more only adds to it.
    """
    xp = names_of(errors)
    error = xp.zeros(errors.shape[1], np.float64)
    for start in range(0, len(factor), chunk):
        if enough is not None and xp is np and (error >= enough).all():
            break
        stop = min(start + chunk, len(factor))
        missed = errors[start:stop] + factor[:stop, start:stop].T @ errors[:stop]
        error += pivots[start:stop] @ cast(xp.square(missed, out=missed), np.float64)
    return error


Rounded = tuple["Array", "Array"]


def refine_rounding(
    weight: Array,
    forms: list[Rounded],
    moments: list[Array],
    damping: float,
    rounds: int,
    taps: int = 1,
) -> list[Rounded]:
    """Lower the error e H e^T of INT4 ``forms`` of a weight [O, K]: codes and block scales.

    Each round goes over the columns once, some blocks at a time: it fits each block's scale to its
    codes by least squares, then moves every code to the best level, each for all the others as they
    stand (coordinate descent). ``moments``: the diagonal blocks of the Hessian, together K wide,
    damped here as for GPTQ. ``taps``: how blocks run (``QuantizedMatrix``). Neither step makes a
    row worse. Our choice.
    """
    if not rounds:
        return forms
    hessian = BlockDiagonal([damped(block, damping, np.float32) for block in moments])
    columns = weight.shape[1]
    order = position_first(np.arange(columns)[None], taps)[0] if taps > 1 else None
    spans = [_refined_together(columns // scale.shape[1]) for _, scale in forms]
    found: dict[int, Rounded] = {}
    for span in sorted(set(spans)):
        # Forms share the Hessian, so the rows of those that are cut alike are visited together.
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
    """Return how many columns are visited together where blocks are ``block`` wide: whole blocks."""
    return -(-REFINED_TOGETHER // block) * block


class BlockDiagonal:
    """A symmetric matrix [K, K] of diagonal ``blocks``, float32."""

    def __init__(self, blocks: list[Array]) -> None:
        edges = np.cumsum([0, *map(len, blocks)])
        self._blocks = list(zip(blocks, edges[:-1].tolist(), edges[1:].tolist()))

    def times(self, columns: Array, rows: Array) -> Array:
        """Return the rows ``columns`` int [n] of the matrix times ``rows`` [K, R]."""
        xp = names_of(rows)
        found = xp.empty((len(columns), rows.shape[1]), np.float32)
        for block, low, high in self._blocks:
            own = np.flatnonzero((columns >= low) & (columns < high))
            if len(own):
                found[xp.asarray(own)] = block[xp.asarray(columns[own] - low)] @ rows[low:high]
        return found

    def square(self, columns: Array) -> Array:
        """Return the part of the rows and columns ``columns`` int [n]."""
        xp = names_of(self._blocks[0][0])
        found = xp.zeros((len(columns), len(columns)), np.float32)
        for block, low, high in self._blocks:
            own = np.flatnonzero((columns >= low) & (columns < high))
            inside, place = xp.asarray(columns[own] - low), xp.asarray(own)
            found[place[:, None], place] = block[inside[:, None], inside]
        return found


class _Descent:
    """Forms of one weight while they are refined: columns are contiguous, [K, R], forms side by side.

    ``order`` int [K]: the columns as blocks run over them; None: as they come.
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
        """Fit scales of the columns ``start`` to ``stop`` in order, move their codes, fit scales to those."""
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
        """What the columns ``start`` to ``stop`` in order are: a slice where they lie together."""
        return slice(start, stop) if self._along else self._xp.asarray(self._order[start:stop])

    def _fit(
        self, columns: slice | Array, part: slice, local: slice, square: Array, slope: Array
    ) -> None:
        """Fit one block's scale: the error falls by 2 d g - d^2 h when it changes by d."""
        levels, old = self._levels[columns, part], self._step[columns, part][0]
        raised = square[:, local] @ levels
        xp = self._xp
        gradient = xp.einsum("kr,kr->r", levels, slope[local])
        curvature = xp.einsum("kr,kr->r", levels, raised[local])
        # A block of zero codes leaves its scale open.
        wanted = old + gradient / xp.maximum(curvature, np.finfo(np.float32).tiny)
        sensible = (wanted > 0.5 * old) & (wanted < 2 * old)
        change = cast(round_scale(xp.where(sensible, wanted, old)), np.float32) - old
        change *= change * (2 * gradient - change * curvature) > 0
        self._error[columns, part] -= levels * change
        self._step[columns, part] += change
        slope -= raised * change

    def _move(self, first: int, last: int, start: int, square: Array, slope: Array) -> None:
        """Move the codes of some columns, and let the ``slope`` of all follow."""
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
    """Return whose scales are fitted together: the rows of a form, or ``joined`` of all beside it with such blocks."""
    found: list[tuple[int, slice]] = []
    for form, block in enumerate(blocks):
        part = slice(form * rows, (form + 1) * rows)
        if joined and found and found[-1][0] == block:
            part = slice(found.pop()[1].start, part.stop)
        found.append((block, part))
    return found


def _best(changed: tuple[Array, Array], read: tuple[Array, Array, Array]) -> None:
    """Turn slopes into the best codes, as ``gpu_columns.move_codes`` does."""
    (wanted, moved), (levels, step, within) = changed, read
    for i, best in enumerate(wanted):
        best -= within[i, :i] @ moved[:i]
        best /= within[i, i] * step[i]
        best += levels[i]
        np.rint(best, out=best)
        np.maximum(best, INT4.quant_min, out=best)
        np.minimum(best, INT4.quant_max, out=best)
        np.multiply(best - levels[i], step[i], out=moved[i])


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
    """Visit every column of ``values`` [K, R] (overwritten) once: set it to the best for the others as they stand."""
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
