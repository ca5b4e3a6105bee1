"""Any diffusers scheduler as a sampler: torch and diffusers are imported when one is made."""

from __future__ import annotations

import copy
import importlib.util
import inspect
from typing import TYPE_CHECKING, Any

import numpy as np

from mpq_deploy.errors import MissingDependencyError, UsageError, nearest
from mpq_deploy.models.spec import Array

if TYPE_CHECKING:
    from mpq_deploy.runtime.correction import Correction


class DiffusersSampler:
    """A scheduler class of diffusers, by ``_class_name``, with NumPy float32 in and out.

    Step 0 begins a new trajectory: the scheduler and its random generator are set back, so that one
    sampler gives the same trajectory each time. A scheduler that adds noise draws it from ``seed``.
    """

    differentiable = True

    def __init__(self, config: dict[str, Any], steps: int, seed: int) -> None:
        import torch

        self._torch = torch
        self._steps, self._seed = steps, seed
        found = scheduler_class(str(config.get("_class_name")))
        # The loop drops a learned variance with the model's second half of channels.
        learned = str(config.get("variance_type", "")).startswith("learned")
        overrides = {"variance_type": "fixed_small"} if learned else {}
        if config.get("use_dynamic_shifting"):
            raise UsageError(
                f"{config.get('_class_name')} with use_dynamic_shifting shifts its timesteps by image size.",
                "Give the whole pipeline folder, whose class does that; or set use_dynamic_shifting to false in "
                "the scheduler's configuration (--scheduler FILE).",
            )
        self._scheduler = found.from_config({**config, **overrides})
        if "num_train_timesteps" not in self._scheduler.config:
            raise UsageError(
                f"{found.__name__} has no num_train_timesteps, and steps in a way of its own.",
                "Give another scheduler that suits the model: --scheduler FILE.",
            )
        self._takes_generator = "generator" in inspect.signature(self._scheduler.step).parameters
        self._begin()
        self._timesteps = self._scheduler.timesteps
        self.timesteps: Array = self._timesteps.numpy().astype(np.float64)
        self.init_noise_sigma = float(getattr(self._scheduler, "init_noise_sigma", 1.0))
        self.name = f"{found.__name__} of diffusers, {steps} steps"

    def scale_model_input(self, x: Array, step_index: int) -> Array:
        """Return what the denoiser is fed at this step; step 0 begins a new trajectory."""
        return np.asarray(self.scale(self._torch.from_numpy(x), step_index).numpy(), np.float32)

    def scale(self, x: Any, step_index: int) -> Any:
        """Do as ``scale_model_input`` does, on tensors."""
        if step_index == 0:
            self._begin()
        if not hasattr(self._scheduler, "scale_model_input"):
            return x
        return self._scheduler.scale_model_input(x, self._timesteps[step_index])

    def step(self, model_output: Array, step_index: int, x: Array) -> Array:
        """Return the sample of the next timestep; float32 [N, ...] in and out."""
        output, sample = self._torch.from_numpy(model_output), self._torch.from_numpy(x)
        return np.asarray(self.move(output, step_index, sample).numpy(), np.float32)

    def move(self, model_output: Any, step_index: int, x: Any) -> Any:
        """Do as ``step`` does, on tensors, which it can be differentiated on."""
        options = {"generator": self._generator} if self._takes_generator else {}
        timestep = self._timesteps[step_index]
        return self._scheduler.step(model_output, timestep, x, return_dict=False, **options)[0]

    def corrected(
        self, correction: Correction, guidance_scale: float
    ) -> tuple[DiffusersSampler, str]:
        """Return this sampler with corrected outputs, and in words which corrections apply."""
        from mpq_deploy.runtime.corrected_scheduler import CorrectedScheduler

        sampler = copy.copy(self)
        sampler._scheduler = CorrectedScheduler(
            self._scheduler, correction, guidance_scale=guidance_scale
        )
        sampler.name = f"{self.name}, corrected"
        return sampler, sampler._scheduler.variance_note

    def _begin(self) -> None:
        self._scheduler.set_timesteps(self._steps)
        self._generator = self._torch.Generator().manual_seed(self._seed)


def scheduler_class(name: str) -> Any:
    """Return the diffusers class called ``name``; only schedulers can be reached this way."""
    for package in ("torch", "diffusers"):
        if importlib.util.find_spec(package) is None:
            raise MissingDependencyError(package, "torch", f"Sampling with {name}")
    import diffusers
    from diffusers.schedulers.scheduling_utils import SchedulerMixin

    known = [n for n in dir(diffusers) if n.endswith("Scheduler") and "Flax" not in n]
    found = getattr(diffusers, name) if name in known else None
    if not (inspect.isclass(found) and issubclass(found, SchedulerMixin)):
        raise UsageError(
            f"The scheduler class '{name}' is not one of diffusers.",
            f"{nearest(name, known)}Check _class_name in the scheduler's configuration.",
        )
    return found
