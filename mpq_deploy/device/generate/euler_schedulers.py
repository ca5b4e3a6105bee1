"""Euler, Euler ancestral and flow matching's Euler in NumPy, as diffusers has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from mpq_deploy.device.generate.noise_schedule import (
    Array,
    converted_sigmas,
    even_float32,
    products_of,
    shifted,
    sigma_to_timestep,
    sigmas_of,
    spaced_timesteps,
    stretched_to,
    time_shifted,
)
from mpq_deploy.device.generate.scheduler_base import CONVERTED, DIFFUSION, Draw, Scheduler
from mpq_deploy.errors import InputError


class SigmaScheduler(Scheduler):
    """A scheduler over sigmas of a variance-exploding sample."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        self.alphas = products_of(self.config)
        self.train_sigmas = sigmas_of(self.alphas)

    @property
    def init_noise_sigma(self) -> float:  # noqa: D102
        largest = float(self.sigmas.max())
        wide = self.config["timestep_spacing"] in ("linspace", "trailing")
        return largest if wide else (largest**2 + 1) ** 0.5

    def scaled_input(self, sample: Array) -> Array:  # noqa: D102
        scaled: Array = sample / np.sqrt(self.sigmas[self.index] ** 2 + np.float32(1))
        return scaled

    def slope(self, output: Array, sample: Array) -> Array:
        """Return the derivative of the sample by sigma."""
        sigma = self.sigmas[self.index]
        if self.config["prediction_type"] == "epsilon":
            clean = sample - sigma * output
        elif self.config["prediction_type"] == "v_prediction":
            whole = sigma**2 + np.float32(1)
            clean = output * (-sigma / np.sqrt(whole)) + sample / whole
        else:
            clean = output
        slope: Array = (sample - clean) / sigma
        return slope

    def add_noise(self, original: Array, noise: Array) -> Array:  # noqa: D102
        return original + noise * self.sigmas[self.index]


class EulerDiscreteScheduler(SigmaScheduler):
    """Karras et al. 2022, algorithm 2 without churn."""

    defaults: ClassVar[Mapping[str, Any]] = {
        **DIFFUSION,
        **CONVERTED,
        "interpolation_type": "linear",
        "timestep_type": "discrete",
        "final_sigmas_type": "zero",
    }
    choices: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "interpolation_type": ("linear", "log_linear"),
        "timestep_type": ("discrete", "continuous"),
    }

    def _schedule(
        self, steps: int, sigmas: Array | None, mu: float | None, strength: float
    ) -> None:
        config, known = self.config, self.train_sigmas
        timesteps = spaced_timesteps(config, steps, config["num_train_timesteps"])
        timesteps = timesteps.astype(np.float32)
        chosen = np.interp(timesteps, np.arange(len(known)), known)
        if config["interpolation_type"] == "log_linear":
            chosen = np.exp(even_float32(np.log(known[-1]), np.log(known[0]), steps + 1))
        converted = converted_sigmas(config, chosen, steps)
        if converted is not None:
            chosen = converted
            timesteps = sigma_to_timestep(chosen, np.log(known))
        last = known[0] if config["final_sigmas_type"] == "sigma_min" else 0.0
        self.sigmas = np.concatenate([chosen, [last]]).astype(np.float32)
        if config["timestep_type"] == "continuous" and config["prediction_type"] == "v_prediction":
            timesteps = 0.25 * np.log(self.sigmas[:-1])
        self.timesteps = timesteps.astype(np.float32)

    def step(self, output: Array, sample: Array, draw: Draw) -> Array:  # noqa: D102
        change = self.sigmas[self.index + 1] - self.sigmas[self.index]
        result = sample + self.slope(output, sample) * change
        self.index += 1
        return result


