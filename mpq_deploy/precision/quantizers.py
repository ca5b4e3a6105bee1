"""Symmetric weight quantizers in NumPy: scales by weighted error search, rounding to nearest or GPTQ.

A weight is a matrix W float32 [O, K]: O output channels, K products summed into one output. Scales are stored in
FP16, so every scale here is rounded to FP16 before codes are computed; what is returned is what is deployed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mpq_deploy.denoisers.spec import Array
from mpq_deploy.precision.scheme import INT4, INT8

# Smallest scale that is written: the smallest normal FP16 number over 8, so that at least 7 bits of the scale
# remain. A channel with smaller weights than 127 times this is a channel of zeros for any FP16 network.
SMALLEST_SCALE = float(2.0**-17)
LARGEST_SCALE = 65504.0
# Clipping ratios tried for a scale, of the absolute maximum: our choice, from no clipping (INT4's range reaches
# -8, so 8/7.5 of the symmetric step) down to half.
CLIP_RATIOS = np.linspace(0.5, 1.05, 23)
# Largest multiple of the INT8 scale that an INT4 block scale may be: |-8| * 15 = 120 <= 127.
LARGEST_MULTIPLE = 15
# Rows of a weight whose scales are searched together take so much, so that the search stays in the cache: a quarter to
# half of the time that a wide layer takes as a whole (measured).
PIECE_BYTES = 1 << 18
# Memory for the normal equations of block scales.
NORMAL_BYTES = 64 << 20


@dataclass(frozen=True)
class QuantizedMatrix:
    """Codes int8 [O, K] and FP16 scales of a weight matrix.

    ``scale`` float16 [O, B]: B = 1 for one scale per output channel, else K / B consecutive elements share one.
    ``channel_scale`` float16 [O] is given for 4-bit storage with INT8 compute: every block scale is an integer
    multiple of it, so that quantizing the dequantized weight again to INT8 is exact.
    """

    codes: Array
    scale: Array
    channel_scale: Array | None = None

    def dequantize(self) -> Array:
        """Return the deployed weight, float32 [O, K]."""
        return np.asarray(self.codes * _per_column(self.effective_scale(), self.codes.shape[1]), np.float32)

    def effective_scale(self) -> Array:
        """Scales float32 [O, B] with which the codes become the deployed weight."""
        scale = self.scale.astype(np.float32)
        if self.channel_scale is None:
            return scale
        channel = self.channel_scale.astype(np.float32)[:, None]
        return np.asarray(np.rint(scale / channel) * channel, np.float32)


def round_scale(scale: Array) -> Array:
    """Round positive scales to FP16 within the range that TensorRT takes (positive and finite)."""
    return np.clip(scale, SMALLEST_SCALE, LARGEST_SCALE).astype(np.float16)


def choose_scale(weight: Array, importance: Array, blocks: int, bits: int) -> Array:
    """Choose FP16 scales [O, blocks] that minimise sum_k importance_k (w_k - q_k)^2 over clipping ratios.

    ``importance`` float [K]: the input's mean square per column (llama.cpp calls it the importance matrix).
    """
    share = importance.reshape(1, blocks, -1).astype(np.float32)
    return np.concatenate([_chosen_scale(weight[part], share, bits) for part in _pieces(weight)])


def _pieces(weight: Array) -> list[slice]:
    """Cut the rows of ``weight`` [O, K] into pieces; rows are independent in all that is done to them."""
    rows = max(1, PIECE_BYTES // max(1, 4 * weight.shape[1]))
    return [slice(start, start + rows) for start in range(0, len(weight), rows)]


def _chosen_scale(weight: Array, share: Array, bits: int) -> Array:
    """Choose the scales of some rows; ``share`` float32 [1, blocks, columns of one]."""
    precision = INT4 if bits == INT4.bits else INT8
    blocked = weight.reshape(len(weight), *share.shape[1:])
    amax = np.abs(blocked).max(axis=2, keepdims=True)
    best_error = np.full(amax.shape, np.inf, np.float32)
    best = round_scale(np.where(amax > 0, amax, precision.quant_max) / precision.quant_max)
    for ratio in CLIP_RATIOS:
        scale = round_scale(ratio * amax / precision.quant_max)
        step = scale.astype(np.float32)
        error = _clipped_error(blocked, step, precision.quant_min, precision.quant_max)
        error = np.sum(share * np.square(error, out=error), axis=2, keepdims=True)
        better = (error < best_error) & (amax > 0)
        best = np.where(better, scale, best)
        best_error = np.where(better, error, best_error)
    return best[:, :, 0]


def choose_multiple_scale(weight: Array, importance: Array, block_scale: Array) -> tuple[Array, Array]:
    """Turn free INT4 block scales into integer multiples of one INT8 scale per channel, with the least error.

    Returns (block scales float16 [O, B], channel scales float16 [O]). Tries the multiples 8 to 15 for the
    largest block of a channel (our choice).
    """
    share = importance[None].astype(np.float32)
    found = [_chosen_multiple(weight[part], share, block_scale[part]) for part in _pieces(weight)]
    scales, channels = zip(*found)
    return np.concatenate(scales), np.concatenate(channels)


def _chosen_multiple(weight: Array, share: Array, block_scale: Array) -> tuple[Array, Array]:
    """Choose block scales and channel scales of some rows; ``share`` float32 [1, K]."""
    rows, columns = weight.shape
    blocks = block_scale.shape[1]
    wanted = block_scale.astype(np.float32)
    best_error = np.full(rows, np.inf, np.float32)
    best_scale = np.zeros((rows, blocks), np.float16)
    best_channel = np.ones(rows, np.float16)
    for largest in range(8, LARGEST_MULTIPLE + 1):
        channel = round_scale(wanted.max(axis=1) / largest)
        step = channel.astype(np.float32)[:, None]
        multiple = np.clip(np.rint(wanted / step), 1, LARGEST_MULTIPLE)
        column_step = _per_column(multiple * step, columns)
        error = _clipped_error(weight, column_step, INT4.quant_min, INT4.quant_max)
        error = np.sum(share * np.square(error, out=error), axis=1)
        better = error < best_error
        best_scale[better] = (multiple * step).astype(np.float16)[better]
        best_channel[better] = channel[better]
        best_error[better] = error[better]
    return best_scale, best_channel


def _clipped_error(weight: Array, step: Array, quant_min: int, quant_max: int) -> Array:
    """Return ``weight`` minus what it becomes in multiples of ``step``, in one array of its own."""
    codes = weight / step
    np.rint(codes, out=codes)
    np.clip(codes, quant_min, quant_max, out=codes)
    codes *= step
    return np.subtract(weight, codes, out=codes)


def round_to_nearest(weight: Array, step: Array, quant_min: int, quant_max: int) -> Array:
    """Return int8 codes [O, K] of ``weight`` for column steps float32 [O, K]."""
    return np.clip(np.rint(weight / step), quant_min, quant_max).astype(np.int8)


def damped(hessian: Array, damping: float) -> Array:
    """Return ``hessian`` [K, K] in float64 with every diagonal element raised by the share ``damping``.

    GPTQ adds a share of the diagonal's mean; ours is relative to each column, which shrinks all correlations alike, so
    that a few columns of large inputs do not damp all the others away. Columns that are always zero get the mean.
    """
    matrix = np.array(hessian, np.float64)
    diagonal = np.diagonal(matrix)
    positive = diagonal > 0
    mean = float(diagonal[positive].mean()) if positive.any() else 1.0
    # A column of hardly any input would leave the factor without accuracy.
    least = 1e-9 * mean
    matrix[np.diag_indices_from(matrix)] = np.where(positive, (1 + damping) * np.maximum(diagonal, least), mean)
    return matrix


def gptq_factor(hessian: Array, damping: float) -> Array:
    """Return the upper Cholesky factor U float32 [K, K] of the damped inverse Hessian, U^T U = H^-1.

    ``hessian``: mean of x x^T over the layer's inputs, damped by ``damped``.
    Source: Frantar et al., GPTQ (2023), section 3; the factor comes from one Cholesky of the reversed matrix.
    """
    matrix = damped(hessian, damping)
    lower = np.linalg.cholesky(matrix[::-1, ::-1])
    return np.asarray(_inverse_of_lower(lower)[::-1, ::-1], np.float32)


def _inverse_of_lower(lower: Array, base: int = 64) -> Array:
    """Invert a lower triangular matrix by halves: NumPy's own inverse does not use the zeros (three times the work)."""
    size = len(lower)
    if size <= base:
        return np.linalg.inv(lower)
    half = size // 2
    first, last = _inverse_of_lower(lower[:half, :half], base), _inverse_of_lower(lower[half:, half:], base)
    inverse = np.zeros_like(lower)
    inverse[:half, :half], inverse[half:, half:] = first, last
    inverse[half:, :half] = -last @ (lower[half:, :half] @ first)
    return inverse


