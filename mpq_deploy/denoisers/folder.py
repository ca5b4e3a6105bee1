"""A diffusers pipeline folder, or the folder of its UNet, as a denoiser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mpq_deploy.denoisers.additions import (
    SCHEDULER_FILE,
    Additions,
    WantedInput,
    check_conditions,
    list_inputs,
    predicted,
    read_json,
    read_scheduler,
)
from mpq_deploy.denoisers.conditions import Conditions
from mpq_deploy.denoisers.decoder import decoder_network, decoder_upscale
from mpq_deploy.denoisers.denoiser import Denoiser
from mpq_deploy.denoisers.spec import DenoiserSpec, InputSpec
from mpq_deploy.denoisers.torch_export import TorchNetwork
from mpq_deploy.denoisers.unet import (
    OUTPUT,
    SAMPLE,
    TIMESTEP,
    WEIGHTS_NAME,
    find_weights,
    load_unet,
    sample_shape,
    unet_class_name,
    unet_network,
    wanted_inputs,
)
from mpq_deploy.errors import ModelError, UsageError
from mpq_deploy.talk import Talk

INDEX, CONFIG, CARD = "model_index.json", "config.json", "demo.json"
# Channels of a sample that is an image; others are latents.
IMAGE_CHANNELS = (1, 3)
IMAGE_RANGE = (-1.0, 1.0)
# The default guidance scale of diffusers' Stable Diffusion pipelines.
TEXT_GUIDANCE = 7.5


def open_folder(folder: Path, source: str, additions: Additions, talk: Talk) -> Denoiser:
    """Open a pipeline folder (model_index.json) or a UNet folder (config.json).

    Raises UsageError for a folder that is neither, for an unsupported class, and when something is missing that
    the folder cannot provide; ModelError for weights that cannot be loaded.
    """
    pipeline = read_json(folder / INDEX) if (folder / INDEX).is_file() else {}
    unet_folder = _unet_folder(folder, pipeline)
    config = read_json(unet_folder / CONFIG)
    unet_class_name(config, unet_folder)
    shape = sample_shape(config, unet_folder)
    find_weights(unet_folder, WEIGHTS_NAME)
    wanted = wanted_inputs(config)
    card = read_json(folder / CARD) if (folder / CARD).is_file() else {}
    _check_nothing_missing(folder, wanted, additions)
    scheduler = read_scheduler(additions.scheduler or folder)
    conditions = _conditions(folder, pipeline, config, card, wanted, additions, talk)
    inputs = check_conditions(conditions, wanted, str(additions.conditions or folder))
    # A timestep_cond input carries the guidance scale of a distilled model, which must not be guided again.
    text = any(item.name == "encoder_hidden_states" for item in wanted)
    text = text and not any(item.name == "timestep_cond" for item in wanted)
    unet = load_unet(unet_folder, config)
    sample = InputSpec(name=SAMPLE, shape=shape)
    latent = (folder / "vae").is_dir() or (folder / "vqvae").is_dir() or shape[0] not in IMAGE_CHANNELS
    spec = DenoiserSpec(
        name=str(card.get("name") or folder.resolve().name),
        source=source,
        sample=sample,
        timestep=InputSpec(name=TIMESTEP),
        conditions=inputs,
        output=OUTPUT,
        prediction_type=predicted(scheduler),
        scheduler=scheduler,
        guidance_scale=_guidance(additions, card, conditions, text),
        uncond_row=conditions.uncond_row,
        labels=conditions.labels,
        pixel_range=None if latent else IMAGE_RANGE,
        config=config,
    )
    decoder, notes = _decoder(folder, shape, talk)
    return Denoiser(spec, conditions, unet_network(unet, sample, inputs), decoder, notes)


def _decoder(folder: Path, latents: tuple[int, ...], talk: Talk) -> tuple[TorchNetwork | None, tuple[str, ...]]:
    """Return the pipeline's decoder; when it cannot be used, None and the reason."""
    try:
        return decoder_network(folder, latents), ()
    except ModelError as error:
        talk.warn(f"samples are compared as latents: {error.message}")
        return None, (f"No decoder, samples are compared as latents: {error.message}",)


