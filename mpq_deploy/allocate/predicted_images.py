"""Predict the PSNR of the final images, and its spread over images, from a plan's projections.

To first order an image's projections are normally distributed with its squared error as variance.
So the logarithm of the mean of P squares is the logarithm of the error plus noise of known mean and
variance: the mean is subtracted, and the spread over images reduced by the variance. Our choice.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mpq_deploy.models.spec import Array

# The quantiles of the images' PSNR that are reported.
SHARES = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9)
DB = 10 / np.log(10)
# Smallest error of an image, relative to the mean error: avoids an infinite PSNR (our choice).
SMALLEST = 1e-9


@dataclass(frozen=True)
class PredictedImages:
    """Predicted PSNR in dB of ``images`` trajectories.

    ``psnr_db``: mean over images; ``pooled_psnr_db``: that of the mean error; ``quantiles``: by
    ``SHARES``. ``limit_db``: the mean of everything in INT8, predicted in the same way; ``below``:
    the share of images under that limit; None where INT8 was not measured.
    """

    images: int
    psnr_db: float
    pooled_psnr_db: float
    quantiles: tuple[float, ...]
    limit_db: float | None = None
    below: float | None = None


def predicted_images(
    errors: Array, probes: int, mean_square: float, controls: Array | None = None
) -> PredictedImages:
    """Predict from ``errors`` float64 [N]: relative squared errors, means over ``probes`` squares.

    ``mean_square``: of the images, with peak 1; ``controls`` [N]: errors of everything in INT8.
    """
    each = psnr_of(errors, probes, mean_square)
    limit = None if controls is None else float(psnr_of(controls, probes, mean_square).mean())
    return PredictedImages(
        images=len(each),
        psnr_db=float(each.mean()),
        pooled_psnr_db=float(-10 * np.log10(max(errors.mean() * mean_square, 1e-300))),
        quantiles=tuple(float(value) for value in np.quantile(each, SHARES)),
        limit_db=limit,
        below=None if limit is None else float((each < limit).mean()),
    )


def psnr_of(errors: Array, probes: int, mean_square: float) -> Array:
    """Return each image's PSNR float64 [N], mean and variance corrected for the probes' noise."""
    floor = max(float(errors.mean()) * SMALLEST, 1e-300)
    noisy = -10 * np.log10(np.maximum(errors, floor) * mean_square)
    digamma, trigamma = _of_half(probes)
    mean = noisy.mean() + DB * (digamma - np.log(probes / 2))
    spread = float(noisy.var())
    left = np.sqrt(max(spread - DB**2 * trigamma, 0.0) / spread) if spread > 0 else 0.0
    return np.asarray(mean + left * (noisy - noisy.mean()))


def psnr_text(found: PredictedImages) -> str:
    """Return a sentence on the predicted images."""
    tenth = found.quantiles[SHARES.index(0.1)]
    text = (
        f"PSNR of the final images {found.psnr_db:.1f} dB (mean; {found.pooled_psnr_db:.1f} of the pooled error, "
        f"a tenth of the images below {tenth:.1f})"
    )
    if found.limit_db is None or found.below is None:
        return text
    return f"{text}, {found.below:.0%} of the images below the mean of everything in INT8, {found.limit_db:.1f}"


def _of_half(probes: int) -> tuple[float, float]:
    """Return digamma and trigamma of ``probes`` / 2: moments of a log chi-squared variable."""
    at, digamma, trigamma = 1.0, -np.euler_gamma, np.pi**2 / 6
    if probes % 2:
        at, digamma, trigamma = 0.5, digamma - 2 * np.log(2), np.pi**2 / 2
    while at < probes / 2:
        digamma, trigamma, at = digamma + 1 / at, trigamma - 1 / at**2, at + 1
    return float(digamma), float(trigamma)
