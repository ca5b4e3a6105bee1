"""UNets of any size with random weights: the configurations of Stable Diffusion 1.5 and SDXL, and narrower ones.

Weights are drawn layer by layer and kept in FP16, as published checkpoints are; activations stay of order one. Random
weights say nothing about quality: these models are for time and memory.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

CONDITION_ROWS, TOKENS = 4, 77
# Spread of the output channels' sizes in trained layers, as a log-normal (our choice, so that scales differ).
CHANNEL_SPREAD = 0.3
# The gain of the last layer of each residual branch, so that the sum of many stays of order one.
RESIDUAL_GAIN = 0.3
RESIDUAL_ENDS = ("conv2.weight", "to_out.0.weight", "ff.net.2.weight", "proj_out.weight")
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


@dataclass(frozen=True)
class Size:
    """``channels``: of each level; ``text``: width of the text condition; ``groups``: of the norms."""

    channels: tuple[int, ...]
    text: int
    groups: int = 32
    sdxl: bool = False


SIZES = {
    "2M": Size((16, 32, 64, 64), 64, 8),
    "20M": Size((48, 96, 192, 192), 128, 16),
    "100M": Size((112, 224, 448, 448), 256, 16),
    "860M": Size((320, 640, 1280, 1280), 768),
    "2570M": Size((320, 640, 1280), 2048, sdxl=True),
}


def unet_config(size: Size, latent: int) -> dict[str, Any]:
    """Return the arguments of diffusers' UNet2DConditionModel for samples of ``latent`` x ``latent`` x 4."""
    common: dict[str, Any] = {
        "sample_size": latent,
        "block_out_channels": size.channels,
        "cross_attention_dim": size.text,
        "norm_num_groups": size.groups,
        "attention_head_dim": 8,
    }
    if not size.sdxl:
        return common
    return {
        **common,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": (5, 10, 20),
        "transformer_layers_per_block": (1, 2, 10),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    }


def make_model(size: Size, latent: int, folder: Path, seed: int = 0) -> int:
    """Write a diffusers pipeline folder (unet, scheduler) and conditions.npz; return the number of parameters."""
    import torch
    from diffusers import UNet2DConditionModel
    from safetensors.numpy import save_file

    with torch.device("meta"):
        module = UNet2DConditionModel(**unet_config(size, latent))
    random = np.random.default_rng(seed)
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    weights = {name: _weight(name, shape, random) for name, shape in shapes.items()}
    (folder / "unet").mkdir(parents=True)
    (folder / "scheduler").mkdir()
    module.save_config(folder / "unet")
    save_file(
        weights, folder / "unet" / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"}
    )
    (folder / "scheduler" / "scheduler_config.json").write_text(
        json.dumps(SCHEDULER), encoding="utf-8"
    )
    index = {
        "_class_name": "StableDiffusionPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
    }
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    np.savez(folder / "conditions.npz", **_conditions(size, random))  # type: ignore[arg-type]
    return sum(map(prod, shapes.values()))


def _weight(name: str, shape: tuple[int, ...], random: np.random.Generator) -> np.ndarray[Any, Any]:
    values = random.standard_normal(shape, np.float32)
    if name.endswith(".bias"):
        values *= 0.02
    elif len(shape) == 1:
        values = 1 + 0.1 * values
    else:
        gain = RESIDUAL_GAIN if name.endswith(RESIDUAL_ENDS) else 1.0
        channels = gain * np.exp(CHANNEL_SPREAD * random.standard_normal(shape[0], np.float32))
        values *= (channels / np.sqrt(prod(shape[1:]))).reshape(-1, *(1,) * (len(shape) - 1))
    return values.astype(np.float16)


def _conditions(size: Size, random: np.random.Generator) -> dict[str, np.ndarray[Any, Any]]:
    found = {
        "encoder_hidden_states": random.standard_normal(
            (CONDITION_ROWS, TOKENS, size.text), np.float32
        )
    }
    if size.sdxl:
        found["text_embeds"] = random.standard_normal((CONDITION_ROWS, 1280), np.float32)
        found["time_ids"] = np.tile(
            np.array([1024, 1024, 0, 0, 1024, 1024], np.float32), (CONDITION_ROWS, 1)
        )
    return found
