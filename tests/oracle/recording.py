"""What a pipeline of diffusers gives its denoiser, by hooks of its own: no code of mpq_deploy is used."""

from __future__ import annotations

import inspect
import json
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

Array = np.ndarray[Any, np.dtype[Any]]
INDEX = "model_index.json"


@dataclass
class Observed:
    """``calls``: per call of the denoiser its tensors by name; ``steps``: of which step each was."""

    calls: list[dict[str, Array]] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    scheduler_steps: int = 0
    images: Array = field(default_factory=lambda: np.empty(0, np.float32))


def observe(
    folder: Path, component: str, arguments: dict[str, Any], steps: int, seed: int
) -> Observed:
    """Call the pipeline in ``folder`` once, and return what its denoiser was given at every step."""
    import diffusers

    with ExitStack() as stack:
        for name in parts_of(folder):
            part = getattr(diffusers, name, None)
            if getattr(part, "_keep_in_fp32_modules", None):
                # All is float32; diffusers would want accelerate to load these.
                stack.enter_context(patch.object(part, "_keep_in_fp32_modules", None))
        pipeline = diffusers.DiffusionPipeline.from_pretrained(
            str(folder), torch_dtype=torch.float32, local_files_only=True
        )
    pipeline.set_progress_bar_config(disable=True)
    observed = Observed()
    module = getattr(pipeline, component)

    def hook(called: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        names = list(_parameters(called))
        flat: dict[str, Array] = {}
        for name, value in [*zip(names, args), *kwargs.items()]:
            flatten(name, value, flat)
        observed.calls.append(flat)
        observed.steps.append(observed.scheduler_steps)

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        output = _called(pipeline, arguments, steps, seed, observed)
    finally:
        handle.remove()
    observed.images = as_array(output[0])
    return observed


def parts_of(folder: Path) -> list[str]:
    """Return the classes of the pipeline's parts."""
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    return [entry[1] for entry in index.values() if isinstance(entry, list) and entry[1]]


def _called(
    pipeline: Any, arguments: dict[str, Any], steps: int, seed: int, observed: Observed
) -> Any:
    given = dict(arguments)
    taken = _parameters_of(type(pipeline).__call__)
    if "num_inference_steps" in taken:
        given.setdefault("num_inference_steps", steps)
    if "output_type" in taken:
        given.setdefault("output_type", "np")
    if "generator" in taken:
        given["generator"] = torch.Generator().manual_seed(seed)
    scheduler = type(pipeline.scheduler)
    original = scheduler.step

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        observed.scheduler_steps += 1
        return result

    step.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
    torch.manual_seed(seed)
    with patch.object(scheduler, "step", step), torch.no_grad():
        return pipeline(**given)


def _parameters(module: Any) -> list[str]:
    return [name for name in _parameters_of(type(module).forward) if name != "self"]


def _parameters_of(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


def flatten(name: str, value: Any, into: dict[str, Array]) -> None:
    """Put the tensors in ``value`` into ``into``: elements as ``name.0``, a dictionary's by their keys."""
    if isinstance(value, torch.Tensor):
        into[name] = value.detach().to(torch.float64).numpy().copy()
    elif isinstance(value, dict):
        for key, one in value.items():
            flatten(key, one, into)
    elif isinstance(value, (list, tuple)):
        for number, one in enumerate(value):
            flatten(f"{name}.{number}", one, into)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        into[name] = np.asarray(value, np.float64)


def as_array(first: Any) -> Array:
    """Return the first thing that a pipeline returned, channels last where it has them so."""
    if isinstance(first, (list, tuple)):
        return np.stack([as_array(one) for one in first])
    if isinstance(first, torch.Tensor):
        return np.asarray(first.detach().float().numpy())
    values = np.asarray(first)
    return values.astype(np.float32) / (255 if values.dtype == np.uint8 else 1)
