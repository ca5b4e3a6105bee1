"""Which quantizers of a convolution's input may shift its channels, and how a shift is chosen.

TensorRT takes INT8 without zero points, so half of the codes of what comes out of a SiLU are never
used. A constant per channel is taken off before the quantizer, and what the rounded weight makes of
it is added to the product: nothing but the codes changes. The constants are whole codes, so zeros,
those of the padding among them, stay zeros. Outlier Suppression+ (arXiv 2304.09145) shifts
activations of language models so; shifts that move with the range are our choice.
"""

from __future__ import annotations

import numpy as np

from mpq_deploy.formats.branches.prescaled import TENTHS
from mpq_deploy.formats.ranges import DYNAMIC, RANGES, SMALLEST_RATIO, ActivationRange
from mpq_deploy.models.spec import Array

# Forms of activations that may be shifted, with their range and the row of their factors (None: no
# factors): all INT8 ones but the plain static one, which needs no bias of the layer's own.
SHIFTABLE: dict[str, tuple[ActivationRange, int | None]] = {
    kind.suffix + (f"+scale{TENTHS[row]}" if row is not None else ""): (kind, row)
    for kind in RANGES
    for row in (None, *range(len(TENTHS)))
    if kind.moves or row is not None
}
SHIFT_FORMS = tuple(SHIFTABLE)
# A shift is taken where it makes steps at least so much finer (our choice).
FINER = 0.85
# Samples of a narrower range than their timestep's go beyond what is known of their channels: so
# much is left for them (measured: docs/activation-ranges.md).
MARGIN = 1.1


def centres(high: Array, low: Array, kind: ActivationRange) -> tuple[Array, float, float]:
    """Return the middle of each channel's range, float64 [C], the widest half range and magnitude.

    ``high`` and ``low`` float [K, C]: the ends of each channel's range by timestep, zero within.
    Both are in units of the widest magnitude at a timestep where the range moves.
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
    """Return the whole codes nearest to each channel's ``middle``, int16 [C]."""
    return (
        np.rint(np.asarray(middle, np.float64) / scale).clip(-(2**15), 2**15 - 1).astype(np.int16)
    )


def middle_of(codes: Array, scale: float) -> Array:
    """Return what is taken off each channel, float32 [C] of FP16 values."""
    return np.asarray(codes * np.float64(scale)).astype(np.float16).astype(np.float32)
