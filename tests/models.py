"""Tiny denoisers with random weights, written as users have them: diffusers folders, an ONNX file with a YAML."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import yaml

from tests.graphs import GraphBuilder

UNET_CHANNELS = (8, 16)
CLASSES = 5
PROMPT_LETTERS = "abcdefghijklmnopqrstuvwxyz"
TEXT_WIDTH = 12
TOKENS = 8


def tiny_scheduler(**options: Any) -> dict[str, Any]:
    """A DDIM configuration; ``options`` replace entries."""
    return {
        "_class_name": "DDIMScheduler",
        "_diffusers_version": "0.42.1",
        "num_train_timesteps": 1000,
        "beta_schedule": "linear",
        "beta_start": 1e-4,
        "beta_end": 0.02,
        "prediction_type": "epsilon",
        "clip_sample": True,
        "timestep_spacing": "leading",
        **options,
    }


def randomize(module: Any, seed: int = 0) -> Any:
    """Give every parameter random values: fresh norms are all ones, which hides mistakes in their names."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return module.eval()


def tiny_unet(seed: int = 0, **options: Any) -> Any:
    """A UNet2DModel of two levels with attention on the lower one; ``options`` replace entries of its config."""
    import torch
    from diffusers import UNet2DModel

    torch.manual_seed(seed)
    config: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": UNET_CHANNELS,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 8,
        "num_class_embeds": CLASSES,
    }
    return randomize(UNet2DModel(**{**config, **options}), seed)


def tiny_conditional_unet(seed: int = 0, **options: Any) -> Any:
    """A UNet2DConditionModel of two levels with cross-attention on the lower one."""
    import torch
    from diffusers import UNet2DConditionModel

    torch.manual_seed(seed)
    config: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": UNET_CHANNELS,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 4,
        "cross_attention_dim": TEXT_WIDTH,
    }
    return randomize(UNet2DConditionModel(**{**config, **options}), seed)


def write_index(folder: Path, class_name: str, **parts: tuple[str, str]) -> None:
    """Write model_index.json."""
    index = {"_class_name": class_name, "_diffusers_version": "0.42.1", **parts}
    (folder / "model_index.json").write_text(json.dumps(index))


def write_scheduler(folder: Path, scheduler: dict[str, Any]) -> None:
    """Write scheduler/scheduler_config.json."""
    (folder / "scheduler").mkdir(parents=True, exist_ok=True)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))


def tiny_unet_folder(
    tmp_path: Path, *, scheduler: dict[str, Any] | None = None, half: bool = False, seed: int = 0, **unet: Any
) -> Path:
    """A pipeline folder with a class-conditional UNet2DModel (``num_class_embeds=None``: unconditional).

    ``half`` stores the weights in float16; ``unet`` replaces entries of the UNet's configuration.
    """
    folder = tmp_path / "tiny_unet"
    model = tiny_unet(seed, **unet)
    (model.half() if half else model).save_pretrained(folder / "unet", safe_serialization=True)
    config = scheduler or tiny_scheduler()
    write_scheduler(folder, config)
    write_index(
        folder, "DDIMPipeline", unet=("diffusers", "UNet2DModel"), scheduler=("diffusers", config["_class_name"])
    )
    return folder


def tiny_conditional_folder(tmp_path: Path, seed: int = 0, **unet: Any) -> Path:
    """The bare folder of a UNet2DConditionModel: no scheduler, no text encoder."""
    folder = tmp_path / "tiny_conditional"
    tiny_conditional_unet(seed, **unet).save_pretrained(folder, safe_serialization=True)
    return folder


def write_tokenizer(folder: Path) -> Any:
    """A CLIP tokenizer whose vocabulary is the letters."""
    from transformers import CLIPTokenizer

    letters = [*PROMPT_LETTERS, *(f"{letter}</w>" for letter in PROMPT_LETTERS)]
    words = [*letters, "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=TOKENS)
    tokenizer.save_pretrained(folder)
    return tokenizer


def write_text_encoder(folder: Path, vocabulary: int, end: int, projected: bool, width: int, seed: int) -> None:
    """A random CLIP text model of one layer."""
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        projection_dim=width,
        bos_token_id=end - 1,
        eos_token_id=end,
        pad_token_id=end,
    )
    model = (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)
    randomize(model, seed).save_pretrained(folder, safe_serialization=True)


