"""The denoising loop: from noise to samples, with guidance, over any denoiser and sampler."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from mpq_deploy.calls.sampler import Sampler
from mpq_deploy.errors import ModelError
from mpq_deploy.models.spec import Array, DenoiserSpec
from mpq_deploy.system.lanes import in_lanes
from mpq_deploy.system.progress import Talk

# Called after each model call with (step_index, timestep, model_input [M, ...], rows int64 [M], output).
OnCall = Callable[[int, float, Array, Array, Array], None]


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
    """A denoiser with all rows of its condition inputs, a callback for each of its calls, and calls at once."""

    denoiser: DenoiserCall
    spec: DenoiserSpec
    conditions: dict[str, Array]
    on_call: OnCall | None = None
    lanes: int = 1

    def calls(
        self, fed: Array, rows: Array, batch_size: int, step_index: int, timestep: float
    ) -> Array:
        """Return the outputs for ``fed`` [N, ...] and the conditions' ``rows`` int64 [N].

        ``batch_size`` of them per call of the model.
        """
        chunks = [slice(at, at + batch_size) for at in range(0, len(fed), batch_size)]
        given = [self._given(fed[chunk], rows[chunk]) for chunk in chunks]
        outputs = []
        made = in_lanes(lambda one: self._output(*one, timestep), given, self.lanes)
        for (inputs, taken), output in zip(given, made, strict=True):
            if self.on_call is not None:
                self.on_call(step_index, timestep, inputs, taken, output)
            outputs.append(answer(self.spec, inputs.shape[1], output))
        return np.concatenate(outputs)

    def _given(self, fed: Array, rows: Array) -> tuple[Array, Array]:
        """Return what the model is given: with guidance each sample twice, first without its condition."""
        if not guided(self.spec):
            return fed, rows
        return np.concatenate([fed, fed]), np.concatenate(
            [np.full_like(rows, self.spec.uncond_row), rows]
        )

    def _output(self, inputs: Array, rows: Array, timestep: float) -> Array:
        taken = {name: values[rows] for name, values in self.conditions.items()}
        return self.denoiser(inputs, timestep, taken)


def guided(spec: DenoiserSpec) -> bool:
    """Whether each sample is given to the model twice, first without its condition."""
    return spec.guidance_scale != 1 and spec.uncond_row is not None


def answer(spec: DenoiserSpec, channels: int, output: Any) -> Any:
    """Return the output (an array or a tensor) for the sampler; of a learned variance (2C channels) the first C.

    With guidance it is led away from the unconditional row (Ho & Salimans 2022, equation 6).
    """
    if spec.timestep is not None and output.shape[1] == 2 * channels:
        output = output[:, :channels]
    if not guided(spec):
        return output
    half = len(output) // 2
    base, conditioned = output[:half], output[half:]
    return base + float(np.float32(spec.guidance_scale)) * (conditioned - base)


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
            outputs = model.calls(fed, rows, batch_size, step_index, float(timestep))
            x = sampler.step(outputs, step_index, x)
            if not np.isfinite(x).all():
                raise ModelError(
                    f"The sample is not finite after step {step_index} (timestep {timestep:g}).",
                    "Check the model's weights, and that the scheduler is the one it was trained with.",
                )
            advance(1)
    return x
