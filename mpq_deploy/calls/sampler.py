"""Samplers: from a denoiser's outputs and noise to an image; made from a configuration."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from mpq_deploy.calls.ddim import DdimSampler
from mpq_deploy.errors import UsageError
from mpq_deploy.models.spec import Array
from mpq_deploy.recipe import SamplerKind

# Classes whose models the built-in DDIM samples by default: the same betas, the same predictions.
BUILT_IN_CLASSES = ("DDIMScheduler", "DDPMScheduler")
# The "scheduler" of a component without timesteps: its output is the result.
ONE_CALL = "OneCall"


class Sampler(Protocol):
    """Moves samples along a denoising trajectory. Arrays are NumPy float32 [N, ...].

    Begin with ``scale_model_input(x, 0)`` where x = noise * init_noise_sigma, and go through the
    step indices in order; a sampler may hold state, and step index 0 sets it back.
    """

    name: str
    timesteps: Array
    init_noise_sigma: float

    def scale_model_input(self, x: Array, step_index: int) -> Array:
        """Return what the denoiser is fed at this step."""

    def step(self, model_output: Array, step_index: int, x: Array) -> Array:
        """Return the sample of the next, less noisy timestep."""


class OneCallSampler:
    """One call, whose output is the result: a VAE's decoder, a text encoder."""

    name = "one call"
    init_noise_sigma = 1.0

    def __init__(self) -> None:
        self.timesteps: Array = np.zeros(1)

    def scale_model_input(self, x: Array, step_index: int) -> Array:
        """Return ``x``."""
        return x

    def step(self, model_output: Array, step_index: int, x: Array) -> Array:
        """Return the output."""
        return model_output


def make_sampler(
    scheduler: dict[str, Any], steps: int, seed: int = 0, kind: SamplerKind = "auto"
) -> Sampler:
    """Make the sampler for a diffusers scheduler configuration (with ``_class_name``).

    ``auto`` takes the built-in DDIM for DDIM and DDPM configurations and the folder's own class,
    run by diffusers, for any other; ``ddim`` and ``folder`` insist. A component without timesteps
    always has one call. ``seed`` is for samplers that add noise. Raises UsageError
    for an unknown class or option, MissingDependencyError where diffusers is needed and missing.
    """
    if kind not in ("auto", "ddim", "folder"):
        raise UsageError(f"The sampler is '{kind}'.", "Choose auto, ddim or folder.")
    if steps < 1:
        raise UsageError(f"Invalid number of sampling steps: {steps}.", "Choose at least 1.")
    class_name = scheduler.get("_class_name")
    if not class_name:
        raise UsageError(
            "The scheduler's configuration has no _class_name.",
            'Name it, for example "_class_name": "DDIMScheduler".',
        )
    if class_name == ONE_CALL:
        return OneCallSampler()
    if takes_built_in(scheduler, kind):
        return _built_in(scheduler, steps)
    from mpq_deploy.calls.diffusers_sampler import DiffusersSampler

    return DiffusersSampler(scheduler, steps, seed)


def takes_built_in(scheduler: dict[str, Any], kind: SamplerKind) -> bool:
    """Whether the built-in DDIM samples by this configuration, rather than a class of diffusers."""
    return kind == "ddim" or (kind == "auto" and scheduler.get("_class_name") in BUILT_IN_CLASSES)


def keeps_samples_apart(sampler: Sampler) -> bool:
    """Whether samples are independent, without noise or state: then parts may be sampled alone."""
    return isinstance(sampler, (DdimSampler, OneCallSampler))


def _built_in(scheduler: dict[str, Any], steps: int) -> DdimSampler:
    class_name = str(scheduler["_class_name"])
    if "FlowMatch" in class_name or scheduler.get("prediction_type") == "flow_prediction":
        raise UsageError(
            f"{class_name} describes a flow-matching model, which has no betas for DDIM.",
            "Use sampler: folder.",
        )
    return DdimSampler(scheduler, steps)
