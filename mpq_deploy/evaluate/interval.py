"""Bootstrap intervals of a mean over images, and of the difference of two paired means.

In: a figure of each image. Out: low and high end of the 95 % interval. Seeded, so that a report
repeats.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# Our choices: draws of the bootstrap, its seed, and the level that every interval of a report has.
BOOTSTRAP_DRAWS = 2000
BOOTSTRAP_SEED = 0
LEVEL = 0.95
# How far in dB a whole interval must lie from no difference to settle which of two is better.
MARGIN_DB = 0.5


class Difference(NamedTuple):
    """The mean of one PSNR minus another, dB, image by image, and its interval."""

    mean: float
    low: float
    high: float

    @property
    def settled(self) -> bool:
        """Whether the interval leaves no doubt which of the two is better."""
        return self.low > MARGIN_DB or self.high < -MARGIN_DB


def mean_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Return the percentile bootstrap interval of the mean of ``values`` [N]; None below two.

    Efron 1979 ("Bootstrap methods: another look at the jackknife"); the percentiles are linear
    between draws. With few images it is somewhat too narrow.
    """
    sample = np.asarray(values, np.float64)
    if len(sample) < 2:
        return None
    drawn = np.random.default_rng(BOOTSTRAP_SEED).integers(
        0, len(sample), (BOOTSTRAP_DRAWS, len(sample))
    )
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(sample[drawn].mean(axis=1), [tail, 100 - tail])
    return float(low), float(high)


def paired_interval(
    values: Sequence[float], reference: Sequence[float]
) -> tuple[float, float] | None:
    """Return the interval of the mean of ``values`` - ``reference`` by image; None below two.

    Both come from the same noise, image for image: what makes an image hard for both cancels.
    """
    return mean_interval([value - other for value, other in zip(values, reference, strict=True)])
