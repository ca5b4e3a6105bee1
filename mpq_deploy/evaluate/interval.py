"""Intervals of a mean over images, of the difference of two paired means, and of an error over calls.

In: a figure of each image or call. Out: low and high end of the 95 % interval. Bootstraps are
seeded, so that a report repeats.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np

from mpq_deploy.models.spec import Array

# Our choices: draws of the bootstrap, its seed, and the level that every interval of a report has.
BOOTSTRAP_DRAWS = 2000
BOOTSTRAP_SEED = 0
LEVEL = 0.95
# Steps of the integral behind Student's quantiles, which are good to six digits.
ANGLES = 100_001
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


def error_interval(values: Array, owners: Array) -> tuple[float, float] | None:
    """Return the interval of the mean of ``values`` float [K, N] >= 0, a row per timestep.

    ``owners`` int [K, N]: the call or image that each is of. Student's t interval of the mean's
    logarithm (our choice: errors are skewed). Timesteps are strata; values of one owner depend on
    each other, at all its timesteps, so the variance is that of sums over owners (Liang and Zeger
    1986). On simulated errors it covers 93 to 95 % with six owners a timestep and more, 88 to 91 % with
    two or three. None where a timestep has one owner alone, and for a mean of 0.
    """
    values = np.asarray(values, np.float64)
    sizes = np.array([len(np.unique(row)) for row in owners])
    mean = values.mean()
    if sizes.min() < 2 or not mean > 0:
        return None
    roots = np.sqrt(sizes / (sizes - 1))[:, None]
    rest = roots * (values - values.mean(axis=1, keepdims=True)) / values.size
    _, numbers = np.unique(owners, return_inverse=True)
    sums = np.bincount(numbers.reshape(-1), weights=rest.reshape(-1))
    squares = np.square(sums)
    if not squares.sum() > 0:
        return float(mean), float(mean)
    # A few owners with most of the variance tell as little as few owners do: 3 (sum u^2)^2 / sum u^4
    # is about their number for normal sums.
    effective = 3 * squares.sum() ** 2 / np.square(squares).sum()
    freedom = min(len(sums) - 1, int(sizes.sum()) - len(sizes), int(effective))
    half = student_quantile(freedom, (1 - LEVEL) / 2) * float(np.sqrt(squares.sum()) / mean)
    return float(mean * math.exp(-half)), float(mean * math.exp(half))


@cache
def student_quantile(freedom: int, tail: float) -> float:
    """Return what Student's t of so many degrees of ``freedom`` exceeds with probability ``tail`` below 1/2.

    t = sqrt(freedom) tan(angle), where the angle has a density that goes with cos(angle)^(freedom - 1).
    """
    angles = np.linspace(0, np.pi / 2, ANGLES)
    density = np.cos(angles) ** (freedom - 1)
    below = np.append(0, np.cumsum(density[1:] + density[:-1]))
    angle = np.interp((1 - 2 * tail) * below[-1], below, angles)
    return float(np.sqrt(freedom) * np.tan(angle))


def ends_text(ends: tuple[float, float] | None) -> str:
    """Return the ends of an error's interval in brackets, behind its figure; empty without one."""
    return "" if ends is None else f" ({ends[0]:.2e} to {ends[1]:.2e})"
