"""What all schedulers share: settings, checked by name and value, and their place in the schedule.

A scheduler here is diffusers' class of the same name without torch: after ``set_timesteps`` its
``step`` is called once per timestep, from ``begin`` on. Noise that a step adds is drawn by the caller.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np

from mpq_deploy.device.generate.noise_schedule import Array, betas_of, products, thresholded
from mpq_deploy.errors import InputError, UsageError, nearest

Draw = Callable[[], Array]
LARGEST_TRAIN = 100_000
DIFFUSION: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "timestep_spacing": "linspace",
    "steps_offset": 0,
    "rescale_betas_zero_snr": False,
}
CONVERTED: dict[str, Any] = {
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    # No argument of every class that converts, but read by each from its file.
    "sigma_min": None,
    "sigma_max": None,
}
THRESHOLD: dict[str, Any] = {
    "thresholding": False,
    "dynamic_thresholding_ratio": 0.995,
    "sample_max_value": 1.0,
}
CLIP: dict[str, Any] = {"clip_sample": True, "clip_sample_range": 1.0}
CHOICES: dict[str, tuple[Any, ...]] = {
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "prediction_type": ("epsilon", "sample", "v_prediction"),
    "timestep_spacing": ("linspace", "leading", "trailing"),
    "final_sigmas_type": ("zero", "sigma_min"),
    "time_shift_type": ("exponential", "linear"),
}
# Settings of classes that diffusers itself passes over in a file of another class.
ELSEWHERE = frozenset(
    {"skip_prk_steps", "sigma_data", "interpolation_type", "variance_type", "solver_type"}
    | {"algorithm_type", "solver_order", "lower_order_final", "use_flow_sigmas", "flow_shift"}
    | {"euler_at_final", "lambda_min_clipped", "use_lu_lambdas", "final_sigmas_type"}
    | {"set_alpha_to_one", "timestep_type", "sigma_min", "sigma_max", "shift_terminal"}
    | {"disable_corrector", "predict_x0", "solver_p", "use_dynamic_shifting", "time_shift_type"}
    | {"timestep_scaling", "original_inference_steps", *DIFFUSION, *CONVERTED, *THRESHOLD, *CLIP}
)


def checked_settings(
    name: str,
    config: Mapping[str, Any],
    defaults: Mapping[str, Any],
    choices: Mapping[str, tuple[Any, ...]],
) -> dict[str, Any]:
    """Return ``defaults`` with those of ``config``. InputError names a setting and its value."""
    settings = dict(defaults)
    for key, value in config.items():
        if key.startswith("_") or (key not in defaults and key in ELSEWHERE):
            continue
        allowed = choices.get(key)
        if key not in defaults:
            raise _refused(name, key, value, f"{nearest(key, defaults)}It is not known here.")
        if allowed is not None and value not in allowed:
            raise _refused(
                name, key, value, f"Supported: {', '.join(str(one) for one in allowed)}."
            )
        if allowed is None and not _fits(value, defaults[key]):
            raise _refused(name, key, value, f"Its type is that of {defaults[key]!r}.")
        settings[key] = value
    converted = [key for key in CONVERTED if key.startswith("use") and settings.get(key)]
    if len(converted) > 1:
        raise InputError(f"{name}: only one of {', '.join(converted)} can be used.")
    if not 1 <= settings["num_train_timesteps"] <= LARGEST_TRAIN:
        key = "num_train_timesteps"
        raise _refused(name, key, settings[key], f"It lies between 1 and {LARGEST_TRAIN:,}.")
    for key in ("beta_start", "beta_end"):
        if not 0 <= settings.get(key, 0) <= 1:
            raise _refused(name, key, settings[key], "It lies between 0 and 1.")
    betas = settings.get("trained_betas")
    if betas is not None and (
        not isinstance(betas, list) or len(betas) != settings["num_train_timesteps"]
    ):
        raise _refused(name, "trained_betas", repr(betas)[:60], "A list of one per timestep.")
    return settings


def _fits(value: Any, default: Any) -> bool:
    if isinstance(default, bool):
        return isinstance(value, bool)
    if isinstance(default, list) or (default is None and isinstance(value, list)):
        return isinstance(value, list) and all(_fits(one, 0.0) for one in value)
    if default is None and value is None:
        return True
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    if isinstance(default, int):
        return isinstance(value, int)
    return math.isfinite(value) or (isinstance(default, float) and math.isinf(default))


def _refused(name: str, key: str, value: Any, hint: str) -> InputError:
    return InputError(f"{name} with {key} = {value!r} is not supported here.", hint)


class Scheduler:
    """A sampler over ``timesteps``. ``index``: the step that comes next."""

    defaults: ClassVar[Mapping[str, Any]] = DIFFUSION
    choices: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    def __init__(self, config: Mapping[str, Any]) -> None:
        name = type(self).__name__
        self.config = checked_settings(name, config, self.defaults, {**CHOICES, **self.choices})
        self.timesteps: Array = np.zeros(0)
        self.sigmas: Array = np.zeros(1, np.float32)
        self.index = 0

    @property
    def init_noise_sigma(self) -> float:
        """The deviation of the noise that sampling starts from."""
        return 1.0

    def set_timesteps(
        self,
        steps: int,
        sigmas: Array | None = None,
        mu: float | None = None,
        strength: float = 1.0,
    ) -> None:
        """Choose the timesteps of ``steps`` steps. UsageError for a number that does not go.

        ``sigmas``, ``mu``: of flow matching alone (``mu``: the shift for a size); ``strength``: of
        LCM alone, whose schedule depends on it.
        """
        train = self.config["num_train_timesteps"]
        if not 1 <= steps <= train:
            raise UsageError(
                f"{type(self).__name__} cannot make {steps} steps.", f"Give 1 to {train}."
            )
        self._schedule(steps, sigmas, mu, strength)
        self._check_timesteps(steps)
        self.begin(0)

    def _check_timesteps(self, steps: int) -> None:
        """Raise UsageError where the settings give no timestep that the model was trained at."""
        if not np.isfinite(self.timesteps).all():
            what = f"The settings of {type(self).__name__} give no timesteps for {steps} steps"
            raise UsageError(f"{what}.", "Give more.")

    def begin(self, index: int) -> None:
        """Start at the step ``index``, with nothing remembered."""
        self.index = index

    def _schedule(
        self, steps: int, sigmas: Array | None, mu: float | None, strength: float
    ) -> None:
        raise NotImplementedError

    def scaled_input(self, sample: Array) -> Array:
        """Return what the denoiser is given for ``sample`` at the step that comes next."""
        return sample

    def step(self, output: Array, sample: Array, draw: Draw) -> Array:
        """Return the next sample from the denoiser's ``output``; ``draw`` gives noise where needed."""
        raise NotImplementedError

    def add_noise(self, original: Array, noise: Array) -> Array:
        """Return ``original`` with the noise of the step that comes next."""
        raise NotImplementedError


