"""A denoiser's arguments as tensors by name, and back: lists and dictionaries are taken apart.

``down_block_additional_residuals: [a, b]`` is ``down_block_additional_residuals.0`` and ``.1``;
``added_cond_kwargs: {text_embeds: a}`` is ``text_embeds``. What is not a tensor stays where it is.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mpq_deploy.errors import ModelError
from mpq_deploy.models.spec import Array

# Between a list's name and the number of its element.
ELEMENT = "."
# Arguments that say how to answer, not what of.
ANSWERS = ("return_dict",)


@dataclass(frozen=True)
class Slot:
    """The place of the tensor ``name``."""

    name: str


@dataclass(frozen=True)
class Arguments:
    """A call: ``tensors`` by name in the order of the parameters; ``form`` has ``Slot`` for each."""

    tensors: dict[str, torch.Tensor]
    form: dict[str, Any]

    @classmethod
    def of(cls, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        """Take a call of ``function`` apart. Raises ModelError where two tensors have one name."""
        signature = inspect.signature(wrapped(function))
        given, parameters = signature.bind(*args, **kwargs).arguments, signature.parameters
        flat: dict[str, Any] = {}
        for name, value in given.items():
            # What a function takes by **name is there by its own names.
            kind = parameters[name].kind
            flat.update(value if kind is inspect.Parameter.VAR_KEYWORD else {name: value})
        tensors: dict[str, torch.Tensor] = {}
        form = {
            name: _apart(name, value, tensors)
            for name, value in flat.items()
            if name not in ANSWERS and (value is not None or _needed(parameters.get(name)))
        }
        return cls(tensors, form)

    def filled(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """Return the arguments with other ``tensors`` in their places."""
        return {name: _together(value, tensors) for name, value in self.form.items()}

    @property
    def constants(self) -> dict[str, Any]:
        """What is not a tensor, by name."""
        found: dict[str, Any] = {}
        for name, value in self.form.items():
            _collect(name, value, found)
        return found


def wrapped(function: Any) -> Any:
    """Return the function that ``function`` wraps without telling so, bound alike; else itself.

    diffusers' ``apply_forward_hook`` around a VAE's ``decode`` names it from release 0.42 on.
    """
    bound = getattr(function, "__self__", None)
    inner = getattr(function, "__func__", function)
    if hasattr(inner, "__wrapped__") or not inspect.isfunction(inner):
        return function
    kinds = {one.kind for one in inspect.signature(inner).parameters.values()}
    cells = [cell.cell_contents for cell in inner.__closure__ or ()]
    held = [one for one in cells if inspect.isfunction(one)]
    takes_any = {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD} <= kinds
    if not takes_any or len(held) != 1:
        return function
    return held[0] if bound is None else held[0].__get__(bound)


def first_tensor(output: Any) -> torch.Tensor | None:
    """Return the first tensor of what a module answers with: itself, or in a tuple or mapping."""
    if isinstance(output, torch.Tensor):
        return output
    parts = output.values() if isinstance(output, Mapping) else output
    if not isinstance(parts, (list, tuple)) and not isinstance(output, Mapping):
        return None
    return next((one for one in map(first_tensor, parts) if one is not None), None)


def as_array(value: torch.Tensor) -> Array:
    """Return a tensor as an array: real numbers as float32, others as they are."""
    detached = value.detach().float() if value.is_floating_point() else value.detach()
    return np.asarray(detached.cpu().numpy())


def rows_for(value: torch.Tensor, shape: tuple[int, ...], count: int) -> torch.Tensor | None:
    """Return ``value`` as [count, *shape], as a graph takes it; None where it does not fit.

    A tensor of one sample is repeated. Where a sample has several rows, [count * rows, ...] (a
    video's frames in the batch axis), they become an axis of their own.
    """
    wanted, given = (count, *shape), tuple(value.shape)
    if given == wanted:
        return value
    if given in (shape, (1, *shape)):
        return value.reshape(1, *shape).expand(wanted)
    if shape and given[1:] == shape[1:] and value.numel() == math.prod(wanted):
        return value.reshape(wanted)
    return None


def _needed(parameter: inspect.Parameter | None) -> bool:
    """Whether a function cannot be called without it, be it with None."""
    return parameter is not None and parameter.default is inspect.Parameter.empty


def _apart(name: str, value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        if name in tensors:
            raise ModelError(f"The denoiser is given two tensors of the name '{name}'.")
        tensors[name] = value
        return Slot(name)
    if isinstance(value, dict):
        return {key: _apart(str(key), one, tensors) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        parts = [_apart(f"{name}{ELEMENT}{i}", one, tensors) for i, one in enumerate(value)]
        return tuple(parts) if isinstance(value, tuple) else parts
    return value


def _together(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    if isinstance(value, Slot):
        return tensors[value.name]
    if isinstance(value, dict):
        return {key: _together(one, tensors) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_together(one, tensors) for one in value)
    return value


def _collect(name: str, value: Any, found: dict[str, Any]) -> None:
    if isinstance(value, dict):
        for key, one in value.items():
            _collect(str(key), one, found)
    elif isinstance(value, (list, tuple)):
        for number, one in enumerate(value):
            _collect(f"{name}{ELEMENT}{number}", one, found)
    elif not isinstance(value, Slot) and value is not None:
        found[name] = value
