"""Noise schedules as diffusers computes them: betas, spacings of timesteps, conversions of sigmas.

Arithmetic follows torch's in float32 (products accumulate in float64), so that rounding agrees.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
# Zero terminal SNR keeps the last product from 0 by this: FP16's smallest value (as diffusers).
SMALLEST_ALPHA = 2.0**-24
KARRAS_RHO = 7.0  # Karras et al. 2022, table 1
BETA_SHAPE = 0.6  # Lee et al. 2024, "Beta sampling is all you need"


def even_float32(start: float, end: float, count: int) -> Array:
    """Return ``torch.linspace`` in float32: from both ends towards the middle."""
    if count == 1:
        return np.array([start], np.float32)
    first, last = np.float32(start), np.float32(end)
    # torch fuses multiplying and adding: float64 holds the product exactly.
    step = np.float64(np.float32((last - first) / np.float32(count - 1)))
    index = np.arange(count, dtype=np.float64)
    rising, falling = first + step * index, last - step * (count - 1 - index)
    return np.where(index < count // 2, rising, falling).astype(np.float32)


def rounded(function: Callable[[Any], Any], x: Any) -> Any:
    """Return ``function(x)`` in float32, rounded to nearest: NumPy's own last bit depends on the processor."""
    return np.float32(function(np.float64(x)))


def betas_of(config: Mapping[str, Any]) -> Array:
    """Return the betas [num_train_timesteps] float32 of a configuration."""
    count, start, end = config["num_train_timesteps"], config["beta_start"], config["beta_end"]
    kind = config["beta_schedule"]
    if config["trained_betas"] is not None:
        betas = np.asarray(config["trained_betas"], np.float32)
    elif kind == "linear":
        betas = even_float32(start, end, count)
    elif kind == "scaled_linear":
        betas = even_float32(start**0.5, end**0.5, count) ** 2
    elif kind == "sigmoid":
        curve = 1 / (1 + np.exp(-even_float32(-6, 6, count)))
        betas = curve * np.float32(end - start) + np.float32(start)
    else:
        betas = _from_alpha_bar(_laplace if kind == "laplace" else _cosine, count)
    return zero_terminal_snr(betas) if config["rescale_betas_zero_snr"] else betas


def _cosine(t: float) -> float:
    return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2


def _laplace(t: float) -> float:
    half = 0.5 - t
    snr = math.exp(-0.5 * math.copysign(1, half) * math.log(1 - 2 * math.fabs(half) + 1e-6))
    return math.sqrt(snr / (1 + snr))


def _from_alpha_bar(curve: Callable[[float], float], count: int) -> Array:
    pairs = ((i / count, (i + 1) / count) for i in range(count))
    return np.array([min(1 - curve(b) / curve(a), 0.999) for a, b in pairs], np.float32)


def products(betas: Array) -> Array:
    """Return the cumulative products of 1 - beta, float32."""
    return np.cumprod((np.float32(1) - betas).astype(np.float64)).astype(np.float32)


def products_of(config: Mapping[str, Any]) -> Array:
    """Return the products of a sampler that divides by the last one, which is not zero then."""
    alphas = products(betas_of(config))
    if config["rescale_betas_zero_snr"]:
        alphas[-1] = SMALLEST_ALPHA
    return alphas


def zero_terminal_snr(betas: Array) -> Array:
    """Rescale betas to zero SNR at the last timestep (Lin et al. 2023, algorithm 1)."""
    roots = np.sqrt(products(betas))
    first, last = roots[0], roots[-1]
    roots = (roots - last) * (first / (first - last))
    squares = roots**2
    alphas = np.concatenate([squares[:1], squares[1:] / squares[:-1]])
    return (np.float32(1) - alphas).astype(np.float32)


def spaced_timesteps(config: Mapping[str, Any], steps: int, last: int, more: int = 0) -> Array:
    """Return descending timesteps, float64.

    ``last``: number of usable training timesteps; ``more``: of the grid's points, 1 where the
    solver's grid has one more than steps and drops the smallest.
    """
    spacing, train = config["timestep_spacing"], config["num_train_timesteps"]
    if spacing == "linspace":
        return np.linspace(0, last - 1, steps + more)[::-1][:steps].astype(np.float64)
    if spacing == "leading":
        ratio = last // (steps + more)
        grid = np.arange(steps + more) * ratio
        return grid[::-1][:steps].astype(np.float64) + config["steps_offset"]
    return np.arange(last, 0, -train / steps).round().astype(np.float64) - 1


