"""Noise schedules: from a diffusers scheduler configuration to the cumulative signal power of every timestep."""

from __future__ import annotations

from typing import Any

import numpy as np

from mpq_deploy.errors import UsageError, nearest
from mpq_deploy.models.spec import Array

# Ho et al. 2020, section 4: the defaults of every diffusers scheduler.
BETA_START, BETA_END, TRAIN_TIMESTEPS = 1e-4, 0.02, 1000
# Nichol & Dhariwal 2021, equation 17: the offset of the cosine schedule and the largest beta it may give.
COSINE_OFFSET, LARGEST_BETA = 0.008, 0.999
# The range over which the sigmoid schedule of GeoDiff is sampled.
SIGMOID_RANGE = 6.0
SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")


def betas_from_config(config: dict[str, Any]) -> Array:
    """Return the betas of a scheduler configuration, float32 [train timesteps].

    Raises UsageError for a schedule that is not one of ``SCHEDULES``.
    """
    if config.get("trained_betas") is not None:
        betas = np.asarray(config["trained_betas"], np.float32)
    else:
        betas = _named_schedule(config).astype(np.float32)
    return _rescaled_to_zero_snr(betas) if config.get("rescale_betas_zero_snr") else betas


def alphas_cumprod(config: dict[str, Any]) -> Array:
    """Return the signal power alpha-bar of every timestep, float32 [train timesteps].

    Models are trained with schedules held in float32 (1 - 0.999 is rounded by 6e-5 there), so the same roundings
    are made here; only the product itself is accumulated in double precision, as torch does.
    """
    return _cumulative(betas_from_config(config))


def _cumulative(betas: Array) -> Array:
    alphas = np.float32(1.0) - betas
    return np.cumprod(alphas.astype(np.float64)).astype(np.float32)


def _named_schedule(config: dict[str, Any]) -> Array:
    count = int(config.get("num_train_timesteps", TRAIN_TIMESTEPS))
    start, end = float(config.get("beta_start", BETA_START)), float(config.get("beta_end", BETA_END))
    schedule = config.get("beta_schedule", "linear")
    if schedule == "linear":
        return np.linspace(start, end, count)
    if schedule == "scaled_linear":
        return np.square(np.linspace(start**0.5, end**0.5, count, dtype=np.float32))
    if schedule == "squaredcos_cap_v2":
        edges = (np.arange(count + 1) / count + COSINE_OFFSET) / (1 + COSINE_OFFSET)
        power = np.cos(edges * np.pi / 2) ** 2
        return np.asarray(np.minimum(1 - power[1:] / power[:-1], LARGEST_BETA))
    if schedule == "sigmoid":
        logistic = 1 / (1 + np.exp(-np.linspace(-SIGMOID_RANGE, SIGMOID_RANGE, count)))
        return np.asarray(logistic * (end - start) + start)
    raise UsageError(
        f"The scheduler's beta_schedule is '{schedule}', which the built-in DDIM does not know.",
        f"{nearest(str(schedule), SCHEDULES)}Known: {', '.join(SCHEDULES)}, or trained_betas.",
    )


def _rescaled_to_zero_snr(betas: Array) -> Array:
    """Shift and scale sqrt(alpha-bar) so that the last timestep is pure noise (Lin et al. 2023, algorithm 1)."""
    root = np.sqrt(_cumulative(betas))
    first, last = root[0], root[-1]
    root = (root - last) * (first / (first - last))
    power = np.square(root)
    alphas = np.concatenate([power[:1], power[1:] / power[:-1]])
    return np.asarray(np.float32(1.0) - alphas, np.float32)
