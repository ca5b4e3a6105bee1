"""DDIM (Song et al. 2021, equation 12, eta = 0) in NumPy, without torch or diffusers."""

from __future__ import annotations

from typing import Any

import numpy as np

from mpq_deploy.errors import UsageError, nearest
from mpq_deploy.models.spec import Array

# Ho et al. 2020, section 4: the defaults of every diffusers scheduler.
BETA_START, BETA_END, TRAIN_TIMESTEPS = 1e-4, 0.02, 1000
# Nichol & Dhariwal 2021, equation 17: offset of the cosine schedule, and its largest beta.
COSINE_OFFSET, LARGEST_BETA = 0.008, 0.999
# The range over which the sigmoid schedule of GeoDiff is sampled.
SIGMOID_RANGE = 6.0
SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")
PREDICTIONS = ("epsilon", "v_prediction", "sample")
SPACINGS = ("leading", "trailing", "linspace")
# diffusers clips by default only for these classes; latents must not be clipped.
CLIPPING_CLASSES = ("DDIMScheduler", "DDPMScheduler")
# Imagen's dynamic thresholding (Saharia et al. 2022, section 2.3), as diffusers sets it by default.
THRESHOLD_QUANTILE, THRESHOLD_LIMIT = 0.995, 1.0


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

    Models are trained with schedules held in float32 (1 - 0.999 is rounded by 6e-5 there), so the
    same roundings are made here; only the product itself is accumulated in double precision, as
    torch does.
    """
    return _cumulative(betas_from_config(config))


def _cumulative(betas: Array) -> Array:
    alphas = np.float32(1.0) - betas
    return np.cumprod(alphas.astype(np.float64)).astype(np.float32)


def _named_schedule(config: dict[str, Any]) -> Array:
    count = int(config.get("num_train_timesteps", TRAIN_TIMESTEPS))
    start, end = (
        float(config.get("beta_start", BETA_START)),
        float(config.get("beta_end", BETA_END)),
    )
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
        f"The scheduler's beta_schedule is '{schedule}', which the built-in DDIM does not support.",
        f"{nearest(str(schedule), SCHEDULES)}Known: {', '.join(SCHEDULES)}, or trained_betas.",
    )


def _rescaled_to_zero_snr(betas: Array) -> Array:
    """Shift and scale sqrt(alpha-bar) so that the last timestep is noise (Lin et al. 2023)."""
    root = np.sqrt(_cumulative(betas))
    first, last = root[0], root[-1]
    root = (root - last) * (first / (first - last))
    power = np.square(root)
    alphas = np.concatenate([power[:1], power[1:] / power[:-1]])
    return np.asarray(np.float32(1.0) - alphas, np.float32)


def spaced_timesteps(config: dict[str, Any], steps: int) -> Array:
    """Return the timesteps of ``steps`` steps in denoising order, int64 (Lin et al. 2023, table 2).

    Raises UsageError for more steps than train timesteps, or an offset outside their range.
    """
    count = int(config.get("num_train_timesteps", 1000))
    if not 1 <= steps <= count:
        raise UsageError(
            f"Invalid number of sampling steps: {steps}.",
            f"The scheduler has {count} timesteps: choose 1 to {count}.",
        )
    spacing = str(config.get("timestep_spacing", "leading"))
    if spacing == "linspace":
        timesteps = np.linspace(0, count - 1, steps).round()[::-1]
    elif spacing == "leading":
        timesteps = (np.arange(steps) * (count // steps))[::-1] + int(config.get("steps_offset", 0))
    elif spacing == "trailing":
        timesteps = np.round(np.arange(count, 0, -count / steps)) - 1
    else:
        raise UsageError(
            f"The scheduler's timestep_spacing is '{spacing}'.",
            f"{nearest(spacing, SPACINGS)}Known: {', '.join(SPACINGS)}.",
        )
    if timesteps[0] >= count:
        raise UsageError(
            f"{steps} steps with steps_offset {config.get('steps_offset')} start at timestep {int(timesteps[0])}.",
            f"The scheduler has timesteps 0 to {count - 1}: use fewer steps.",
        )
    return np.asarray(timesteps, np.int64)


class DdimSampler:
    """Deterministic DDIM over the betas of a diffusers configuration."""

    init_noise_sigma = 1.0

    def __init__(self, config: dict[str, Any], steps: int) -> None:
        self.prediction_type = str(config.get("prediction_type", "epsilon"))
        if self.prediction_type not in PREDICTIONS:
            raise UsageError(
                f"The scheduler's prediction_type is '{self.prediction_type}', which DDIM cannot sample.",
                f"{nearest(self.prediction_type, PREDICTIONS)}Known: {', '.join(PREDICTIONS)}.",
            )
        self._config = config
        self._power = alphas_cumprod(config)
        integers = spaced_timesteps(config, steps)
        self.timesteps: Array = integers.astype(np.float64)
        self._current = self._power[integers]
        if self.prediction_type == "epsilon" and not self._current.all():
            raise UsageError(
                "The scheduler reaches pure noise (rescale_betas_zero_snr) but the model predicts the noise, "
                "which gives no image at the first step.",
                "Use a v_prediction model, or timestep_spacing 'leading'.",
            )
        previous = integers - len(self._power) // steps
        last = np.float32(1.0) if config.get("set_alpha_to_one", True) else self._power[0]
        self._previous = np.where(previous >= 0, self._power[np.maximum(previous, 0)], last)
        self.name = f"DDIM, eta 0, {len(integers)} steps, {self.prediction_type} (built in)"

    def scale_model_input(self, x: Array, step_index: int) -> Array:
        """Return ``x`` as it is: DDIM does not scale."""
        return x

    def step(self, model_output: Array, step_index: int, x: Array) -> Array:
        """Return the sample of the next, less noisy timestep; float32 [N, ...] in and out."""
        return np.asarray(self.move(model_output, step_index, x), np.float32)

    def scale(self, x: Any, step_index: int) -> Any:
        """Do as ``scale_model_input`` does."""
        return x

    def move(self, model_output: Any, step_index: int, x: Any) -> Any:
        """Do as ``step`` does, on arrays or on tensors of torch, which it can be differentiated on."""
        signal, noise = _roots(self._current[step_index])
        if self.prediction_type == "epsilon":
            clean, epsilon = (x - noise * model_output) / signal, model_output
        elif self.prediction_type == "sample":
            clean, epsilon = model_output, (x - signal * model_output) / noise
        else:
            clean, epsilon = signal * x - noise * model_output, signal * model_output + noise * x
        next_signal, next_noise = _roots(self._previous[step_index])
        return next_signal * self._clipped(clean) + next_noise * epsilon

    @property
    def differentiable(self) -> bool:
        """Whether ``move`` takes tensors: the quantiles of dynamic thresholding are NumPy's."""
        return not self._config.get("thresholding")

    def _clipped(self, clean: Any) -> Any:
        config = self._config
        if config.get("thresholding"):
            return _thresholded(
                clean,
                float(config.get("dynamic_thresholding_ratio", THRESHOLD_QUANTILE)),
                float(config.get("sample_max_value", THRESHOLD_LIMIT)),
            )
        if config.get("clip_sample", config.get("_class_name") in CLIPPING_CLASSES):
            limit = float(config.get("clip_sample_range", 1.0))
            return clean.clip(-limit, limit)
        return clean


def _roots(power: Any) -> tuple[float, float]:
    """Return sqrt(alpha-bar) and sqrt(1 - alpha-bar), taken in float32."""
    power = np.float32(power)
    return float(np.sqrt(power)), float(np.sqrt(np.float32(1.0) - power))


def _thresholded(clean: Array, quantile: float, limit: float) -> Array:
    """Clip each sample at a quantile of its absolute values (1 to ``limit``) and divide by it."""
    flat = np.abs(clean).reshape(len(clean), -1)
    bound = np.clip(np.quantile(flat, quantile, axis=1), 1.0, limit).astype(np.float32)
    bound = bound.reshape(-1, *[1] * (clean.ndim - 1))
    return np.asarray(np.clip(clean, -bound, bound) / bound)