class EulerAncestralDiscreteScheduler(SigmaScheduler):
    """Euler's step to a lower sigma, and noise back up to the next one."""

    choices: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "prediction_type": ("epsilon", "v_prediction")
    }

    def _schedule(
        self, steps: int, sigmas: Array | None, mu: float | None, strength: float
    ) -> None:
        timesteps = spaced_timesteps(self.config, steps, self.config["num_train_timesteps"])
        self.timesteps = timesteps.astype(np.float32)
        known = self.train_sigmas
        chosen = np.interp(self.timesteps, np.arange(len(known)), known)
        self.sigmas = np.concatenate([chosen, [0.0]]).astype(np.float32)

    def step(self, output: Array, sample: Array, draw: Draw) -> Array:  # noqa: D102
        sigma, after = self.sigmas[self.index], self.sigmas[self.index + 1]
        up = np.sqrt(after**2 * (sigma**2 - after**2) / sigma**2)
        down = np.sqrt(after**2 - up**2)
        result = sample + self.slope(output, sample) * (down - sigma)
        self.index += 1
        return result + draw() * up


class FlowMatchEulerDiscreteScheduler(Scheduler):
    """Euler's steps along a flow from noise (sigma 1) to the sample (sigma 0)."""

    defaults: ClassVar[Mapping[str, Any]] = {
        **CONVERTED,
        "num_train_timesteps": 1000,
        "shift": 1.0,
        "use_dynamic_shifting": False,
        "base_shift": 0.5,
        "max_shift": 1.15,
        "base_image_seq_len": 256,
        "max_image_seq_len": 4096,
        "invert_sigmas": False,
        "shift_terminal": None,
        "time_shift_type": "exponential",
        "stochastic_sampling": False,
    }

    def shift_for(self, length: int) -> float:
        """Return ``mu`` for images of ``length`` tokens, between the settings' two points."""
        config = self.config
        slope = (config["max_shift"] - config["base_shift"]) / (
            config["max_image_seq_len"] - config["base_image_seq_len"]
        )
        mu: float = slope * (length - config["base_image_seq_len"]) + config["base_shift"]
        return mu

    def _schedule(
        self, steps: int, sigmas: Array | None, mu: float | None, strength: float
    ) -> None:
        config, train = self.config, self.config["num_train_timesteps"]
        if config["use_dynamic_shifting"] and mu is None:
            raise InputError("FlowMatchEulerDiscreteScheduler shifts by size and got none.")
        if sigmas is None:
            ends = np.array([train, 1], np.float32) / np.float32(train)
            if not config["use_dynamic_shifting"]:
                ends = shifted(ends, config["shift"])
            high, low = (float(one) for one in ends)
            chosen = np.linspace(high * train, low * train, steps) / train
        else:
            chosen = np.asarray(sigmas, np.float32)
        if config["use_dynamic_shifting"]:
            chosen = time_shifted(chosen, mu or 0.0, config["time_shift_type"] == "exponential")
        else:
            chosen = shifted(chosen, config["shift"])
        if config["shift_terminal"]:
            chosen = stretched_to(chosen, config["shift_terminal"])
        converted = converted_sigmas(config, chosen, steps)
        chosen = (chosen if converted is None else converted).astype(np.float32)
        if config["invert_sigmas"]:
            chosen = np.float32(1) - chosen
        self.timesteps = (chosen * np.float32(train)).astype(np.float32)
        end = np.float32(config["invert_sigmas"])
        self.sigmas = np.concatenate([chosen, [end]]).astype(np.float32)

    def step(self, output: Array, sample: Array, draw: Draw) -> Array:  # noqa: D102
        sigma, after = self.sigmas[self.index], self.sigmas[self.index + 1]
        self.index += 1
        if self.config["stochastic_sampling"]:
            clean = sample - sigma * output
            return (np.float32(1) - after) * clean + after * draw()
        return sample + (after - sigma) * output

    def add_noise(self, original: Array, noise: Array) -> Array:  # noqa: D102
        sigma = self.sigmas[self.index]
        noisy: Array = sigma * noise + (np.float32(1) - sigma) * original
        return noisy
