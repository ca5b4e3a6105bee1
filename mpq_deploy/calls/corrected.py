"""A sampler with PTQD's correction in front, for our own denoising loop."""

from __future__ import annotations

from mpq_deploy.calls.diffusers_sampler import DiffusersSampler
from mpq_deploy.calls.sampler import Sampler
from mpq_deploy.errors import UsageError
from mpq_deploy.models.spec import Array, DenoiserSpec
from mpq_deploy.runtime.correction import Correction


class CorrectedSampler:
    """A deterministic sampler that gets the corrected output: slope and bias alone."""

    def __init__(self, sampler: Sampler, correction: Correction) -> None:
        self._sampler, self._correction = sampler, correction
        self.name = f"{sampler.name}, corrected"
        self.timesteps: Array = sampler.timesteps
        self.init_noise_sigma = sampler.init_noise_sigma

    def scale_model_input(self, x: Array, step_index: int) -> Array:
        """Return what the denoiser is fed at this step."""
        return self._sampler.scale_model_input(x, step_index)

    def step(self, model_output: Array, step_index: int, x: Array) -> Array:
        """Return the sample of the next timestep, from the corrected output."""
        corrected = self._correction.apply(model_output, float(self.timesteps[step_index]))
        return self._sampler.step(corrected, step_index, x)


def corrected_sampler(
    sampler: Sampler, correction: Correction, spec: DenoiserSpec
) -> tuple[Sampler, str]:
    """Return ``sampler`` with the correction in front, and in words what of it applies.

    The built-in DDIM (eta 0) gets slope and bias; a scheduler of diffusers what
    ``CorrectedScheduler`` gives it, at the guidance of ``spec``. Raises UsageError when the
    correction is for another prediction type.
    """
    if correction.prediction_type != spec.prediction_type:
        raise UsageError(
            f"The correction is for a model that predicts {correction.prediction_type}; this one predicts "
            f"{spec.prediction_type}.",
            "Use the correction that was made with this model.",
        )
    if isinstance(sampler, DiffusersSampler):
        return sampler.corrected(
            correction, 1.0 if spec.uncond_row is None else spec.guidance_scale
        )
    return CorrectedSampler(sampler, correction), "slope and bias only: the sampler adds no noise"
