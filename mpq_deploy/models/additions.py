"""What a user may give with a model: conditions, scheduler, prompts, guidance scale."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpq_deploy.errors import ModelError, UsageError
from mpq_deploy.models.lora_option import LoraOption
from mpq_deploy.system.inputs import read_json_object
from mpq_deploy.system.quantities import NO_SIZES, ImageSizes

# Parts of a pipeline that denoise, the first that is there by default; training keeps averages
# beside the weights.
DENOISERS = ("unet", "transformer", "unet_ema", "transformer_ema")
SCHEDULER_FILE = "scheduler_config.json"
# A part of pipelines that judges images and makes none.
LEFT_OUT = ("safety_checker",)
# Parts that prepare pictures for that one and for IP-Adapters, where the pipeline's class can be without.
PREPARING = ("feature_extractor", "image_encoder")
INDEX, CONFIG = "model_index.json", "config.json"
# Sampler steps behind the latents that a decoder is measured on, where the recipe does not say.
COMPONENT_STEPS = 20
# Methods by which parts are called. The VAE's are two parts: its encoder where there are pictures.
FORWARD, DECODE, ENCODE = "forward", "decode", "encode"
VAE, VAE_PARTS = "vae", {"vae_decoder": DECODE, "vae_encoder": ENCODE}
_DECODERS = (VAE, "vqvae", "vqgan", "movq")


@dataclass(frozen=True)
class Additions:
    """What the user gives beside the model; None: the model's own is used.

    ``description``: the YAML of an ONNX file that does not lie beside it. ``component``: which part
    of a pipeline folder, such as ``vae``, which gets ``component_samples`` inputs, latents of
    ``component_steps`` steps where the calls do not say how many; None is the one that denoises.
    ``config``: the folder with the configurations of a checkpoint in one file, which
    is written as a folder into ``unpacked`` (None: into one of this process). ``sizes``: empty for
    the model's own one.
    """

    conditions: Path | None = None
    scheduler: Path | None = None
    prompts: Path | None = None
    guidance_scale: float | None = None
    description: Path | None = None
    component: str | None = None
    component_samples: int = 64
    component_steps: int = COMPONENT_STEPS
    call: Path | None = None
    calls: Path | None = None
    loras: tuple[LoraOption, ...] = ()
    config: Path | None = None
    unpacked: Path | None = None
    sizes: ImageSizes = NO_SIZES


def read_scheduler(path: Path) -> dict[str, Any]:
    """Return the scheduler configuration at ``path``: a JSON file, scheduler or pipeline folder.

    Raises UsageError when there is none, ModelError when it is not JSON object with ``_class_name``.
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


def denoiser_part(folder: Path, component: str | None) -> Path | None:
    """Return the folder of what denoises (or of ``component``) in a pipeline's; None: there is none.

    A folder with a configuration of its own and no parts is that folder itself.
    """
    names = DENOISERS if component is None else (component,)
    part = next((folder / name for name in names if (folder / name / CONFIG).is_file()), None)
    alone = (folder / CONFIG).is_file() and not (folder / INDEX).is_file()
    return folder if part is None and alone else part


def pipeline_index(folder: Path) -> dict[str, Any]:
    """Return model_index.json; without one (checkpoints of training) what the parts' own files say."""
    if (folder / INDEX).is_file():
        return _spared(folder, read_json(folder / INDEX))
    parts: dict[str, Any] = {}
    for path in sorted(folder.glob(f"*/{CONFIG}")):
        config = read_json(path)
        architectures = config.get("architectures")
        if config.get("_class_name"):
            parts[path.parent.name] = ["diffusers", config["_class_name"]]
        elif isinstance(architectures, list) and architectures:
            parts[path.parent.name] = ["transformers", architectures[0]]
    for path in sorted(folder.glob("tokenizer*/tokenizer_config.json")):
        parts[path.parent.name] = ["transformers", read_json(path).get("tokenizer_class")]
    scheduler = folder / "scheduler" / SCHEDULER_FILE
    if scheduler.is_file():
        parts["scheduler"] = ["diffusers", read_json(scheduler).get("_class_name")]
    return {**parts, **_named_pipeline(parts)} if any(name in parts for name in DENOISERS) else {}


def _spared(folder: Path, index: dict[str, Any]) -> dict[str, Any]:
    """Return the index without those ``PREPARING`` parts that the folder lacks and the class may lack."""
    lacking = [name for name in PREPARING if name in index and not (folder / name).is_dir()]
    if not lacking:
        return index
    import diffusers

    found = getattr(diffusers, str(index.get("_class_name")), None)
    spared = [name for name in lacking if name in getattr(found, "_optional_components", ())]
    return {**index, **{name: [None, None] for name in spared}}


def _named_pipeline(parts: dict[str, Any]) -> dict[str, str]:
    """Return the class of text-to-image pipelines whose parts these are; none where none is."""
    if "text_encoder" not in parts:
        return {}
    found = pipeline_of_parts({name: str(entry[1]) for name, entry in parts.items()})
    return {"_class_name": found} if found else {}


def pipeline_of_parts(parts: Mapping[str, str]) -> str | None:
    """Return the first text-to-image class of diffusers that takes ``parts`` (name -> class) whole."""
    from diffusers.pipelines.auto_pipeline import AUTO_TEXT2IMAGE_PIPELINES_MAPPING

    denoiser = next((name for name in ("unet", "transformer") if name in parts), "")
    for found in AUTO_TEXT2IMAGE_PIPELINES_MAPPING.values():
        taken = inspect.signature(found.__init__).parameters
        needed = {
            name
            for name, parameter in taken.items()
            if parameter.default is inspect.Parameter.empty
            and name not in ("self", *LEFT_OUT, *found._optional_components)
        }
        of_class = str(getattr(taken.get(denoiser), "annotation", ""))
        if parts[denoiser] in of_class and needed <= set(parts) and set(parts) <= set(taken):
            return str(found.__name__)
    return None


def predicted(scheduler: dict[str, Any]) -> Any:
    """Return what the model predicts, from its scheduler's configuration."""
    if "FlowMatch" in str(scheduler.get("_class_name")):
        return "flow_prediction"
    return scheduler.get("prediction_type", "epsilon")


def place_of(component: str) -> tuple[str, str]:
    """Return the pipeline's part that a component is of, and the method that it is called by."""
    method = VAE_PARTS.get(component, DECODE if component in _DECODERS else FORWARD)
    return (VAE if component in VAE_PARTS else component), method


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file of diffusers, which writes infinities. Raises ModelError."""
    return read_json_object(path, infinite=True, error=ModelError)
