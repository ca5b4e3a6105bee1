"""Every class of pipeline that the oracle runs: how a tiny one is built, saved, and called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

from tests.oracle import further, image_transformers, sequences, unets
from tests.oracle.unets import Built

BUILDERS: dict[str, Callable[[], Built]] = {
    "StableDiffusionPipeline": unets.stable_diffusion,
    "StableDiffusionImg2ImgPipeline": unets.img2img,
    "StableDiffusionInpaintPipeline": unets.inpaint,
    "StableDiffusionInstructPix2PixPipeline": unets.pix2pix,
    "StableDiffusionUpscalePipeline": unets.upscale,
    "StableDiffusionControlNetPipeline": unets.control_net,
    "StableDiffusionControlNetPipeline, for half of the steps": unets.control_net_part,
    "StableDiffusionAdapterPipeline": unets.t2i_adapter,
    "StableDiffusionPipeline with an IP-Adapter": unets.ip_adapter,
    "StableDiffusionXLPipeline": unets.xl,
    "StableDiffusionXLImg2ImgPipeline, a refiner": unets.xl_refiner,
    "LatentConsistencyModelPipeline": unets.latent_consistency,
    "DDPMPipeline": unets.ddpm,
    "DDIMPipeline": unets.ddim_pixels,
    "ConsistencyModelPipeline": unets.consistency,
    "LDMSuperResolutionPipeline": unets.latent_superresolution,
    "KandinskyV22Pipeline": unets.kandinsky,
    "Kandinsky3Pipeline": unets.kandinsky_3,
    "DiTPipeline": image_transformers.dit,
    "PixArtAlphaPipeline": image_transformers.pixart_alpha,
    "PixArtSigmaPipeline": image_transformers.pixart_sigma,
    "StableDiffusion3Pipeline": image_transformers.sd3,
    "StableDiffusion3Pipeline, skipping layers": image_transformers.sd3_skipping,
    "FluxPipeline": image_transformers.flux,
    "FluxPipeline with a negative prompt": image_transformers.flux_schnell_guided,
    "FluxImg2ImgPipeline": image_transformers.flux_img2img,
    "FluxFillPipeline": image_transformers.flux_fill,
    "FluxControlPipeline": image_transformers.flux_control,
    "FluxKontextPipeline": image_transformers.flux_kontext,
    "AuraFlowPipeline": image_transformers.aura_flow,
    "SanaPipeline": image_transformers.sana,
    "SanaSprintPipeline": image_transformers.sana_sprint,
    "Lumina2Pipeline": image_transformers.lumina_2,
    "CogView4Pipeline": image_transformers.cog_view_4,
    "HunyuanDiTPipeline": image_transformers.hunyuan_dit,
    "ChromaPipeline": image_transformers.chroma,
    "QwenImagePipeline": image_transformers.qwen_image,
    "ZImagePipeline": image_transformers.z_image,
    "LTXPipeline": sequences.ltx,
    "WanPipeline": sequences.wan,
    "WanPipeline of two transformers": sequences.wan_two,
    "WanPipeline, the second of two transformers": sequences.wan_two,
    "WanPipeline, timesteps per token": sequences.wan_per_token,
    "StableVideoDiffusionPipeline": sequences.video_diffusion,
    "AnimateDiffPipeline": sequences.animate_diff,
    "CogVideoXPipeline": sequences.cog_video_x,
    "HunyuanVideoPipeline": sequences.hunyuan_video,
    "LattePipeline": sequences.latte,
    "StableAudioPipeline": sequences.stable_audio,
    "StableDiffusionXLControlNetPipeline": further.xl_control_net,
    "StableDiffusion3ControlNetPipeline": further.sd3_control_net,
    "FluxControlNetPipeline": further.flux_control_net,
    "StableDiffusionPAGPipeline": further.perturbed_attention,
    "StableDiffusionLatentUpscalePipeline": further.latent_upscale,
    "IFPipeline": further.deep_floyd,
    "KandinskyV22PriorPipeline": further.kandinsky_prior,
    "CogView3PlusPipeline": further.cog_view_3,
    "MarigoldDepthPipeline": further.marigold,
    "AmusedPipeline": further.amused,
    "TextToVideoSDPipeline": further.text_to_video,
    "WanImageToVideoPipeline": further.wan_image,
    "WanImageToVideoPipeline, timesteps per token": further.wan_image_per_token,
    "LTXImageToVideoPipeline": further.ltx_image,
    "CogVideoXImageToVideoPipeline": further.cog_video_image,
    "AudioLDMPipeline": further.audio_ldm,
}
# What is refused, and how its message begins or goes on.
REFUSED = {
    "StableDiffusionPipeline with an IP-Adapter": "hold an IP-Adapter",
    "StableDiffusion3Pipeline, skipping layers": "'skip_layers.0' = 0 here, but nothing",
    "ZImagePipeline": "takes a list of samples",
    "StableDiffusionPAGPipeline": "compute attention by PAG",
    "AmusedPipeline": "is given no timestep",
}
# What runs with PyTorch's denoiser, but has no ONNX graph: how its message begins or goes on.
NOT_EXPORTED = {
    "Lumina2Pipeline": "cannot export",
    "ChromaPipeline": "for one number of samples alone",
    "QwenImagePipeline": "cannot export",
}
# The part that denoises, where no unet or transformer does.
COMPONENTS = {
    "KandinskyV22PriorPipeline": "prior",
    "WanPipeline, the second of two transformers": "transformer_2",
}
CALL = "call.yaml"
# Steps of the sampler; schedulers of second order take two calls in one.
STEPS = 3


@dataclass(frozen=True)
class Case:
    """A saved pipeline: its folder, and the file that says what it is called with (None: nothing)."""

    name: str
    folder: Path
    call: Path | None
    arguments: dict[str, Any]


def save_case(name: str, folder: Path) -> Case:
    """Build the pipeline ``name`` and save it, the file of its call and its pictures in ``folder``."""
    pipeline, arguments = BUILDERS[name]()
    pipeline.save_pretrained(folder / "pipeline", safe_serialization=True)
    if not arguments:
        return Case(name, folder / "pipeline", None, arguments)
    content = {key: _written(key, value, folder) for key, value in arguments.items()}
    (folder / CALL).write_text(yaml.safe_dump(content), encoding="utf-8")
    return Case(name, folder / "pipeline", folder / CALL, arguments)


def _written(name: str, value: Any, folder: Path) -> Any:
    """Return what stands for a value in the call's file; pictures are written beside it."""
    if isinstance(value, Image.Image):
        value.save(folder / f"{name}.png")
        return f"{name}.png"
    if isinstance(value, torch.Tensor):
        np.save(folder / f"{name}.npy", value.numpy())
        return f"{name}.npy"
    return value
