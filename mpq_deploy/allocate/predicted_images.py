"""What a plan's entries say of the final images: their PSNR, its spread over images, before anything is built.

An image's entries are normal numbers whose variance is its squared error to first order. So the
logarithm of the mean of P squares is that of the error plus known noise, whose mean is taken off
and by whose variance the spread is narrowed around the mean. Our choice.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mpq_deploy.models.spec import Array

# Of the images' PSNR: the shares that lie below what is said.
SHARES = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9)
DB = 10 / np.log(10)
# An error of zero counts as this much of the mean (our choice).
SMALLEST = 1e-9


@dataclass(frozen=True)
class PredictedImages:
    """PSNR in dB of ``images`` trajectories: mean over them, of their mean error, and ``quantiles`` by ``SHARES``.

    ``limit_db``: the mean of everything in INT8, predicted in the same way; ``below``: the share of
    the images under it. None where not all of that was measured.
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
    """Predict from the relative squared errors of N trajectories, means over ``probes`` squares, float64 [N].

    ``mean_square``: of the images, whose peak is 1; ``controls``: the errors of everything in INT8.
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
    """Return the PSNR of each image without the probes' noise in mean and variance, float64 [N]."""
    floor = max(float(errors.mean()) * SMALLEST, 1e-300)
    noisy = -10 * np.log10(np.maximum(errors, floor) * mean_square)
    digamma, trigamma = _of_half(probes)
    mean = noisy.mean() + DB * (digamma - np.log(probes / 2))
    spread = float(noisy.var())
    left = np.sqrt(max(spread - DB**2 * trigamma, 0.0) / spread) if spread > 0 else 0.0
    return np.asarray(mean + left * (noisy - noisy.mean()))


def psnr_text(found: PredictedImages) -> str:
    """Say what is predicted of the images."""
    tenth = found.quantiles[SHARES.index(0.1)]
    text = (
        f"PSNR of the final images {found.psnr_db:.1f} dB (mean; {found.pooled_psnr_db:.1f} of the pooled error, "
        f"a tenth of the images below {tenth:.1f})"
    )
    if found.limit_db is None or found.below is None:
        return text
    return f"{text}, {found.below:.0%} of the images below the mean of everything in INT8, {found.limit_db:.1f}"


def _of_half(probes: int) -> tuple[float, float]:
    """Return digamma and trigamma of ``probes`` / 2: mean and variance of the logarithm of its squares."""
    at, digamma, trigamma = 1.0, -np.euler_gamma, np.pi**2 / 6
    if probes % 2:
        at, digamma, trigamma = 0.5, digamma - 2 * np.log(2), np.pi**2 / 2
    while at < probes / 2:
        digamma, trigamma, at = digamma + 1 / at, trigamma - 1 / at**2, at + 1
    return float(digamma), float(trigamma)