@dataclass(frozen=True)
class RoundingProblem:
    """Rows of one weight under one number format: what ``gptq_codes`` rounds together with others."""

    weight: Array
    step: Array
    quant_min: int
    quant_max: int


def gptq_codes(problems: list[RoundingProblem], hessian: Array, damping: float, chunk: int = 32) -> list[Array]:
    """Round the weights of all ``problems`` ([O, K] each, one input, so one Hessian [K, K]) by GPTQ.

    Columns are visited by falling diagonal of the Hessian (GPTQ's act-order; the scales are fixed beforehand, so
    the order costs nothing at run time). Each output row is kept from GPTQ or from rounding to nearest, whichever
    has the smaller error e H e^T, so the result is never worse than nearest.
    """
    order = np.argsort(-np.diagonal(hessian), kind="stable")
    factor = gptq_factor(hessian[np.ix_(order, order)], damping)
    # Columns of the weight become contiguous rows: [K, R].
    remaining = np.ascontiguousarray(np.concatenate([p.weight for p in problems]).T[order], np.float32)
    step = np.ascontiguousarray(np.concatenate([p.step for p in problems]).T[order], np.float32)
    low = np.concatenate([np.full(len(p.weight), p.quant_min, np.float32) for p in problems])
    high = np.concatenate([np.full(len(p.weight), p.quant_max, np.float32) for p in problems])
    codes = np.empty(remaining.shape, np.int8)

    def nearest(i: int, wanted: Array) -> Array:
        code = np.clip(np.rint(wanted / step[i]), low, high)
        codes[i] = code
        return np.asarray(code * step[i])

    compensate(remaining, factor, nearest, chunk)
    restored = np.empty_like(codes)
    restored[order] = codes
    return _keep_better(problems, restored.T, hessian)


