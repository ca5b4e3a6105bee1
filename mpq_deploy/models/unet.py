"""The UNet classes of diffusers: inputs by configuration; and loading any class's weights."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from mpq_deploy.errors import ModelError, MpqError, UsageError
from mpq_deploy.models.conditions import WantedInput
from mpq_deploy.models.weight_files import (
    AGAIN,
    CONFIG,
    check_config,
    check_shapes,
    stored_weights,
)
from mpq_deploy.models.weight_files import find_weights as find_weights
from mpq_deploy.models.weight_kinds import (
    refuse_other_names,
    refuse_quantized_config,
    refuse_weights,
)
from mpq_deploy.system.inputs import read_json_object
from mpq_deploy.system.libraries import gist, no_bars, silenced

UNET_CLASSES = ("UNet2DModel", "UNet2DConditionModel")
WEIGHTS_NAME = "diffusion_pytorch_model"
# Original size, crop corner and target size (Podell et al. 2023, section 2.2); of a refiner original size, crop corner
# and aesthetic score.
TIME_IDS, REFINER_TIME_IDS = 6, 5
# An entry that a user may add to config.json: the shape of one sample.
SHAPE = "sample_shape"
VIDEO_AXES = 3


def unet_inputs(config: dict[str, Any], time_ids: int = TIME_IDS) -> tuple[WantedInput, ...]:
    """Return the conditions of a UNet of this configuration; ``time_ids`` numbers in that input.

    Raises UsageError for a kind that is not known.
    """
    inputs = []
    if config["_class_name"] == "UNet2DConditionModel" and not _reads_class_alone(config):
        inputs.append(WantedInput("encoder_hidden_states", (None, _cross_attention_width(config))))
    inputs += _class_inputs(config)
    if config["_class_name"] == "UNet2DConditionModel":
        inputs += _added_inputs(config, time_ids)
        if config.get("time_cond_proj_dim") is not None:
            inputs.append(WantedInput("timestep_cond", (int(config["time_cond_proj_dim"]),)))
    return tuple(inputs)


def _reads_class_alone(config: dict[str, Any]) -> bool:
    """Whether every block reads a class vector and no text: widths of its attention are its own."""
    width = config.get("cross_attention_dim")
    varied = isinstance(width, list) and len(set(width)) > 1
    return varied and bool(config.get("class_embeddings_concat"))


def _cross_attention_width(config: dict[str, Any]) -> int:
    width = config.get("encoder_hid_dim") or config.get("cross_attention_dim", 1280)
    if isinstance(width, list):
        if len(set(width)) > 1:
            raise UsageError(
                f"The UNet has cross-attention of different widths per level: {width}.",
                "Export it to ONNX by other means and give the ONNX file with a YAML.",
            )
        width = width[0]
    return int(width)


def _class_inputs(config: dict[str, Any]) -> list[WantedInput]:
    kind = config.get("class_embed_type")
    classes = config.get("num_class_embeds")
    width = 4 * _first(config.get("block_out_channels", (320,)))
    if kind is None:
        return [] if classes is None else [WantedInput("class_labels", (), "int64")]
    if kind == "timestep":
        return [WantedInput("class_labels", ())]
    if kind == "identity":
        return [WantedInput("class_labels", (width,))]
    if kind in ("projection", "simple_projection"):
        return [
            WantedInput("class_labels", (int(config["projection_class_embeddings_input_dim"]),))
        ]
    raise UsageError(f"The UNet's class_embed_type is '{kind}', which is not supported.")


def _added_inputs(config: dict[str, Any], time_ids: int) -> list[WantedInput]:
    name, kind = "addition_embed_type", config.get("addition_embed_type")
    if config.get("encoder_hid_dim_type") not in (None, "text_proj"):
        name = "encoder_hid_dim_type"
        kind = config[name]
    elif kind in (None, "text"):
        return []
    if kind == "text_time":
        text = int(config["projection_class_embeddings_input_dim"]) - time_ids * int(
            config["addition_time_embed_dim"]
        )
        return [WantedInput("text_embeds", (text,)), WantedInput("time_ids", (time_ids,))]
    raise UsageError(
        f"The UNet's {name} is '{kind}', which is not supported.",
        "Export it to ONNX by other means and give the ONNX file with a YAML.",
    )


def sample_shape(config: dict[str, Any], folder: Path) -> tuple[int, ...]:
    """Return (channels, sizes): ``sample_size``, or one size for every axis of the class.

    ``sample_shape`` in the configuration is the shape itself, for samples that are laid out
    otherwise (tokens [T, C], frames first). Raises UsageError for extra input channels or a missing
    size.
    """
    if config.get(SHAPE) is not None:
        return _whole_shape(config[SHAPE], folder)
    channels = int(config.get("in_channels", 3))
    given = int(config.get("out_channels") or channels)
    if given not in (channels, 2 * channels):
        raise UsageError(
            f"The model in {folder} takes {channels} channels and gives {given}: it needs extra image channels "
            "(inpainting, super-resolution), which are not supported.",
            "Use a model that denoises all its input channels.",
        )
    size = config.get("sample_size")
    axes = spatial_axes(str(config.get("_class_name")))
    if size is None or (axes == VIDEO_AXES and not isinstance(size, (list, tuple))):
        raise UsageError(
            f"The model in {folder} does not say its sample_size."
            if size is None
            else f"The model in {folder} is of a class for videos, and its sample_size {size} names no frames.",
            'Add "sample_size" to its config.json: the side of a square, or [height, width], or for video [frames, '
            'height, width], in what the model sees (latents); or "sample_shape", the whole shape of one sample.',
        )
    sizes = size if isinstance(size, (list, tuple)) else (size,) * axes
    return channels, *(int(one) for one in sizes)


def spatial_axes(class_name: str) -> int:
    """Return a class's axes beside channels: the digit in UNet3DConditionModel, else 2."""
    axes = re.search(r"([123])D", class_name)
    return int(axes[1]) if axes else 2