class AlphaScheduler(Scheduler):
    """A scheduler over cumulative products of alphas, with clipped predictions."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        self.alphas = products(betas_of(self.config))
        one = np.float32(1)
        self.final_alpha = one if self.config.get("set_alpha_to_one", True) else self.alphas[0]

    def _check_timesteps(self, steps: int) -> None:
        super()._check_timesteps(steps)
        low, high, train = int(self.timesteps.min()), int(self.timesteps.max()), len(self.alphas)
        if low < 0 or high >= train:
            what = f"{type(self).__name__} would make {steps} steps from timestep {high} to {low}"
            raise UsageError(f"{what}, and there are 0 to {train - 1}.", "Give other --steps.")

    def alpha(self, timestep: int) -> Any:
        """The product at a timestep; the last one's before the first."""
        return self.alphas[timestep] if timestep >= 0 else self.final_alpha

    def original(self, output: Array, sample: Array, alpha: Any) -> Array:
        """Return the predicted clean sample, clipped or thresholded as the settings say."""
        a, b = np.sqrt(alpha), np.sqrt(np.float32(1) - alpha)
        kind = self.config["prediction_type"]
        if kind == "epsilon":
            clean = (sample - b * output) / a
        else:
            clean = output if kind == "sample" else a * sample - b * output
        if self.config["thresholding"]:
            ratio = self.config["dynamic_thresholding_ratio"]
            return thresholded(clean, ratio, self.config["sample_max_value"])
        limit = self.config["clip_sample_range"]
        result: Array = np.clip(clean, -limit, limit) if self.config["clip_sample"] else clean
        return result

    def add_noise(self, original: Array, noise: Array) -> Array:  # noqa: D102
        alpha = self.alphas[int(self.timesteps[self.index])]
        noisy: Array = np.sqrt(alpha) * original + np.sqrt(np.float32(1) - alpha) * noise
        return noisy
