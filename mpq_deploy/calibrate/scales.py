"""Choose the scale of an activation from a random sample and the exact absolute maximum.

INT8 quantizer: q = clip(round_half_even(x / scale), -128, 127) (QuantizeLinear); scales are FP16.
"""

from __future__ import annotations

import numpy as np

from mpq_deploy.errors import UsageError
from mpq_deploy.formats.interfaces import ActivationGrid
from mpq_deploy.formats.minifloat import Minifloat
from mpq_deploy.models.spec import Array

QUANT_MIN, QUANT_MAX = -128, 127
# The smallest normal FP16 number (for tensors that are always zero), and the largest one.
SMALLEST_SCALE = float(2.0**-14)
LARGEST_SCALE = 65504.0
# Clipping thresholds that are searched: from the absolute maximum down to 1/256 of it, in steps of
# 2**(1/8) (9 %), then in steps of 1 % around the best one (our choice; the error is flat around its
# minimum).
COARSE_RATIOS = 2.0 ** (-np.arange(65) / 8)
FINE_RATIOS = 1.0 + 0.01 * np.arange(-12, 13)
# The same for FP8 and smaller floats, relative to the absolute maximum over their largest value:
# from four octaves below to one above.
FLOAT_RATIOS = np.exp2(np.arange(-32, 9) / 8)
# Points for the tail of the distribution, between the sample's maximum and the exact one.
TAIL_POINTS = 16
# Sampled values that the costlier searches use: small floats and simulated grids (our choice).
SEARCH_POINTS = 4096


def activation_scale(
    method: str, sample: Array, amax: float, count: float, percentile: float = 99.99
) -> float:
    """Return the INT8 scale, a positive normal FP16 number, by ``method``: mse, percentile, absmax.

    ``sample`` float [R]: a uniform sample of ``count`` values, whose exact absolute maximum is
    ``amax``. Raises UsageError for an unknown method.
    """
    if amax == 0:
        return SMALLEST_SCALE
    if method == "absmax":
        return round_scale(amax / QUANT_MAX)
    if method == "percentile":
        return round_scale(float(np.percentile(np.abs(sample), percentile)) / QUANT_MAX)
    if method == "mse":
        points, weights = with_tail(sample, amax, count)
        return mse_scale(points, weights, amax)
    raise UsageError(f"The scale method is '{method}'.", "Choose one of mse, percentile, absmax.")


def round_scale(scale: float) -> float:
    """Round to the nearest FP16 number within the normal positive range."""
    return float(np.float16(np.clip(scale, SMALLEST_SCALE, LARGEST_SCALE)))


def with_tail(sample: Array, amax: float, count: float) -> tuple[Array, Array]:
    """Return points and weights (sum 1): the sample, and a tail up to ``amax``.

    By exchangeability a value exceeds the maximum of R sampled values with probability 1 / (R + 1);
    it reaches ``amax`` with probability 1 / ``count``. Between the two the survival function is
    taken as a power law (our choice: a heavier tail than most activations have, so the error is on
    the side of less clipping).
    """
    sample = np.asarray(sample, np.float64)
    largest = float(np.abs(sample).max(initial=0.0))
    if amax <= largest * (1 + 1e-6) or count <= len(sample) + 1:
        return sample, np.full(len(sample), 1.0 / max(len(sample), 1))
    beyond = 1.0 / (len(sample) + 1)
    start = max(largest, amax * 1e-6)
    edges = np.geomspace(start, amax, TAIL_POINTS + 1)
    survival = np.geomspace(beyond, 1.0 / count, TAIL_POINTS + 1)
    tail = np.append(np.sqrt(edges[1:] * edges[:-1]), amax)
    mass = np.append(-np.diff(survival), survival[-1])
    weights = np.append(np.full(len(sample), (1 - beyond) / max(len(sample), 1)), mass)
    return np.append(sample, tail), weights / weights.sum()


