"""What a user may add to a model that does not bring everything: conditions, scheduler, prompts, guidance."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mpq_deploy.errors import ModelError, UsageError, nearest
from mpq_deploy.models.conditions import Conditions
from mpq_deploy.models.spec import InputSpec

# Parts of a pipeline that denoise, the first that is there by default.
DENOISERS = ("unet", "transformer")
SCHEDULER_FILE = "scheduler_config.json"


@dataclass(frozen=True)
class Additions:
    """Options of ``open_denoiser``: each None when the model's own is to be used.

    ``component``: which part of a pipeline; None is the one that denoises.
    """

    conditions: Path | None = None
    scheduler: Path | None = None
    prompts: Path | None = None
    guidance_scale: float | None = None
    description: Path | None = None
    component: str | None = None
    component_samples: int = 64


@dataclass(frozen=True)
class WantedInput:
    """A condition that a model takes. ``shape`` leaves the rows out; None is a size that the array decides."""

    name: str
    shape: tuple[int | None, ...]
    dtype: str = "float32"

    def __str__(self) -> str:
        sizes = ", ".join("any" if size is None else str(size) for size in self.shape)
        return f"{self.name}: {self.dtype} [rows{', ' if sizes else ''}{sizes}]"

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Say whether an array of ``shape`` (rows first) may be this input."""
        sizes = shape[1:]
        return len(sizes) == len(self.shape) and all(w in (None, s) for w, s in zip(self.shape, sizes))


def list_inputs(wanted: Sequence[WantedInput]) -> str:
    """Return one line that says which arrays are needed."""
    return "; ".join(str(item) for item in wanted)


def check_conditions(conditions: Conditions, wanted: Sequence[WantedInput], origin: str) -> tuple[InputSpec, ...]:
    """Return the inputs with the shapes of the given arrays.

    Raises UsageError naming what is missing, unknown, of another shape, or (class labels) not a whole number.
    """
    names = [item.name for item in wanted]
    for name in conditions.arrays:
        if name not in names:
            raise UsageError(
                f"{origin} holds an array '{name}', which is no input of the model.",
                f"{nearest(name, names)}Needed: {list_inputs(wanted) or 'no array, only _rows'}.",
            )
    inputs = []
    for item in wanted:
        values = conditions.arrays.get(item.name)
        if values is None:
            raise UsageError(f"{origin} has no array '{item.name}'.", f"Needed: {list_inputs(wanted)}.")
        if not item.fits(values.shape):
            raise UsageError(f"The array '{item.name}' of {origin} has shape {values.shape}.", f"Needed: {item}.")
        if not np.isfinite(values).all():
            raise ModelError(f"The array '{item.name}' of {origin} holds NaN or infinite values.")
        if item.dtype.startswith("int") and not np.issubdtype(values.dtype, np.integer):
            raise UsageError(f"The array '{item.name}' of {origin} has type {values.dtype}.", f"Needed: {item}.")
        inputs.append(InputSpec.model_validate({"name": item.name, "shape": values.shape[1:], "dtype": item.dtype}))
    return tuple(inputs)


def read_scheduler(path: Path) -> dict[str, Any]:
    """Return the scheduler configuration in ``path``: a JSON file, a scheduler folder or a pipeline folder.

    Raises UsageError when there is none, ModelError when it is no JSON object with ``_class_name``.
    """
    candidates = [path, path / SCHEDULER_FILE, path / "scheduler" / SCHEDULER_FILE]
    file = next((candidate for candidate in candidates if candidate.is_file()), None)
    if file is None:
        raise UsageError(
            f"There is no scheduler configuration at {path}.",
            f"Give a {SCHEDULER_FILE}, the folder that holds it, or a pipeline folder.",
        )
    config = read_json(file)
    if "_class_name" not in config:
        raise ModelError(
            f"{file} has no _class_name, so it does not say which scheduler it configures.",
            'Add, for example, "_class_name": "DDIMScheduler".',
        )
    return config


def predicted(scheduler: dict[str, Any]) -> Any:
    """Return what the model predicts, from its scheduler's configuration."""
    if "FlowMatch" in str(scheduler.get("_class_name")):
        return "flow_prediction"
    return scheduler.get("prediction_type", "epsilon")


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file. Raises ModelError when it cannot be read as one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds no JSON object.")
    return content