def tiny_text_pipeline_folder(tmp_path: Path, seed: int = 0, xl: bool = False, **unet: Any) -> Path:
    """A Stable-Diffusion-like folder: CLIP tokenizer and text model, cross-attention UNet, AutoencoderKL.

    ``xl``: two text encoders, pooled text and time ids as SDXL has them.
    """
    import torch
    from diffusers import AutoencoderKL

    folder = tmp_path / ("tiny_xl" if xl else "tiny_text")
    parts = {"unet": ("diffusers", "UNet2DConditionModel"), "vae": ("diffusers", "AutoencoderKL")}
    parts["scheduler"] = ("diffusers", "PNDMScheduler")
    for suffix in ("", "_2") if xl else ("",):
        tokenizer = write_tokenizer(folder / f"tokenizer{suffix}")
        projected = suffix == "_2"
        write_text_encoder(
            folder / f"text_encoder{suffix}",
            len(tokenizer),
            tokenizer.eos_token_id,
            projected,
            TEXT_WIDTH // (2 if xl else 1),
            seed,
        )
        parts[f"tokenizer{suffix}"] = ("transformers", "CLIPTokenizer")
        encoder = "CLIPTextModelWithProjection" if projected else "CLIPTextModel"
        parts[f"text_encoder{suffix}"] = ("transformers", encoder)
    extra: dict[str, Any] = {}
    if xl:
        added = TEXT_WIDTH // 2 + 6 * 8
        extra = {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": added,
        }
    model = tiny_conditional_unet(seed, **{**extra, **unet})
    model.save_pretrained(folder / "unet", safe_serialization=True)
    torch.manual_seed(seed)
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=16,
    )
    randomize(vae, seed).save_pretrained(folder / "vae", safe_serialization=True)
    write_scheduler(
        folder,
        {
            "_class_name": "PNDMScheduler",
            "beta_schedule": "scaled_linear",
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "skip_prk_steps": True,
            "set_alpha_to_one": False,
            "steps_offset": 1,
            "num_train_timesteps": 1000,
        },
    )
    write_index(folder, "StableDiffusionXLPipeline" if xl else "StableDiffusionPipeline", **parts)
    return folder


def tiny_onnx_denoiser(opset: int = 17, size: int = 9) -> onnx.ModelProto:
    """A denoiser with a strided Conv, a ConvTranspose, a Gemm on the timestep and a class embedding; odd size."""
    graph = GraphBuilder(opset=opset)
    x = graph.input("x", ["batch", 3, size, size])
    t = graph.input("t", ["batch"])
    y = graph.input("y", ["batch"], onnx.TensorProto.INT64)
    axes = graph.weight("axes", np.array([1]))
    embedded = graph.op("Gather", [graph.random("labels.weight", 4, 8, scale=1.0), y], "labels")
    column = graph.op("Unsqueeze", [t, axes], "column")
    scaled = graph.op("Mul", [column, graph.weight("per_timestep", np.float32([1e-3]))], "scaled")
    time = graph.gemm(scaled, "time", 8, 1)
    both = graph.op("Add", [time, embedded], "both")
    planes = graph.op("Unsqueeze", [both, graph.weight("plane_axes", np.array([2, 3]))], "planes")
    down = graph.conv(x, "down", 8, 3, strides=[2, 2])
    mixed = graph.op("Relu", [graph.op("Add", [down, planes], "mixed")], "act")
    weight = graph.random("up.weight", 8, 8, 3, 3, scale=0.1)
    up = graph.op("ConvTranspose", [mixed, weight], "up", strides=[2, 2], pads=[1, 1, 1, 1], kernel_shape=[3, 3])
    graph.conv(up, "last", 3, 8)
    graph.nodes[-1].output[0] = graph.output("out", ["batch", 3, size, size])
    return graph.model()


def tiny_onnx_with_yaml(tmp_path: Path, opset: int = 17, **entries: Any) -> Path:
    """``tiny.onnx`` with ``tiny.yaml`` beside it; ``entries`` replace those of the YAML (None removes one)."""
    tmp_path.mkdir(parents=True, exist_ok=True)
    path = tmp_path / "tiny.onnx"
    onnx.save(tiny_onnx_denoiser(opset), path)
    description: dict[str, Any] = {
        "sample": "x",
        "timestep": "t",
        "conditions": ["y"],
        "prediction_type": "epsilon",
        "scheduler": tiny_scheduler(),
        "pixel_range": [-1, 1],
        "labels": ["a", "b", "c", "d"],
        **entries,
    }
    kept = {name: value for name, value in description.items() if value is not None}
    path.with_suffix(".yaml").write_text(yaml.safe_dump(kept))
    return path
