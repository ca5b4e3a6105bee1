"""DDIM, DDPM and LCM in NumPy, as diffusers has them (DDIM with eta 0, as its pipelines run it)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from mpq_deploy.device.generate.noise_schedule import Array, spaced_timesteps
from mpq_deploy.device.generate.scheduler_base import (
    CLIP,
    DIFFUSION,
    THRESHOLD,
    AlphaScheduler,
    Draw,
)
from mpq_deploy.errors import UsageError

LEADING = {**DIFFUSION, **CLIP, **THRESHOLD, "timestep_spacing": "leading"}
ONE = np.float32(1)
SIGMA_DATA = 0.5  # of consistency models' boundary conditions (Luo et al. 2023)


class DDIMScheduler(AlphaScheduler):
    """Song et al. 2020, formula 12, without added noise."""

    defaults: ClassVar[Mapping[str, Any]] = {**LEADING, "set_alpha_to_one": True}

    def _schedule(
        self, steps: int, sigmas: Array | None, mu: float | None, strength: float
    ) -> None:
        train = self.config["num_train_timesteps"]
        self.timesteps = spaced_timesteps(self.config, steps, train).round().astype(np.int64)
        self._stride = train // steps

    def step(self, output: Array, sample: Array, draw: Draw) -> Array:  # noqa: D102
        timestep = int(self.timesteps[self.index])
        alpha, before = self.alpha(timestep), self.alpha(timestep - self._stride)
        a, b = np.sqrt(alpha), np.sqrt(ONE - alpha)
        kind = self.config["prediction_type"]
        clean = self.original(output, sample, alpha)
        if kind == "epsilon":
            noise = output
        else:
            noise = (sample - a * output) / b if kind == "sample" else a * output + b * sample
        self.index += 1
        result: Array = np.sqrt(before) * clean + np.sqrt(ONE - before) * noise
        return result


class DDPMScheduler(AlphaScheduler):
    """Ho et al. 2020, formula 7; noise at every timestep but 0."""

    defaults: ClassVar[Mapping[str, Any]] = {**LEADING, "variance_type": "fixed_small"}
    choices: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2", "laplace", "sigmoid"),
        "variance_type": ("fixed_small", "fixed_small_log", "fixed_large"),
    }

    def _schedule(
        self, steps: int, sigmas: Array | None, mu: float | None, strength: float
    ) -> None:
        train = self.config["num_train_timesteps"]
        self.timesteps = spaced_timesteps(self.config, steps, train).round().astype(np.int64)

    def step(self, output: Array, sample: Array, draw: Draw) -> Array:  # noqa: D102
        timestep = int(self.timesteps[self.index])
        last = self.index + 1 == len(self.timesteps)
        alpha = self.alphas[timestep]
        before = ONE if last else self.alphas[int(self.timesteps[self.index + 1])]
        ratio = alpha / before
        beta = ONE - ratio
        clean = self.original(output, sample, alpha)
        whole = ONE - alpha
        mean: Array = (np.sqrt(before) * beta / whole) * clean
        mean = mean + (np.sqrt(ratio) * (ONE - before) / whole) * sample
        self.index += 1
        if timestep == 0:
            return mean
        variance = np.maximum((ONE - before) / whole * beta, np.float32(1e-20))
        if self.config["variance_type"] == "fixed_large":
            variance = beta
        return mean + np.sqrt(variance) * draw()


class LCMScheduler(AlphaScheduler):
    """Latent consistency models (Luo et al. 2023): noise after every step but the last."""

    defaults: ClassVar[Mapping[str, Any]] = {
        **LEADING,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "set_alpha_to_one": True,
        "original_inference_steps": 50,
        "timestep_scaling": 10.0,
    }

    def _schedule(
        self, steps: int, sigmas: Array | None, mu: float | None, strength: float
    ) -> None:
        train, original = (
            self.config["num_train_timesteps"],
            self.config["original_inference_steps"],
        )
        known = min(int(original * strength), train)
        if steps > known:
            raise UsageError(
                f"LCMScheduler cannot make {steps} steps of {original} x strength {strength:g}.",
                f"Give at most {known} steps, or a larger strength.",
            )
        grid = (np.arange(1, known + 1) * (train // original) - 1)[::-1]
        places = np.floor(np.linspace(0, known, num=steps, endpoint=False)).astype(np.int64)
        self.timesteps, self._steps = grid[places], steps

    def step(self, output: Array, sample: Array, draw: Draw) -> Array:  # noqa: D102
        timestep, place = int(self.timesteps[self.index]), self.index + 1
        following = int(self.timesteps[place]) if place < len(self.timesteps) else timestep
        alpha, before = self.alpha(timestep), self.alpha(following)
        scaled = timestep * self.config["timestep_scaling"]
        whole = scaled**2 + SIGMA_DATA**2
        clean = self.original(output, sample, alpha)
        clean = scaled / whole**0.5 * clean + SIGMA_DATA**2 / whole * sample
        last = self.index == self._steps - 1
        self.index += 1
        return clean if last else np.sqrt(before) * clean + np.sqrt(ONE - before) * draw()