def _whole_shape(given: Any, folder: Path) -> tuple[int, ...]:
    whole = isinstance(given, (list, tuple)) and bool(given)
    if not whole or not all(isinstance(size, int) and size > 0 for size in given):
        raise UsageError(
            f"sample_shape in the config.json of {folder} is {given}.",
            "Give the sizes of one sample, without the batch axis, such as [16, 4, 8, 8].",
        )
    return tuple(given)


def load_pretrained(model_class: Any, folder: Path, variant: str | None) -> torch.nn.Module:
    """Load a diffusers model in float32, every weight from the file. Raises ModelError."""
    config = read_json_object(folder / CONFIG, error=ModelError, hint=AGAIN)
    refuse_quantized_config(config, folder / CONFIG)
    stored = stored_weights(folder, WEIGHTS_NAME, variant)
    refuse_weights(stored.types, folder)
    check_config(config, stored, folder)
    if getattr(model_class, "_keep_in_fp32_modules", None):
        # All of it is float32 here; diffusers would ask for another package to load only parts so.
        model_class = type(model_class.__name__, (model_class,), {"_keep_in_fp32_modules": None})
    try:
        with no_bars("diffusers"), silenced():
            check_shapes(lambda: model_class.from_config(config), stored, folder)
            model, loaded = model_class.from_pretrained(
                folder,
                variant=variant,
                use_safetensors=True,
                torch_dtype=torch.float32,
                local_files_only=True,
                low_cpu_mem_usage=True,
                output_loading_info=True,
            )
    except MpqError:
        raise
    except Exception as error:
        # A class raises anything at all for a configuration that is not its own.
        raise ModelError(
            f"The weights in {folder} cannot be loaded: {gist(error)}",
            "The file is damaged or belongs to another config.json: download or save the model again.",
        ) from error
    refuse_other_names(
        loaded["missing_keys"], loaded["unexpected_keys"], model_class.__name__, folder
    )
    return model.eval()


def _first(value: Any) -> int:
    return int(value[0]) if isinstance(value, (list, tuple)) else int(value)
