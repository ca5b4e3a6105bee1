"""Paired image metrics: how far a variant's images are from the float model's.

In: two batches of samples [N, C, H, W] and the range that their pixels live in. Out: PSNR in dB and
SSIM. All arithmetic is in float64 on values clipped to the range and mapped to [0, 1], so that the
peak is 1.
"""

from __future__ import annotations

import math

import numpy as np

from mpq_deploy.errors import ModelError
from mpq_deploy.models.spec import Array

# Wang, Bovik, Sheikh, Simoncelli 2004, "Image quality assessment", section III.C: window, sigma, K1
# and K2.
SSIM_WINDOW = 11
SSIM_SIGMA = 1.5
SSIM_K1 = 0.01
SSIM_K2 = 0.03


def to_unit(samples: Array, value_range: tuple[float, float]) -> Array:
    """Clip ``samples`` to ``value_range`` and map it to [0, 1], float64."""
    low, high = value_range
    if not high > low:
        raise ModelError(
            f"The pixel range is [{low:g}, {high:g}].",
            "Give a range whose end is above its start, such as [-1, 1].",
        )
    return np.clip((np.asarray(samples, np.float64) - low) / (high - low), 0.0, 1.0)


def to_uint8(samples: Array, value_range: tuple[float, float]) -> Array:
    """Return [N, C, H, W] samples as pixels, uint8 [N, H, W, C]."""
    pixels = np.rint(to_unit(samples, value_range) * 255.0).astype(np.uint8)
    return np.ascontiguousarray(pixels.transpose(0, 2, 3, 1))


def as_maps(values: Array) -> Array:
    """Return outputs as [N, C, H, W]: tokens [N, T, C] as one map, frames [N, C, F, H, W] below each other."""
    if values.ndim == 4:
        return values
    if values.ndim > 4:
        return values.reshape(*values.shape[:2], -1, values.shape[-1])
    return values.reshape(len(values), 1, -1, values.shape[-1] if values.ndim > 1 else 1)


def is_picture(images: Array) -> bool:
    """Whether ``images`` are pictures in [0, 1]: [N, C, H, W], as maps."""
    shaped = images.ndim == 4 and images.shape[1] in (1, 3, 4)
    return shaped and bool(images.min() >= 0 and images.max() <= 1)


def data_range(reference: Array) -> tuple[float, float]:
    """Return the range of samples that are not images (latents), so that their peak can be 1 too.

    A constant reference has no range of its own; it gets one of width 1 [our choice].
    """
    low, high = float(np.min(reference)), float(np.max(reference))
    return (low, high) if high > low else (low, low + 1.0)


# An image equal to its reference counts as this much in a mean over images (our choice): far above
# any difference that 32-bit floats of a denoised image show.
EQUAL_IMAGE_DB = 120.0


def psnr_db(reference: Array, images: Array) -> float:
    """Mean over images of each one's PSNR, in dB; both [N, ...] in [0, 1], so the peak is 1.

    The convention of the field (each image pair has its PSNR). An equal pair counts as
    ``EQUAL_IMAGE_DB``; ``inf`` when all are equal. See ``pooled_psnr_db`` for the other convention.
    """
    _same_shape(reference, images)
    if np.array_equal(np.asarray(reference, np.float64), np.asarray(images, np.float64)):
        return math.inf
    return float(np.mean(psnr_db_each(reference, images)))


def psnr_db_each(reference: Array, images: Array) -> Array:
    """PSNR of each image, in dB, float64 [N]; both [N, ...] in [0, 1]. An equal pair has ``EQUAL_IMAGE_DB``."""
    _same_shape(reference, images)
    difference = np.asarray(reference, np.float64) - np.asarray(images, np.float64)
    errors = np.square(difference).reshape(len(difference), -1).mean(axis=1)
    floor = 10.0 ** (-EQUAL_IMAGE_DB / 10)
    return np.asarray(-10.0 * np.log10(np.maximum(errors, floor)))


def pooled_psnr_db(reference: Array, images: Array) -> float:
    """PSNR of the mean squared error over all images together, in dB; ``inf`` when all are equal.

    One image that takes another path dominates it: it is the stricter figure, and reported beside
    ``psnr_db``.
    """
    _same_shape(reference, images)
    error = float(
        np.mean(np.square(np.asarray(reference, np.float64) - np.asarray(images, np.float64)))
    )
    return math.inf if error == 0.0 else -10.0 * math.log10(error)


def ssim(reference: Array, images: Array) -> float:
    """Mean structural similarity of [N, C, H, W] images in [0, 1] (Wang et al. 2004, equation 13).

    Gaussian window of 11 x 11 pixels, sigma 1.5, population statistics, only where the whole window
    lies in the image; each channel by itself, then the mean over positions, channels and images.
    Images smaller than the window get the largest odd window that fits [our choice].
    """
    return float(np.mean(ssim_each(reference, images)))


def ssim_each(reference: Array, images: Array) -> Array:
    """Structural similarity of each image, float64 [N]: see ``ssim``, which is their mean."""
    _same_shape(reference, images)
    x, y = np.asarray(reference, np.float64), np.asarray(images, np.float64)
    kernel = gaussian_kernel(_window(min(x.shape[-2:])), SSIM_SIGMA)
    mean_x, mean_y = _blur(x, kernel), _blur(y, kernel)
    variance_x = _blur(x * x, kernel) - mean_x**2
    variance_y = _blur(y * y, kernel) - mean_y**2
    covariance = _blur(x * y, kernel) - mean_x * mean_y
    c1, c2 = SSIM_K1**2, SSIM_K2**2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return np.asarray((luminance * structure).reshape(len(x), -1).mean(axis=1))


def gaussian_kernel(size: int, sigma: float) -> Array:
    """Return a normalised Gaussian, float64 [size]."""
    offsets = np.arange(size, dtype=np.float64) - (size - 1) / 2
    weights = np.exp(-0.5 * (offsets / sigma) ** 2)
    return np.asarray(weights / weights.sum())


def _window(smallest_side: int) -> int:
    largest_odd = smallest_side if smallest_side % 2 else smallest_side - 1
    return max(1, min(SSIM_WINDOW, largest_odd))


def _blur(images: Array, kernel: Array) -> Array:
    """Filter the last two axes with a separable kernel, valid positions only."""
    for axis in (-1, -2):
        images = np.lib.stride_tricks.sliding_window_view(images, kernel.size, axis=axis) @ kernel
    return images


def _same_shape(reference: Array, images: Array) -> None:
    if reference.shape != images.shape or reference.size == 0:
        raise ModelError(
            f"Images of shape {list(images.shape)} cannot be compared with a reference of shape "
            f"{list(reference.shape)}.",
            "Both batches must be made from the same noise, and hold at least one image.",
        )
