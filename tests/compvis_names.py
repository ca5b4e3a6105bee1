"""Write a tiny Stable Diffusion folder as one file in CompVis' names, as checkpoints are handed around.

The way back from diffusers' names, written from the layout of the models and not from its converters.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

UNET, VAE, CLIP = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer."
# SDXL's: CLIP as transformers has it, and a larger one as OpenCLIP has it.
XL_CLIP, XL_OPEN_CLIP = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
OPEN_CLIP = {
    "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
AROUND = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def unet_name(name: str, layers: int, attends: set[str]) -> str:
    """The name of a UNet's tensor; ``attends``: the up blocks that have attention."""
    stem, _, kind = name.rpartition(".")
    if stem in AROUND:
        return f"{AROUND[stem]}.{kind}"
    block = re.match(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", name)
    if block:
        side, number, part, place, rest = block.groups()
        first = int(number) * (layers + 1) + (side == "down")
        key = "input_blocks" if side == "down" else "output_blocks"
        if part == "downsamplers":
            return f"{key}.{first + layers}.0.op.{kind}"
        if part == "upsamplers":
            return f"{key}.{first + layers}.{2 if number in attends else 1}.conv.{kind}"
        inner = resnet_name(rest) if part == "resnets" else rest
        return f"{key}.{first + int(place)}.{int(part == 'attentions')}.{inner}"
    part, place, rest = re.match(r"mid_block\.(\w+)\.(\d+)\.(.+)", name).groups()  # type: ignore[union-attr]
    if part == "attentions":
        return f"middle_block.1.{rest}"
    return f"middle_block.{2 * int(place)}.{resnet_name(rest)}"


def resnet_name(rest: str) -> str:
    stem, _, kind = rest.rpartition(".")
    return f"{RESNET[stem]}.{kind}"


def vae_name(name: str, levels: int) -> str:
    """The name of an autoencoder's tensor, which has so many ``levels``."""
    name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", name)

    def up(match: re.Match[str]) -> str:
        inner = "block" if match[2] == "resnets" else "upsample"
        return f"up.{levels - 1 - int(match[1])}.{inner}"

    name = re.sub(r"up_blocks\.(\d+)\.(resnets|upsamplers\.0)", up, name)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    found = re.fullmatch(r"(\w+)\.mid_block\.attentions\.0\.(.+)\.(\w+)", name)
    if found:
        return f"{found[1]}.mid.attn_1.{ATTENTION[found[2]]}.{found[3]}"
    return name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")


def open_clip_tensors(state: dict[str, Any]) -> dict[str, Any]:
    """A CLIPTextModelWithProjection by OpenCLIP's names: queries, keys and values in one matrix."""
    found = {"text_projection": state["text_projection.weight"].T}
    text = {n.removeprefix("text_model."): v for n, v in state.items() if n.startswith("text_")}
    found |= {new: text[old] for old, new in OPEN_CLIP.items()}
    count = 1 + max(int(name.split(".")[2]) for name in text if name.startswith("encoder."))
    for number in range(count):
        old, new = f"encoder.layers.{number}", f"transformer.resblocks.{number}"
        for kind in ("weight", "bias"):
            parts = [text[f"{old}.self_attn.{one}_proj.{kind}"] for one in "qkv"]
            found[f"{new}.attn.in_proj_{kind}"] = torch.cat(parts)
            for theirs, ours in OPEN_CLIP_LAYER.items():
                found[f"{new}.{ours}.{kind}"] = text[f"{old}.{theirs}.{kind}"]
    return found


def compvis_tensors(folder: Path) -> dict[str, Any]:
    """All weights of a folder of Stable Diffusion, or of SDXL, by CompVis' names."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    attends = {str(n) for n, b in enumerate(unet.up_blocks) if hasattr(b, "attentions")}
    tensors = {
        UNET + unet_name(name, unet.config.layers_per_block, attends): value
        for name, value in unet.state_dict().items()
    }
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    for name, value in vae.state_dict().items():
        new = vae_name(name, len(vae.config.block_out_channels))
        attention = ".attn_1." in new and value.ndim == 2
        tensors[VAE + new] = value[:, :, None, None] if attention else value
    second = folder / "text_encoder_2" / "model.safetensors"
    prefix = XL_CLIP if second.is_file() else CLIP
    for name, value in load_file(folder / "text_encoder" / "model.safetensors").items():
        full = name if name.startswith("text_model.") else f"text_model.{name}"
        tensors[prefix + full] = value
    if second.is_file():
        open_clip = open_clip_tensors(load_file(second))
        tensors |= {XL_OPEN_CLIP + name: value for name, value in open_clip.items()}
    return {name: value.clone().contiguous() for name, value in tensors.items()}


def compvis_file(folder: Path, path: Path, dtype: Any = None, **changes: Any) -> Path:
    """Write the folder's weights into one file; ``changes`` by name with __ for a dot, None removes."""
    tensors = compvis_tensors(folder)
    for name, value in changes.items():
        tensors[name.replace("__", ".")] = value
    kept = {name: value for name, value in tensors.items() if value is not None}
    save_file({name: v.to(dtype) if dtype else v for name, v in kept.items()}, path)
    return path


def without_weights(folder: Path, out: Path) -> Path:
    """A copy of a folder that has its configurations alone."""
    shutil.copytree(folder, out, ignore=shutil.ignore_patterns("*.safetensors"))
    return out