def mse_scale(
    points: Array, weights: Array, amax: float, limits: tuple[int, int] = (QUANT_MIN, QUANT_MAX)
) -> float:
    """Return the FP16 scale of minimum expected squared error, with codes in ``limits``."""
    coarse = _rounded(amax / limits[1] * COARSE_RATIOS)
    best = coarse[np.argmin(quantization_error(points, weights, coarse, limits))]
    fine = _rounded(best * FINE_RATIOS)
    return float(fine[np.argmin(quantization_error(points, weights, fine, limits))])


def float_scale(minifloat: Minifloat, sample: Array, amax: float, count: float) -> float:
    """Return the FP16 scale of minimum expected squared error for the levels of ``minifloat``.

    Other arguments as for ``activation_scale``. A float's relative precision hardly depends on the
    scale: the search decides the clipping, and where in an octave the largest values lie.
    """
    if amax == 0:
        return SMALLEST_SCALE
    points, weights = with_tail(sample[:: -(-len(sample) // SEARCH_POINTS)], amax, count)
    x, scales = np.asarray(points, np.float32), _rounded(amax / minifloat.largest * FLOAT_RATIOS)
    missed = [x - minifloat.nearest(x / scale, np) * scale for scale in scales]
    errors = [float(np.square(part, dtype=np.float64) @ weights) for part in missed]
    return float(scales[int(np.argmin(errors))])


def simulated_grid(bits: int, sample: Array, amax: float, count: float) -> ActivationGrid:
    """Return the grid of 2^``bits`` levels, zero included, with the minimum expected squared error.

    ``sample``, ``amax`` and ``count`` as for ``activation_scale``. The tail beyond the sample has
    the sign of the sample's largest magnitude (our choice). At most 17 zero points are tried, which
    put none to half of the levels on the side opposite to that sign. Uses at most about
    ``SEARCH_POINTS`` of the sample.
    """
    levels = 2**bits - 1
    if amax == 0:
        return ActivationGrid(SMALLEST_SCALE, 0, levels)
    sign = 1.0 if sample[np.argmax(np.abs(sample))] >= 0 else -1.0
    points, weights = with_tail(sign * sample[:: -(-len(sample) // SEARCH_POINTS)], amax, count)
    best, lowest = (
        ActivationGrid(round_scale(2 * amax / levels), -(levels // 2), levels - levels // 2),
        np.inf,
    )
    for below in np.unique(
        np.rint(np.linspace(0, (levels + 1) / 2, min(17, 2 ** (bits - 1) + 1))).astype(int)
    ):
        limits = (-int(below), levels - int(below))
        scale = mse_scale(points, weights, amax, limits)
        error = float(quantization_error(points, weights, np.array([scale]), limits)[0])
        if error < lowest:
            low, high = limits if sign > 0 else (-limits[1], -limits[0])
            best, lowest = ActivationGrid(scale, low, high), error
    return best


def quantization_error(
    points: Array, weights: Array, scales: Array, limits: tuple[int, int] = (QUANT_MIN, QUANT_MAX)
) -> Array:
    """Return the weighted mean squared error of the quantizer for each of ``scales``, float64 [S].

    Computed in float32, relative to the largest point, so that nothing overflows.
    """
    unit = float(np.abs(points).max(initial=0.0)) or 1.0
    x = np.asarray(points / unit, np.float32)
    step = np.asarray(np.asarray(scales, np.float64)[:, None] / unit, np.float32)
    codes = x / step
    np.rint(codes, out=codes)
    np.clip(codes, *limits, out=codes)
    codes *= step
    codes -= x
    return unit**2 * np.asarray(
        np.square(codes, out=codes) @ np.asarray(weights, np.float32), np.float64
    )


def _rounded(scales: Array) -> Array:
    return np.unique(np.clip(scales, SMALLEST_SCALE, LARGEST_SCALE).astype(np.float16)).astype(
        np.float32
    )
