"""Checkpoints of training: one safetensors file, moved into place when it is complete.

The file holds its own digest, so that training never continues from an altered state.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mpq_deploy.recover.recovery_result import CurvePoint
from mpq_deploy.recover.train import Trainer
from mpq_deploy.system.inputs import as_object, parse_json, whole
from mpq_deploy.system.progress import Talk

# Incremented with every change of what a checkpoint holds.
CHECKPOINT_FORMAT = 2
MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def save_checkpoint(trainer: Trainer, path: Path, key: str) -> None:
    """Write the state of ``trainer`` to ``path``; ``key`` identifies the training's inputs."""
    from safetensors.torch import save

    progress = trainer.progress
    tensors = {f"now.{name}": value.detach() for name, value in trainer.student.named_parameters()}
    tensors.update({f"best.{name}": value for name, value in progress.best.items()})
    for number, parameter in enumerate(_optimized(trainer)):
        for name, value in trainer.optimizer.state[parameter].items():
            tensors[f"optimizer.{number}.{name}"] = torch.as_tensor(value)
    if trainer.losses.memory is not None:
        tensors.update(
            {f"memory.{name}": value for name, value in trainer.losses.memory.state().items()}
        )
    values = {
        "format": CHECKPOINT_FORMAT,
        "key": key,
        "step": progress.step,
        "before": progress.before.tolist(),
        "best_error": progress.best_error,
        "best_by_timestep": progress.best_by_timestep.tolist(),
        "best_step": progress.best_step,
        "curve": [asdict(point) for point in progress.curve],
    }
    copies = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with aside.open("wb") as file:
            text = json.dumps(values)
            file.write(save(copies, metadata={"progress": text, "sha256": _digest(copies, text)}))
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def restore_checkpoint(trainer: Trainer, path: Path, key: str, talk: Talk) -> bool:
    """Load the state at ``path`` into ``trainer``; return whether there is one of this ``key``.

    A truncated or altered file is ignored, with a warning.
    """
    if not path.is_file():
        return False
    read = _read(path)
    if read is None:
        talk.warn(f"{path} was truncated or altered: training starts over")
        return False
    values, tensors = read
    if values.get("format") != CHECKPOINT_FORMAT or values.get("key") != key:
        return False
    with whole(path):
        _take_over(trainer, values, tensors)
    return True


def _take_over(trainer: Trainer, values: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    progress = trainer.progress
    device = trainer.student.device
    with torch.no_grad():
        for name, parameter in trainer.student.named_parameters():
            parameter.copy_(tensors[f"now.{name}"])
    for number, parameter in enumerate(_optimized(trainer)):
        held = {
            m: tensors[f"optimizer.{number}.{m}"]
            for m in MOMENTS
            if f"optimizer.{number}.{m}" in tensors
        }
        trainer.optimizer.state[parameter] = {m: v.to(device) for m, v in held.items()}
    if trainer.losses.memory is not None:
        trainer.losses.memory.restore(_under("memory.", tensors), device)
    progress.best = _under("best.", tensors)
    for name in ("step", "best_step", "best_error"):
        setattr(progress, name, values[name])
    progress.before, progress.best_by_timestep = (
        np.array(values["before"]),
        np.array(values["best_by_timestep"]),
    )
    progress.curve = [CurvePoint(**point) for point in values["curve"]]


def _read(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]] | None:
    """Return the values and tensors of a checkpoint; None for a wrong digest or no safetensors."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError):
        return None
    text = metadata.get("progress", "")
    if metadata.get("sha256") != _digest(tensors, text):
        return None
    return as_object(
        parse_json(text, f"{path}: progress", infinite=True), f"{path}: progress"
    ), tensors


def _digest(tensors: dict[str, torch.Tensor], text: str) -> str:
    from safetensors.torch import save

    return hashlib.sha256(save(tensors, metadata={"progress": text})).hexdigest()


def _optimized(trainer: Trainer) -> list[Any]:
    return [parameter for group in trainer.optimizer.param_groups for parameter in group["params"]]


def _under(prefix: str, tensors: dict[str, Any]) -> dict[str, Any]:
    return {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }
