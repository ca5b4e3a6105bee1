"""The denoising loop: from noise to samples, with guidance, over any denoiser and sampler."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from mpq_deploy.calls.sampler import Sampler
from mpq_deploy.errors import ModelError
from mpq_deploy.models.spec import Array, DenoiserSpec
from mpq_deploy.system.progress import Talk

# Called before each model call with (step_index, timestep, model_input [M, ...], rows int64 [M]).
OnCall = Callable[[int, float, Array, Array], None]


class DenoiserCall(Protocol):
    """A denoiser: sample [M, ...], timestep, conditions with M rows -> output [M, ...], float32."""

    def __call__(
        self, sample: Array, timestep: float | Array, conditions: dict[str, Array]
    ) -> Array:
        """Return the denoiser's output."""


def initial_noise(spec: DenoiserSpec, count: int, seed: int) -> Array:
    """Return ``count`` standard normal samples, float32 [count, *spec.sample.shape].

    Sample i is the same for any ``count``: it has a generator of its own, seeded with (seed, i).
    """
    shape = spec.sample.shape
    noise = [
        np.random.default_rng((seed, i)).standard_normal(shape, np.float32) for i in range(count)
    ]
    return np.stack(noise) if noise else np.empty((0, *shape), np.float32)


def first_samples(
    spec: DenoiserSpec, rows: Array, conditions: dict[str, Array], seed: int
) -> Array:
    """Return what each trajectory begins with, float32 [len(rows), *sample shape].

    Noise (see ``initial_noise``), or rows of its own inputs without timesteps.
    """
    if spec.timestep is not None:
        return initial_noise(spec, len(rows), seed)
    return np.asarray(conditions[spec.sample.name][rows], np.float32)


@dataclass(frozen=True)
class GuidedDenoiser:
    """A denoiser with all rows of its condition inputs, and a callback for each of its calls."""

    denoiser: DenoiserCall
    spec: DenoiserSpec
    conditions: dict[str, Array]
    on_call: OnCall | None = None

    def __call__(self, fed: Array, rows: Array, step_index: int, timestep: float) -> Array:
        """Return the output for ``fed`` [M, ...] and the conditions' ``rows`` int64 [M].

        With guidance it is led away from the unconditional row (Ho & Salimans 2022, equation 6).
        """
        spec = self.spec
        if spec.guidance_scale == 1 or spec.uncond_row is None:
            return self._plain(fed, rows, step_index, timestep)
        both_rows = np.concatenate([np.full_like(rows, spec.uncond_row), rows])
        both = self._plain(np.concatenate([fed, fed]), both_rows, step_index, timestep)
        base, conditioned = np.split(both, 2)
        return np.asarray(base + np.float32(spec.guidance_scale) * (conditioned - base), np.float32)

    def _plain(self, fed: Array, rows: Array, step_index: int, timestep: float) -> Array:
        """Return the output for these rows; of a learned variance (2C channels) the first C."""
        if self.on_call is not None:
            self.on_call(step_index, timestep, fed, rows)
        taken = {name: values[rows] for name, values in self.conditions.items()}
        output = self.denoiser(fed, timestep, taken)
        if self.spec.timestep is None:
            return output
        channels = fed.shape[1]
        return output[:, :channels] if output.shape[1] == 2 * channels else output


def denoise(
    model: GuidedDenoiser,
    sampler: Sampler,
    noise: Array,
    rows: Array,
    batch_size: int,
    talk: Talk | None = None,
) -> Array:
    """Denoise ``noise`` float32 [N, ...] and return the samples, float32 [N, ...].

    ``rows`` int64 [N] picks each sample's row of the conditions. All samples take a step together,
    ``batch_size`` samples per model call (twice as many rows with guidance), so samplers that hold
    state work. Raises ModelError, with timestep, when the output is not finite.
    """
    x = np.asarray(noise * np.float32(sampler.init_noise_sigma), np.float32)
    rows = np.asarray(rows, np.int64)
    with (talk or Talk()).bar(f"denoise {len(x)} samples", len(sampler.timesteps)) as advance:
        for step_index, timestep in enumerate(sampler.timesteps):
            fed = sampler.scale_model_input(x, step_index)
            outputs = []
            for start in range(0, len(x), batch_size):
                chunk = slice(start, start + batch_size)
                outputs.append(model(fed[chunk], rows[chunk], step_index, float(timestep)))
            x = sampler.step(np.concatenate(outputs), step_index, x)
            if not np.isfinite(x).all():
                raise ModelError(
                    f"The sample is not finite after step {step_index} (timestep {timestep:g}).",
                    "Check the model's weights, and that the scheduler is the one it was trained with.",
                )
            advance(1)
    return x