def _unet_folder(folder: Path, pipeline: dict[str, Any]) -> Path:
    if pipeline:
        if (folder / "unet" / CONFIG).is_file():
            return folder / "unet"
        parts = ", ".join(name for name in pipeline if not name.startswith("_"))
        raise UsageError(
            f"The pipeline in {folder} has no unet/ with a {CONFIG}; its parts are: {parts or 'none'}.",
            "Only UNet pipelines are opened directly; export others to ONNX and give the ONNX file with a YAML.",
        )
    if (folder / CONFIG).is_file():
        return folder
    raise UsageError(
        f"{folder} is no diffusers model: it has neither {INDEX} nor {CONFIG}.",
        "Give the folder that save_pretrained wrote, or an .onnx file.",
    )


def _check_nothing_missing(folder: Path, wanted: tuple[WantedInput, ...], additions: Additions) -> None:
    """Raise one UsageError that lists everything the folder lacks."""
    missing = []
    has_scheduler = any((folder / place / SCHEDULER_FILE).is_file() for place in (".", "scheduler"))
    if additions.scheduler is None and not has_scheduler:
        missing.append("a scheduler: --scheduler FILE_or_folder")
    own_classes = all(item.name == "class_labels" and item.dtype == "int64" for item in wanted)
    has_text = (folder / "text_encoder").is_dir() and (folder / "tokenizer").is_dir()
    if wanted and additions.conditions is None and not own_classes and not has_text:
        missing.append(f"conditions: --conditions FILE.npz with the arrays {list_inputs(wanted)}")
    if missing:
        raise UsageError(f"{folder} does not bring everything that is needed.", f"Missing: {'; and '.join(missing)}.")


def _conditions(
    folder: Path,
    pipeline: dict[str, Any],
    config: dict[str, Any],
    card: dict[str, Any],
    wanted: tuple[WantedInput, ...],
    additions: Additions,
    talk: Talk,
) -> Conditions:
    """Return the user's conditions, else every class, else the prompts through the folder's text encoder."""
    if additions.conditions is not None:
        return Conditions.load(additions.conditions)
    if not wanted:
        return Conditions()
    if [item.name for item in wanted] == ["class_labels"]:
        return _every_class(int(config["num_class_embeds"]), card)
    from mpq_deploy.denoisers.text import prompts_file, read_prompts, text_conditions

    prompts = read_prompts(additions.prompts or prompts_file())
    channels_size = sample_shape(config, folder)[1:]
    pixels = decoder_upscale(folder)
    image_size = (channels_size[0] * pixels, channels_size[1] * pixels)
    return text_conditions(folder, pipeline, wanted, image_size, prompts, talk)


def _every_class(count: int, card: dict[str, Any]) -> Conditions:
    """Return one row per class; the last is the empty class when the card names one class fewer."""
    names = [str(name) for name in card.get("classes", ())]
    labels = (*names[:count], *(f"class {i}" for i in range(len(names), count)))
    empty = count - 1 if len(names) == count - 1 else None
    return Conditions({"class_labels": np.arange(count, dtype=np.int64)}, count, empty, labels)


def _guidance(additions: Additions, card: dict[str, Any], conditions: Conditions, text: bool) -> float:
    """Return the guidance scale: the user's, else the card's, else diffusers' for text, else 1 (none)."""
    default = TEXT_GUIDANCE if text and conditions.uncond_row is not None else 1.0
    scale = additions.guidance_scale if additions.guidance_scale is not None else card.get("guidance", default)
    if scale != 1 and conditions.uncond_row is None:
        raise UsageError(
            f"The guidance scale is {scale}, but the conditions have no row for the empty condition.",
            "Put its index as _uncond_row into the conditions file, or use a guidance scale of 1.",
        )
    return float(scale)
