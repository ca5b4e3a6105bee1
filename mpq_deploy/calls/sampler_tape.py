"""A trajectory as a function of the model's outputs, which torch can differentiate.

In: a sampler, the model, and the noise. Out: the final samples, and what a direction there is at the
output of any step. The sampler's steps are recorded as torch runs them: what they keep from step to
step (multistep samplers), clip, or add as noise of a seed is in the derivative, guidance as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from mpq_deploy.calls.loop import answer, guided
from mpq_deploy.calls.sampler import Sampler
from mpq_deploy.errors import ModelError
from mpq_deploy.models.spec import Array, DenoiserSpec


class NoTrajectory(ModelError):  # noqa: N818 - what callers name it
    """There is no sampler whose steps can be differentiated."""


class TensorSampler(Sampler, Protocol):
    """A sampler whose steps take tensors, too."""

    differentiable: bool

    def scale(self, x: Any, step_index: int) -> Any:
        """Do as ``scale_model_input`` does."""

    def move(self, model_output: Any, step_index: int, x: Any) -> Any:
        """Do as ``step`` does."""


# Step index, and what the model is given, [M, ...] -> its output.
Model = Callable[[int, Array], Array]


@dataclass(frozen=True)
class Tape:
    """Trajectories of N samples: what the model was given at each step, its ``outputs``, and ``final`` [N, ...].

    With guidance the model is given each sample twice: M = 2N rows, as ``loop.denoise`` does.
    """

    fed: Sequence[Any]
    outputs: Sequence[Any]
    final: Any

    @classmethod
    def of(cls, spec: DenoiserSpec, sampler: TensorSampler, noise: Array, model: Model) -> Tape:
        """Denoise ``noise`` float32 [N, ...]. Raises NoTrajectory, and ModelError as ``denoise`` does."""
        if not sampler.differentiable:
            raise NoTrajectory(f"the steps of {sampler.name} cannot be differentiated")
        x = torch.from_numpy(noise * np.float32(sampler.init_noise_sigma))
        fed, outputs = list[Any](), list[Any]()
        for step, timestep in enumerate(sampler.timesteps):
            scaled = sampler.scale(x, step).float()
            fed.append(torch.cat([scaled, scaled]) if guided(spec) else scaled)
            output = torch.from_numpy(model(step, fed[-1].detach().numpy())).requires_grad_()
            outputs.append(output)
            try:
                # A step may write into what it is given, which a leaf forbids.
                x = sampler.move(answer(spec, x.shape[1], output.clone()), step, x).float()
            except RuntimeError as error:
                raise NoTrajectory(f"{sampler.name} failed in torch: {error}") from error
            if not torch.isfinite(x).all():
                raise ModelError(
                    f"The sample is not finite after step {step} (timestep {timestep:g}).",
                    "Check the model's weights, and that the scheduler is the one it was trained with.",
                )
            if not x.requires_grad:
                raise NoTrajectory(f"the steps of {sampler.name} cannot be differentiated")
        return cls(fed, outputs, x)

    def back(self, step: int, end: Any, later: Sequence[Any]) -> Any:
        """Return the gradient of step ``step``'s output, [M, ...].

        ``end``: the gradient of ``final``; ``later``: those of what the model was given at the steps
        after this one, in order.
        """
        ends = [self.final, *self.fed[step + 1 :]]
        (found,) = torch.autograd.grad(
            ends, [self.outputs[step]], [end, *later], retain_graph=True, allow_unused=True
        )
        return torch.zeros_like(self.outputs[step]) if found is None else found
