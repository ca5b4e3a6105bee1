"""A trajectory as a function of the model's outputs, which torch can differentiate.

In: a sampler, the model, and the noise. Out: the final samples, and what directions there are at the
output of every call. The sampler's steps are recorded as torch runs them: what they keep from step to
step (multistep samplers), clip, or add as noise of a seed is in the derivative, guidance as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
# The number of a call, and gradients of its output, [P, M, ...] -> those of its inputs in ``given``,
# one per direction by name; none for an input that the output does not depend on.
Through = Callable[[int, Any], Mapping[str, Sequence[Any]]]


@dataclass(frozen=True)
class Tape:
    """``final`` [N, ...] as a function of the ``outputs`` of all calls of the model, each [M, ...].

    ``given``: of each call, by name, the inputs that depend on outputs of earlier calls.
    """

    given: Sequence[Mapping[str, Any]]
    outputs: Sequence[Any]
    final: Any

    def back(self, ends: Sequence[Any], through: Through) -> None:
        """Take the gradients ``ends`` of ``final``, one per direction, back through all calls.

        ``through`` is called with each call, the last first, when the gradients of its output are
        whole. Every operation between the calls is gone back through once per direction.
        """
        gradients = [self._from([self.final], [end], len(self.outputs)) for end in ends]
        for call in reversed(range(len(self.outputs))):
            wanted = torch.stack([rows.pop() for rows in gradients])
            names, inputs = through(call, wanted), self.given[call]
            depend = [name for name in inputs if names.get(name)]
            if not depend:
                continue
            values = [inputs[name] for name in depend]
            for direction, rows in enumerate(gradients):
                found = self._from(values, [names[name][direction] for name in depend], call)
                for row, more in zip(rows, found, strict=True):
                    row += more

    def _from(self, ends: list[Any], gradients: list[Any], count: int) -> list[Any]:
        """Return what gradients of ``ends`` are at the first ``count`` outputs, which may be changed."""
        into = list(self.outputs[:count])
        rows = torch.autograd.grad(ends, into, gradients, retain_graph=True, allow_unused=True)
        return [
            torch.zeros_like(output) if row is None else row.clone()
            for output, row in zip(into, rows, strict=True)
        ]


def sampler_tape(spec: DenoiserSpec, sampler: TensorSampler, noise: Array, model: Model) -> Tape:
    """Denoise ``noise`` float32 [N, ...]; return the tape of its steps, a call each.

    With guidance the model is given each sample twice: M = 2N rows, as ``loop.denoise`` does. Raises
    NoTrajectory, and ModelError as ``denoise`` does.
    """
    if not sampler.differentiable:
        raise NoTrajectory(f"the steps of {sampler.name} cannot be differentiated")
    x = torch.from_numpy(noise * np.float32(sampler.init_noise_sigma))
    given, outputs = list[Mapping[str, Any]](), list[Any]()
    for step, timestep in enumerate(sampler.timesteps):
        scaled = sampler.scale(x, step).float()
        fed = torch.cat([scaled, scaled]) if guided(spec) else scaled
        given.append({spec.sample.name: fed} if fed.requires_grad else {})
        output = torch.from_numpy(model(step, fed.detach().numpy())).requires_grad_()
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
    return Tape(given, outputs, x)
