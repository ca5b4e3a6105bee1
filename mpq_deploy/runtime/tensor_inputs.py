"""What a pipeline hands to its denoiser as the graph takes it: tensors of the declared shape and type.

In: what a caller gave by name. Out: tensors that fit the graph's inputs, or a UsageError that names
the input and what was found: nothing is rounded or cut to fit.
"""

from __future__ import annotations

from typing import Any

import torch

from mpq_deploy.calls.arguments import rows_for
from mpq_deploy.errors import UsageError
from mpq_deploy.models.spec import InputSpec


def sample_tensor(value: Any) -> torch.Tensor:
    """Return the sample [N, ...]. Raises UsageError for what is no tensor, or has no rows."""
    if not isinstance(value, torch.Tensor):
        raise UsageError(f"The sample is a {type(value).__name__}.", "Give a torch tensor.")
    if not value.ndim or not len(value):
        raise UsageError(
            f"The sample has the shape {list(value.shape)}.", "Give at least one sample [1, ...]."
        )
    return value


def timesteps(value: Any, declared: InputSpec, count: int) -> torch.Tensor:
    """Return the timestep as the graph takes it: one per sample (``count``), or one for all.

    Raises UsageError for another number of timesteps than that.
    """
    times = _tensor(value, declared.name)
    if not declared.batched:
        if times.ndim and len(torch.unique(times)) > 1:
            raise UsageError(
                f"The model takes one timestep per call, but {len(torch.unique(times))} were given."
            )
        return times.reshape(-1)[0].reshape(declared.shape)
    if times.numel() == 1:
        return times.reshape(1, *(1,) * len(declared.shape)).expand(count, *declared.shape)
    rows = rows_for(times, declared.shape, count)
    return _refuse(times, declared, count) if rows is None else rows


def condition_rows(value: Any, item: InputSpec, count: int) -> torch.Tensor:
    """Return a condition with a row for each of ``count`` samples; one that is all samples' is repeated.

    Raises UsageError for one that cannot be made so.
    """
    given = _tensor(value, item.name)
    if not item.batched:
        return given
    fits = (rows_for(given, shape, count) for shape in item.shapes)
    rows = next((one for one in fits if one is not None), None)
    if rows is not None:
        return rows
    if item.sizes:
        # A size within the range: the graph itself says whether it takes it. Without an axis for
        # the batch these are positions, of no sample's own.
        return given.expand(count, *given.shape) if given.ndim == len(item.shape) else given
    return _refuse(given, item, count)


def cast(value: torch.Tensor, item: InputSpec, device: torch.device) -> torch.Tensor:
    """Return a tensor in the input's type on ``device``, contiguous.

    Raises UsageError where an input of whole numbers is given others.
    """
    if item.dtype.startswith("int") and value.is_floating_point():
        parts = value[value != value.round()]
        if len(parts):
            raise UsageError(
                f"'{item.name}' is {item.dtype}, and {float(parts[0]):g} is not a whole number.",
                "Give whole numbers: for a timestep by a scheduler whose timesteps are whole.",
            )
    return value.to(device, getattr(torch, item.dtype)).contiguous()


def _tensor(value: Any, name: str) -> torch.Tensor:
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(
            f"'{name}' is a {type(value).__name__}: {value!r:.40}.", "Give a torch tensor."
        ) from error


def _refuse(value: torch.Tensor, item: InputSpec, count: int) -> torch.Tensor:
    raise UsageError(
        f"'{item.name}' has the shape {list(value.shape)}; of {count} samples the model takes "
        f"{[count, *item.shape]}.",
        "Give a row for each sample, of the shape that the model was built with.",
    )