# (column, wanted values of all rows [R]) -> the values that they get.
Nearest = Callable[[int, Array], Array]


def compensate(remaining: Array, factor: Array, nearest: Nearest, chunk: int = 32) -> None:
    """GPTQ's pass over the columns of ``remaining`` [K, R] (overwritten): those that follow make up for each error.

    ``factor`` [K, K]: that of ``gptq_factor``. The number format is ``nearest``, which is called once per column.
    """
    columns = len(factor)
    for start in range(0, columns, chunk):
        stop = min(start + chunk, columns)
        errors = np.empty((stop - start, remaining.shape[1]), np.float32)
        for i in range(start, stop):
            error = (remaining[i] - nearest(i, remaining[i])) / factor[i, i]
            errors[i - start] = error
            remaining[i + 1 : stop] -= factor[i, i + 1 : stop, None] * error
        remaining[stop:] -= factor[start:stop, stop:].T @ errors


Rounded = tuple[Array, Array]


def refine_rounding(
    weight: Array, forms: list[Rounded], moments: list[Array], damping: float, rounds: int
) -> list[Rounded]:
    """Lower the error e H e^T of INT4 ``forms`` of one weight [O, K]: (codes [O, K], block scales [O, B]) each.

    Each round first fits all scales of a row to its codes by least squares, then visits every code once and moves it
    to the best level for the others as they stand (coordinate descent). ``moments``: the diagonal blocks of the
    Hessian, together K wide, damped here as for GPTQ. Neither step makes a row worse. Our choice.
    """
    hessians = [damped(block, damping).astype(np.float32) for block in moments]
    columns = weight.shape[1]
    for _ in range(rounds if forms else 0):
        scales = [_better_scales(weight, codes, scale, hessians) for codes, scale in forms]
        # All forms share the Hessian, so their rows are visited together.
        target = np.tile(weight, (len(forms), 1))
        codes = np.concatenate([codes for codes, _ in forms])
        step = np.concatenate([_per_column(scale.astype(np.float32), columns) for scale in scales])
        start = 0
        for block in hessians:
            span = slice(start, start + len(block))
            start += len(block)
            codes[:, span] = _descended(target[:, span], codes[:, span], step[:, span], block)
        forms = list(zip(np.split(codes, len(forms)), scales))
    return forms


def _errors(weight: Array, codes: Array, scale: Array, moments: list[Array]) -> Array:
    """Return e H e^T of every row, float32 [O]."""
    error = weight - codes * _per_column(scale.astype(np.float32), weight.shape[1])
    return np.asarray(np.einsum("ok,ok->o", _times(error, moments), error))


def _times(rows: Array, moments: list[Array]) -> Array:
    """Return rows [O, K] times the block-diagonal Hessian."""
    cuts = np.cumsum([len(block) for block in moments])[:-1]
    return np.concatenate([part @ block for part, block in zip(np.split(rows, cuts, axis=1), moments)], axis=1)


