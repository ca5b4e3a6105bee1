"""A pipeline's image as a function of its denoiser's outputs, which torch can differentiate.

In: a diffusers pipeline with our model as its denoiser. Out: the image, and what directions there are
at the output of every call of the denoiser. The pipeline's own code runs, as for any other image, with
torch's autograd on: guidance, scheduler, decoder and what else it computes in torch is in the
derivative. Where its code leaves torch on the way, there is none, and that is said.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from mpq_deploy.calls.pipeline_runs import PipelineRuns, returned_array
from mpq_deploy.calls.sampler_tape import NoTrajectory, Tape
from mpq_deploy.errors import ModelError, UsageError
from mpq_deploy.models.spec import Array

# What a call of the denoiser is given, [M, ...] by input name -> its output.
Model = Callable[[dict[str, Array]], Array]
_LEAVING = (torch.Tensor.detach, torch.Tensor.detach_, torch.Tensor.data)


@dataclass(frozen=True)
class PipelineTape:
    """The ``tape`` of one image, and the ``feeds`` of each call.

    ``tape.final`` has the values of what the pipeline returns, float32 [1, M], in any order.
    """

    tape: Tape
    feeds: tuple[dict[str, Array], ...]

    @classmethod
    def of(
        cls, runs: PipelineRuns, number: int, steps: int, seed: int, model: Model
    ) -> PipelineTape:
        """Make image ``number`` as ``runs.image`` does.

        Raises NoTrajectory where the image, or an input of the denoiser, has no derivative, and as
        ``runs.image``.
        """
        watch = _Watch(runs, model)
        try:
            with watch:
                returned = runs.with_gradients(number, steps, seed)
        except UsageError as error:
            raise NoTrajectory(
                f"{runs.short_name} fails with gradients: {error.message}"
            ) from error
        finally:
            runs.seen, runs.compute = None, None
        final = watch.image(returned)
        return cls(Tape(watch.given, watch.outputs, final), tuple(watch.feeds))


class _Watch(TorchFunctionMode):  # type: ignore[misc]
    """Keeps the calls of the denoiser, and the tensor that the image is made of.

    Pipelines return arrays: the image is what they made an array of. Anything else that is taken
    out of the derivative on the way is refused, since what came of it would count as constant.
    """

    def __init__(self, runs: PipelineRuns, model: Model) -> None:
        super().__init__()
        self.given, self.outputs = list[Mapping[str, Any]](), list[Any]()
        self.feeds = list[dict[str, Array]]()
        self._name, self._model = runs.short_name, model
        self._left, self._ours = list[Any](), False
        runs.seen, runs.compute = self._seen, self._computed

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run a function of torch that the pipeline calls."""
        kwargs = kwargs or {}
        if self._ours or not any(map(_depends, args)):
            return func(*args, **kwargs)
        if func is torch.Tensor.numpy:
            self._left.append(args[0])
            return args[0].detach().numpy()
        found = func(*args, **kwargs)
        # A property's getter is a method of the property.
        leaving = func in _LEAVING or getattr(func, "__self__", None) in _LEAVING
        if leaving or (not torch.is_grad_enabled() and _real(found)):
            raise NoTrajectory(f"{self._name} takes samples out of their derivative on the way")
        return found

    def image(self, returned: Any) -> Any:
        """Return the values of what the pipeline ``returned``, [1, M] in any order."""
        first = returned[0]
        found = [first] if _depends(first) else self._left
        values = returned_array(returned)
        if len(found) != 1 or len(values) != 1 or not _same(found[0], values):
            raise NoTrajectory(
                f"{self._name} makes its image of no single tensor with a derivative"
            )
        return found[0].float().reshape(1, -1)

    def _seen(self, tensors: Mapping[str, torch.Tensor]) -> None:
        # What the call computes is not the pipeline's, until its output is there.
        self._ours = True
        self.given.append({name: one for name, one in tensors.items() if one.requires_grad})

    def _computed(self, feeds: dict[str, Array]) -> Any:
        unlike = [
            name
            for name, one in self.given[-1].items()
            if name not in feeds or tuple(one.shape) != feeds[name].shape
        ]
        if unlike:
            raise NoTrajectory(
                f"{self._name} gives its denoiser '{unlike[0]}' in another shape than the graph takes"
            )
        self.feeds.append(feeds)
        output = torch.from_numpy(self._model(feeds)).requires_grad_()
        if not torch.isfinite(output).all():
            raise ModelError(
                f"The denoiser's output is not finite at call {len(self.feeds)} of an image.",
                "Check the model's weights, and its values against the range of FP16.",
            )
        self.outputs.append(output)
        self._ours = False
        # A pipeline may write into what it is given, which a leaf forbids.
        return output.clone()


def _depends(value: Any) -> bool:
    """Whether an argument, or one in a list of tensors, has a derivative."""
    if isinstance(value, (list, tuple)):
        return any(map(_depends, value))
    return isinstance(value, torch.Tensor) and value.requires_grad


def _real(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _same(tensor: Any, values: Array) -> bool:
    """Whether a tensor holds ``values``, whatever the order of the axes."""
    own = tensor.detach().float().numpy().ravel()
    return own.size == values.size and np.array_equal(np.sort(own), np.sort(values.ravel()))
