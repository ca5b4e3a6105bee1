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
POOLED_WIDTH = 10
# Two heads of eight channels, one block, 8 x 8 latents of four channels.
BLOCKS: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1}
PATCHES: dict[str, Any] = {**BLOCKS, "in_channels": 4, "sample_size": 8, "patch_size": 2}
TEXT: dict[str, Any] = {"joint_attention_dim": TEXT_WIDTH, "pooled_projection_dim": POOLED_WIDTH}
# Entries of a conditional UNet's configuration that make it one level, which attends on the way down alone: enough
# for all but its blocks, and exported in a third of the time that a whole level takes.
ONE_LEVEL: dict[str, Any] = {
    "block_out_channels": (16,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "mid_block_type": None,
    "up_block_types": ("UpBlock2D",),
}
# The same for a UNet without text.
ONE_LEVEL_CLASSES: dict[str, Any] = {**ONE_LEVEL, "down_block_types": ("AttnDownBlock2D",)}
# One level with all kinds of blocks that attend to text.
WHOLE_LEVEL: dict[str, Any] = {
    **ONE_LEVEL,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "up_block_types": ("CrossAttnUpBlock2D",),
}
TRANSFORMERS: dict[str, dict[str, Any]] = {
    "DiTTransformer2DModel": {
        **PATCHES,
        "out_channels": 8,
        "num_embeds_ada_norm": CLASSES,
        "norm_num_groups": 4,
    },
    "PixArtTransformer2DModel": {
        **PATCHES,
        "out_channels": 8,
        "cross_attention_dim": 16,
        "caption_channels": TEXT_WIDTH,
        "norm_num_groups": 4,
    },
    "SD3Transformer2DModel": {
        **PATCHES,
        **TEXT,
        # The last block drops the text.
        "num_layers": 2,
        "out_channels": 4,
        "caption_projection_dim": 16,
        "pos_embed_max_size": 8,
    },
    "FluxTransformer2DModel": {
        **BLOCKS,
        **TEXT,
        "in_channels": 16,
        "patch_size": 1,
        "num_single_layers": 1,
        "guidance_embeds": True,
        "axes_dims_rope": (2, 2, 4),
    },
}


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
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")


def write_scheduler(folder: Path, scheduler: dict[str, Any]) -> None:
    """Write scheduler/scheduler_config.json."""
    (folder / "scheduler").mkdir(parents=True, exist_ok=True)
    (folder / "scheduler" / "scheduler_config.json").write_text(
        json.dumps(scheduler), encoding="utf-8"
    )


def tiny_unet_folder(
    tmp_path: Path,
    *,
    scheduler: dict[str, Any] | None = None,
    half: bool = False,
    seed: int = 0,
    **unet: Any,
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
        folder,
        "DDIMPipeline",
        unet=("diffusers", "UNet2DModel"),
        scheduler=("diffusers", config["_class_name"]),
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
    tokenizer = CLIPTokenizer(
        vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=TOKENS
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def write_text_encoder(
    folder: Path, vocabulary: int, end: int, projected: bool, width: int, seed: int
) -> None:
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


def tiny_clip_folder(tmp_path: Path, seed: int = 0, features: int = 12) -> Path:
    """A whole CLIP of random weights with its tokenizer: images of 28 x 28 pixels, both towers of one layer."""
    import torch
    from transformers import CLIPConfig, CLIPModel

    folder = tmp_path / "tiny_clip"
    tokenizer = write_tokenizer(folder)
    shape = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    end = tokenizer.eos_token_id
    text = {**shape, "vocab_size": len(tokenizer), "max_position_embeddings": TOKENS}
    text |= {"bos_token_id": end - 1, "eos_token_id": end, "pad_token_id": end}
    vision = {**shape, "image_size": 28, "patch_size": 14}
    torch.manual_seed(seed)
    model = randomize(
        CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=features)), seed
    )
    model.save_pretrained(folder, safe_serialization=True)
    half = [0.5, 0.5, 0.5]
    settings = {"crop_size": {"height": 28, "width": 28}, "image_mean": half, "image_std": half}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def tiny_text_pipeline_folder(tmp_path: Path, seed: int = 0, xl: bool = False, **unet: Any) -> Path:
    """A Stable-Diffusion-like folder: CLIP tokenizer and text model, cross-attention UNet, AutoencoderKL.

    ``xl``: two text encoders, pooled text and time ids as SDXL has them.
    """
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
    tiny_vae(4, seed).save_pretrained(folder / "vae", safe_serialization=True)
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


def write_t5(folder: Path, suffix: str, width: int, seed: int) -> None:
    """A T5 tokenizer whose vocabulary is the letters, and a random T5 encoder of one layer."""
    import torch
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    special = ["<pad>", "</s>", "<unk>"]
    words = [*special, *(f"\u2581{letter}" for letter in PROMPT_LETTERS), *PROMPT_LETTERS, "\u2581"]
    vocabulary = [(word, 0.0 if word in special else -2.0) for word in words]
    # Its own limit says nothing: pipelines pad to their own.
    tokenizer = T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=TOKENS)
    tokenizer.save_pretrained(folder / f"tokenizer{suffix}")
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=len(words), d_model=width, d_kv=4, d_ff=2 * width, num_layers=1, num_heads=2
    )
    encoder = randomize(T5EncoderModel(config), seed)
    encoder.save_pretrained(folder / f"text_encoder{suffix}", safe_serialization=True)


