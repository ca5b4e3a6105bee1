"""Channel shifts of a convolution's quantized input: which quantizers have them, and the choice.

TensorRT has no zero points in INT8, so about half of the codes are never used for the output of a
SiLU. Therefore a constant per channel is subtracted before the quantizer, and the rounded weight
times that constant is added to the output: only the codes change. The constants are whole codes, so
that zeros, including those of the padding, stay exact. Outlier Suppression+ (arXiv 2304.09145)
shifts activations of language models; shifts that move with the range are our choice.
"""

from __future__ import annotations

import numpy as np

from mpq_deploy.formats.branches.prescaled import TENTHS
from mpq_deploy.formats.ranges import DYNAMIC, RANGES, SMALLEST_RATIO, ActivationRange
from mpq_deploy.models.spec import Array

# Activation form -> its range and the index of its channel factors (None: no factors). All INT8
# forms may be shifted except plain static INT8, which needs no bias of the layer's own.
SHIFTABLE: dict[str, tuple[ActivationRange, int | None]] = {
    kind.suffix + (f"+scale{TENTHS[row]}" if row is not None else ""): (kind, row)
    for kind in RANGES
    for row in (None, *range(len(TENTHS)))
    if kind.moves or row is not None
}
SHIFT_FORMS = tuple(SHIFTABLE)
# A shift is used where it multiplies the scale by at most this (our choice).
FINER = 0.85
# With dynamic ranges, a sample whose range is narrower than its timestep's may exceed the known
# range of a channel: the scale is enlarged by this margin (measured: docs/activation-ranges.md).
MARGIN = 1.1


def centres(high: Array, low: Array, kind: ActivationRange) -> tuple[Array, float, float]:
    """Return each channel's middle, float64 [C], the largest half range, and the largest magnitude.

    ``high`` and ``low`` float [K, C]: the ends of each channel's range by timestep, which includes
    0. Where the range moves, middle and half range are of the input divided by its ratio.
    """
    widest = np.maximum(high, -low).max(axis=1, initial=0.0)
    largest = float(widest.max(initial=0.0))
    ratios = np.ones_like(widest)
    if kind.moves and largest:
        ratios = np.maximum(widest / largest, SMALLEST_RATIO)
    above, below = (high / ratios[:, None]).max(axis=0), (low / ratios[:, None]).min(axis=0)
    half = float((above - below).max(initial=0.0)) / 2
    return (above + below) / 2, half * (MARGIN if kind is DYNAMIC else 1.0), largest


def shift_codes(middle: Array, scale: float) -> Array:
    """Return each channel's ``middle`` rounded to whole codes, int16 [C]."""
    return (
        np.rint(np.asarray(middle, np.float64) / scale).clip(-(2**15), 2**15 - 1).astype(np.int16)
    )


def middle_of(codes: Array, scale: float) -> Array:
    """Return the constants to subtract from the channels, FP16 values as float32 [C]."""
    return np.asarray(codes * np.float64(scale)).astype(np.float16).astype(np.float32)
