"""DDIM, DDPM, PNDM and LCM in NumPy, as diffusers has them (DDIM with eta 0, as its pipelines run it)."""

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


class PNDMScheduler(AlphaScheduler):
    """Liu et al. 2022 by linear multisteps alone (PLMS), as Stable Diffusion's own files set it.

    The second timestep is computed twice: its first estimate is averaged with that of the first.
    """

    defaults: ClassVar[Mapping[str, Any]] = {
        **DIFFUSION,
        "timestep_spacing": "leading",
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
    }
    choices: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "prediction_type": ("epsilon", "v_prediction"),
        "skip_prk_steps": (True,),
    }

    def __init__(self, config: Mapping[str, Any]) -> None:
        # Where a file leaves it out, diffusers takes the Runge-Kutta steps; it never rescales betas.
        given = {**config, "skip_prk_steps": config.get("skip_prk_steps", False)}
        super().__init__({**given, "rescale_betas_zero_snr": False})

    def _schedule(
        self, steps: int, sigmas: Array | None, mu: float | None, strength: float
    ) -> None:
        train = self.config["num_train_timesteps"]
        spaced = spaced_timesteps(self.config, steps, train).round().astype(np.int64)
        self.timesteps = np.concatenate([spaced[:1], spaced[1:2], spaced[1:]])
        self._stride = train // steps

    def begin(self, index: int) -> None:  # noqa: D102
        super().begin(index)
        self._outputs: list[Array] = []
        self._first: Array | None = None
        self._done = 0

    def step(self, output: Array, sample: Array, draw: Draw) -> Array:  # noqa: D102
        timestep = int(self.timesteps[self.index])
        before = timestep - self._stride
        if self._done == 1:
            assert self._first is not None
            before, timestep = timestep, timestep + self._stride
            output, sample = (output + self._outputs[-1]) / 2, self._first
        else:
            self._outputs = [*self._outputs[-3:], output]
            self._first = sample
            output = self._combined()
        self._done += 1
        self.index += 1
        return self._moved(sample, timestep, before, output)

    def _combined(self) -> Array:
        """Return the outputs of the last steps, extrapolated (Adams-Bashforth)."""
        weights = {1: (1,), 2: (3, -1), 3: (23, -16, 5), 4: (55, -59, 37, -9)}
        chosen = weights[len(self._outputs)]
        terms = zip(chosen, reversed(self._outputs), strict=True)
        total: Array = sum(np.float32(weight) * one for weight, one in terms)
        return total / np.float32(sum(chosen))

    def _moved(self, sample: Array, timestep: int, before: int, output: Array) -> Array:
        """Formula 9 of the paper: from ``timestep`` to the one ``before``."""
        alpha, following = self.alpha(timestep), self.alpha(before)
        if self.config["prediction_type"] == "v_prediction":
            output = np.sqrt(alpha) * output + np.sqrt(ONE - alpha) * sample
        divisor = alpha * np.sqrt(ONE - following) + np.sqrt(alpha * (ONE - alpha) * following)
        result: Array = np.sqrt(following / alpha) * sample - (following - alpha) * output / divisor
        return result
