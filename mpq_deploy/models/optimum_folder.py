"""An ONNX denoiser as optimum exports it: what a YAML would say is in the folder's own configurations.

In: ``unet/model.onnx`` with ``config.json`` beside it and ``scheduler/`` above. Out: the entries of
an ``OnnxDescription``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mpq_deploy.errors import ModelError
from mpq_deploy.models.additions import DENOISERS, SCHEDULER_FILE, read_json

MODEL, CONFIG = "model.onnx", "config.json"
SAMPLES, TIMESTEPS, OUTPUT = ("sample", "hidden_states"), ("timestep", "timesteps"), "out_sample"


def onnx_denoiser(folder: Path) -> Path | None:
    """Return the ONNX file of the part that denoises; None where there is none, or float weights too."""
    for part in (*(folder / name for name in DENOISERS), folder):
        if any(part.glob("*.safetensors*")):
            return None
        if (part / MODEL).is_file():
            return part / MODEL
    return None


def own_description(model: Path, inputs: Sequence[str], outputs: Sequence[str]) -> dict[str, Any]:
    """Return what the folder of ``model`` says of its inputs; empty where that is not everything.

    Raises ModelError for configurations that cannot be read.
    """
    config_path = model.parent / CONFIG
    if model.name != MODEL or not config_path.is_file():
        return {}
    config = read_json(config_path)
    sample = next((name for name in SAMPLES if name in inputs), None)
    timestep = next((name for name in TIMESTEPS if name in inputs), None)
    places = (f"../scheduler/{SCHEDULER_FILE}", SCHEDULER_FILE)
    scheduler = next((place for place in places if (model.parent / place).is_file()), None)
    shape = _shape(config, config_path)
    if sample is None or timestep is None or shape is None:
        return {}
    return {
        "sample": {"name": sample, "shape": shape},
        "timestep": timestep,
        "conditions": [name for name in inputs if name not in (sample, timestep)],
        "output": OUTPUT if OUTPUT in outputs else outputs[0],
        "scheduler": scheduler,
    }


def _shape(config: dict[str, Any], path: Path) -> list[int] | None:
    """Return (channels, height, width) of a sample; None where the configuration does not say."""
    channels, size = config.get("in_channels"), config.get("sample_size")
    if channels is None or size is None:
        return None
    sizes = list(size) if isinstance(size, list) else [size, size]
    if not all(isinstance(one, int) and one > 0 for one in (channels, *sizes)):
        raise ModelError(
            f"{path} has in_channels {channels} and sample_size {size}.",
            "They must be whole numbers: correct them, or write a YAML beside the model.",
        )
    return [channels, *sizes]