def sigmas_of(alphas: Array) -> Array:
    """Return sqrt((1 - alpha) / alpha), float32, of cumulative products."""
    return np.sqrt((np.float32(1) - alphas) / alphas).astype(np.float32)


def sigma_to_timestep(sigmas: Array, log_sigmas: Array) -> Array:
    """Return the timesteps, interpolated in log sigma, of each of ``sigmas``."""
    wanted = np.log(np.maximum(sigmas, 1e-10))
    low = np.searchsorted(log_sigmas, wanted, side="right") - 1
    low = np.clip(low, 0, len(log_sigmas) - 2)
    below, above = log_sigmas[low], log_sigmas[low + 1]
    weight = np.clip((below - wanted) / (below - above), 0, 1)
    timesteps: Array = (1 - weight) * low + weight * (low + 1)
    return timesteps


def converted_sigmas(config: Mapping[str, Any], sigmas: Array, steps: int) -> Array | None:
    """Return ``steps`` sigmas as Karras, exponential or beta; None where none of these is set.

    ``sigmas`` descend; their ends count unless sigma_min and sigma_max are set.
    """
    low, high = config.get("sigma_min"), config.get("sigma_max")
    low = float(sigmas[-1]) if low is None else low
    high = float(sigmas[0]) if high is None else high
    if config["use_karras_sigmas"]:
        ends = low ** (1 / KARRAS_RHO), high ** (1 / KARRAS_RHO)
        ramp = np.linspace(0, 1, steps)
        karras: Array = (ends[1] + ramp * (ends[0] - ends[1])) ** KARRAS_RHO
        return karras
    if config["use_exponential_sigmas"]:
        return np.exp(np.linspace(math.log(high), math.log(low), steps))
    if config["use_beta_sigmas"]:
        places = 1 - np.linspace(0, 1, steps)
        return np.array([low + _beta_quantile(place) * (high - low) for place in places])
    return None


def _beta_quantile(probability: float) -> float:
    """Return the quantile of Beta(0.6, 0.6), by bisection of its distribution."""
    if probability <= 0 or probability >= 1:
        return float(probability >= 1)
    if probability > 0.5:
        return 1 - _beta_quantile(1 - probability)
    low, high = 0.0, 0.5
    while True:
        middle = (low + high) / 2
        if middle in (low, high):
            return middle
        low, high = (middle, high) if _beta_below(middle) < probability else (low, middle)


def _beta_below(x: float) -> float:
    """Return P(X < x) for Beta(0.6, 0.6) and x <= 1/2: its hypergeometric series, which halves."""
    a = BETA_SHAPE
    norm = math.exp(math.lgamma(2 * a) - 2 * math.lgamma(a)) * x**a
    total, factor, n = 0.0, 1.0, 0
    while factor > 1e-18:
        total += factor / (a + n)
        n += 1
        factor *= (n - a) / n * x
    return norm * total


def thresholded(sample: Array, ratio: float, largest: float) -> Array:
    """Dynamic thresholding (Saharia et al. 2022) of each sample of [N, ...]."""
    flat = sample.reshape(len(sample), -1)
    limit = np.clip(np.quantile(np.abs(flat), ratio, axis=1, keepdims=True), 1, largest)
    limit = limit.astype(np.float32)
    clipped: Array = (np.clip(flat, -limit, limit) / limit).reshape(sample.shape)
    return clipped


def shifted(sigmas: Array, shift: float) -> Array:
    """Return flow sigmas moved towards noise by ``shift``."""
    moved: Array = shift * sigmas / (1 + (shift - 1) * sigmas)
    return moved


def time_shifted(sigmas: Array, mu: float, exponential: bool) -> Array:
    """Return flow sigmas shifted for a size: ``mu`` is the shift, or its logarithm."""
    factor = math.exp(mu) if exponential else mu
    moved: Array = factor / (factor + (1 / sigmas - 1))
    return moved


def stretched_to(sigmas: Array, terminal: float) -> Array:
    """Return flow sigmas stretched to end at ``terminal``."""
    rest = 1 - sigmas
    stretched: Array = 1 - rest / (rest[-1] / (1 - terminal))
    return stretched