# Per class of transformer: the pipeline, and the width (projected or not) of each text encoder; None is a T5.
TEXT_PIPELINES: dict[str, tuple[str, tuple[tuple[bool, int] | None, ...]]] = {
    "PixArtTransformer2DModel": ("PixArtSigmaPipeline", (None,)),
    "SD3Transformer2DModel": ("StableDiffusion3Pipeline", ((True, 4), (True, 6), None)),
    "FluxTransformer2DModel": ("FluxPipeline", ((False, POOLED_WIDTH), None)),
}


def tiny_text_transformer_folder(
    tmp_path: Path, class_name: str, t5: bool = True, pipeline: str | None = None, **options: Any
) -> Path:
    """A pipeline folder as diffusers writes it: transformer, VAE, and its CLIP and T5 text encoders.

    ``t5``: whether its T5 is there; ``pipeline``: another class of pipeline; ``options`` are the transformer's.
    """
    folder = tiny_transformer_folder(tmp_path, class_name, vae=True, **options)
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    usual, encoders = TEXT_PIPELINES[class_name]
    index["_class_name"] = pipeline or usual
    for number, encoder in enumerate(encoders):
        suffix = f"_{number + 1}" if number else ""
        if encoder is None and not t5:
            index |= {f"tokenizer{suffix}": (None, None), f"text_encoder{suffix}": (None, None)}
        elif encoder is None:
            write_t5(folder, suffix, TEXT_WIDTH, number)
            index |= {f"tokenizer{suffix}": ("transformers", "T5Tokenizer")}
            index |= {f"text_encoder{suffix}": ("transformers", "T5EncoderModel")}
        else:
            tokenizer = write_tokenizer(folder / f"tokenizer{suffix}")
            projected, width = encoder
            place = folder / f"text_encoder{suffix}"
            write_text_encoder(
                place, len(tokenizer), tokenizer.eos_token_id, projected, width, number
            )
            kind = "CLIPTextModelWithProjection" if projected else "CLIPTextModel"
            index |= {
                f"tokenizer{suffix}": ("transformers", "CLIPTokenizer"),
                place.name: ("transformers", kind),
            }
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def tiny_transformer(class_name: str, seed: int = 0, **options: Any) -> Any:
    """A small diffusion transformer of one of the classes in ``TRANSFORMERS``; ``options`` replace entries."""
    import diffusers
    import torch

    torch.manual_seed(seed)
    return randomize(
        getattr(diffusers, class_name)(**{**TRANSFORMERS[class_name], **options}), seed
    )


def tiny_transformer_folder(
    tmp_path: Path,
    class_name: str,
    scheduler: dict[str, Any] | None = None,
    vae: bool = False,
    **options: Any,
) -> Path:
    """A pipeline folder with such a transformer, its scheduler and perhaps an AutoencoderKL."""
    flow = class_name in ("SD3Transformer2DModel", "FluxTransformer2DModel")
    config = scheduler or (tiny_flow_scheduler() if flow else tiny_scheduler(clip_sample=False))
    folder = tmp_path / f"tiny_{class_name}"
    tiny_transformer(class_name, **options).save_pretrained(
        folder / "transformer", safe_serialization=True
    )
    if class_name == "FluxTransformer2DModel":
        # Its own configuration does not say how large its images are.
        path = folder / "transformer" / "config.json"
        path.write_text(
            json.dumps({**json.loads(path.read_text(encoding="utf-8")), "sample_size": 8}),
            encoding="utf-8",
        )
    write_scheduler(folder, config)
    parts = {
        "transformer": ("diffusers", class_name),
        "scheduler": ("diffusers", config["_class_name"]),
    }
    if vae:
        tiny_vae(4, **({"shift_factor": 0.1} if flow else {})).save_pretrained(
            folder / "vae", safe_serialization=True
        )
        parts["vae"] = ("diffusers", "AutoencoderKL")
    write_index(folder, "DiffusionPipeline", **parts)
    return folder


def tiny_transformer_conditions(path: Path, class_name: str, rows: int = 3, seed: int = 0) -> Path:
    """Random text for such a transformer as --conditions takes it, the last row the empty prompt's."""
    rng = np.random.default_rng(seed)
    arrays: dict[str, Any] = {
        "encoder_hidden_states": rng.standard_normal((rows, 6, TEXT_WIDTH), np.float32)
    }
    if class_name == "PixArtTransformer2DModel":
        arrays["encoder_attention_mask"] = (np.arange(6) < 2 + np.arange(rows)[:, None]).astype(
            np.float32
        )
    else:
        arrays["pooled_projections"] = rng.standard_normal((rows, POOLED_WIDTH), np.float32)
    if class_name == "FluxTransformer2DModel":
        arrays["guidance"] = np.full(rows, 3.5, np.float32)
    np.savez(path, **arrays, _uncond_row=np.array(rows - 1))
    return path


def tiny_flow_scheduler(**options: Any) -> dict[str, Any]:
    """A flow-matching configuration; ``options`` replace entries."""
    return {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "num_train_timesteps": 1000,
        "shift": 3.0,
        **options,
    }


def tiny_vae(latent_channels: int, seed: int = 0, **options: Any) -> Any:
    """An AutoencoderKL that doubles the size once; ``options`` are added to its configuration."""
    import torch
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=latent_channels,
        sample_size=16,
        **options,
    )
    return randomize(vae, seed)


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
    up = graph.op(
        "ConvTranspose",
        [mixed, weight],
        "up",
        strides=[2, 2],
        pads=[1, 1, 1, 1],
        kernel_shape=[3, 3],
    )
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
    path.with_suffix(".yaml").write_text(yaml.safe_dump(kept), encoding="utf-8")
    return path