def _better_scales(weight: Array, codes: Array, scale: Array, moments: list[Array]) -> Array:
    """Fit the scales of some rows at a time: the normal equations of all rows of a wide layer take gigabytes."""
    rows = max(1, NORMAL_BYTES // (4 * scale.shape[1] ** 2))
    parts = [slice(start, start + rows) for start in range(0, len(weight), rows)]
    return np.concatenate([_better_scale(weight[p], codes[p], scale[p], moments) for p in parts])


def _better_scale(weight: Array, codes: Array, scale: Array, moments: list[Array]) -> Array:
    """Return the FP16 scales [O, B] with the least error for these codes; a row's old ones where they are better."""
    normal, wanted = _normal_equations(weight, codes.astype(np.float32), scale.shape[1], moments)
    # A block of zero codes leaves its scale open, and nearly equal blocks leave theirs ill-determined.
    ridge = 1e-6 * np.einsum("oii->o", normal) / scale.shape[1] + np.finfo(np.float32).tiny
    normal += ridge[:, None, None] * np.eye(scale.shape[1], dtype=np.float32)
    fitted = np.linalg.solve(normal, wanted[:, :, None])[:, :, 0]
    old = scale.astype(np.float32)
    sensible = np.isfinite(fitted) & (fitted > 0.5 * old) & (fitted < 2 * old)
    fitted = round_scale(np.where(sensible, fitted, old))
    before, after = (_errors(weight, codes, s, moments) for s in (scale, fitted))
    return np.where((after < before)[:, None], fitted, scale)


def _normal_equations(weight: Array, levels: Array, blocks: int, moments: list[Array]) -> tuple[Array, Array]:
    """Return c_i H c_j^T [O, B, B] and c_i H w^T [O, B]: c_i are a row's ``levels`` in block i, zero elsewhere."""
    rows, columns = weight.shape
    normal, wanted = np.zeros((rows, blocks, blocks), np.float32), np.zeros((rows, blocks), np.float32)
    of = np.arange(columns) // (columns // blocks)
    start = 0
    for hessian in moments:
        span = slice(start, start + len(hessian))
        start += len(hessian)
        block_of, local = of[span], levels[:, span]
        first, edges = block_of[0], np.flatnonzero(np.diff(block_of, prepend=-1))
        there = slice(first, first + len(edges))
        wanted[:, there] += np.add.reduceat((weight[:, span] @ hessian) * local, edges, axis=1)
        for block, low, high in zip(range(first, blocks), edges, [*edges[1:], len(hessian)]):
            product = (local[:, low:high] @ hessian[low:high]) * local
            normal[:, block, there] += np.add.reduceat(product, edges, axis=1)
    return normal, wanted


def _descended(weight: Array, codes: Array, step: Array, hessian: Array, chunk: int = 64) -> Array:
    """Visit every column once: set its codes [O, K] to the best level given all the others."""
    target, levels, step = (np.ascontiguousarray(a.T, np.float32) for a in (weight, codes, step))
    values = levels * step

    def nearest(i: int, wanted: Array) -> Array:
        levels[i] = np.clip(np.rint(wanted / step[i]), INT4.quant_min, INT4.quant_max)
        return np.asarray(levels[i] * step[i])

    descend(target, values, hessian, nearest, chunk)
    return np.asarray(levels.T, np.int8)


def descend(target: Array, values: Array, hessian: Array, nearest: Nearest, chunk: int = 64) -> None:
    """Visit every column of ``values`` [K, R] (overwritten) once: set it to the best for the others as they stand."""
    error = target - values
    for start in range(0, len(hessian), chunk):
        stop = min(start + chunk, len(hessian))
        slope = hessian[start:stop] @ error
        for i in range(start, stop):
            found = nearest(i, target[i] - error[i] + slope[i - start] / hessian[i, i])
            moved = values[i] - found
            error[i] += moved
            values[i] = found
            slope[i + 1 - start :] += hessian[i + 1 : stop, i, None] * moved


def _keep_better(problems: list[RoundingProblem], codes: Array, hessian: Array) -> list[Array]:
    """Take each row from GPTQ's ``codes`` [R, K] or from rounding to nearest, by the error e H e^T."""
    kept = []
    first = 0
    small = hessian.astype(np.float32)
    for problem in problems:
        by_gptq = np.ascontiguousarray(codes[first : first + len(problem.weight)])
        first += len(problem.weight)
        by_nearest = round_to_nearest(problem.weight, problem.step, problem.quant_min, problem.quant_max)
        losses = []
        for candidate in (by_gptq, by_nearest):
            error = problem.weight - candidate * problem.step
            losses.append(np.einsum("ok,ok->o", error @ small, error))
        kept.append(np.where((losses[0] <= losses[1])[:, None], by_gptq, by_nearest))
    return kept


def _per_column(scale: Array, columns: int) -> Array:
    """Repeat scales [O, B] to one per column, [O, columns]."""
    return np.repeat(scale, columns // scale.shape[1], axis=1)
