"""Tiny pipelines around a UNet: Stable Diffusion and its relatives, pixels, Kandinsky."""

from __future__ import annotations

from typing import Any

import diffusers

from tests.oracle.parts import (
    clip_processor,
    clip_text,
    clip_tokenizer,
    clip_vision,
    ddim,
    embedding,
    picture,
    seeded,
    t5_text,
    t5_tokenizer,
    tiny_conditional_unet,
    tiny_unet,
    tiny_vae,
)
from tests.tiny_models import CLASSES, ONE_LEVEL_CLASSES, TEXT_WIDTH, UNET_CHANNELS

TEXT = {"prompt": "a red fox", "negative_prompt": "blurred"}
# A pipeline with the keyword arguments that it is to be called with.
Built = tuple[Any, dict[str, Any]]


def _text_to_image(scheduler: str = "PNDMScheduler", **unet: Any) -> dict[str, Any]:
    """The parts of Stable Diffusion."""
    options = {"skip_prk_steps": True, "steps_offset": 1} if scheduler == "PNDMScheduler" else {}
    return {
        "vae": tiny_vae(4),
        "text_encoder": clip_text(),
        "tokenizer": clip_tokenizer(),
        "unet": tiny_conditional_unet(**unet),
        "scheduler": ddim(scheduler, **options),
    }


def _unchecked() -> dict[str, Any]:
    return {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


def stable_diffusion() -> Built:
    """Text to image, PNDM, guided."""
    return diffusers.StableDiffusionPipeline(**_text_to_image(), **_unchecked()), {**TEXT}


def img2img() -> Built:
    """A picture, changed."""
    pipeline = diffusers.StableDiffusionImg2ImgPipeline(
        **_text_to_image("DDIMScheduler"), **_unchecked()
    )
    return pipeline, {**TEXT, "image": picture(), "strength": 0.7}


def inpaint() -> Built:
    """Nine channels: latents, mask, masked picture."""
    parts = _text_to_image("EulerDiscreteScheduler", in_channels=9)
    pipeline = diffusers.StableDiffusionInpaintPipeline(**parts, **_unchecked())
    pictures = {"image": picture(), "mask_image": picture(grey=True)}
    return pipeline, {**TEXT, **pictures, "height": 16, "width": 16}


def pix2pix() -> Built:
    """Three calls side by side, guided by text and picture."""
    parts = _text_to_image("EulerAncestralDiscreteScheduler", in_channels=8)
    pipeline = diffusers.StableDiffusionInstructPix2PixPipeline(**parts, **_unchecked())
    return pipeline, {**TEXT, "image": picture()}


def upscale() -> Built:
    """A small picture beside the latents, and how noisy it was made as a class."""
    parts = _text_to_image("DDIMScheduler", in_channels=7, num_class_embeds=1000)
    pipeline = diffusers.StableDiffusionUpscalePipeline(
        **parts, low_res_scheduler=ddim("DDPMScheduler"), max_noise_level=350
    )
    return pipeline, {**TEXT, "image": picture(size=8)}


def latent_consistency() -> Built:
    """The guidance scale as an embedded input."""
    parts = _text_to_image("LCMScheduler", time_cond_proj_dim=8)
    pipeline = diffusers.LatentConsistencyModelPipeline(**parts, **_unchecked())
    return pipeline, {"prompt": "a red fox", "original_inference_steps": 20}


def control_net() -> Built:
    """Residuals of a ControlNet, a list of tensors."""
    parts = _text_to_image("DDIMScheduler")
    pipeline = diffusers.StableDiffusionControlNetPipeline(
        **parts, controlnet=_control_net(), **_unchecked()
    )
    return pipeline, {**TEXT, "image": picture()}


def control_net_part() -> Built:
    """A ControlNet that is on for half of the steps."""
    pipeline, call = control_net()
    return pipeline, {**call, "control_guidance_end": 0.5}


def _control_net(**options: Any) -> Any:
    return seeded(
        diffusers.ControlNetModel,
        in_channels=4,
        block_out_channels=UNET_CHANNELS,
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        attention_head_dim=4,
        cross_attention_dim=TEXT_WIDTH,
        conditioning_embedding_out_channels=UNET_CHANNELS,
        **options,
    )


def t2i_adapter() -> Built:
    """Features of an adapter, added to the down blocks."""
    adapter = seeded(
        diffusers.T2IAdapter,
        in_channels=3,
        channels=list(UNET_CHANNELS),
        num_res_blocks=1,
        downscale_factor=2,
        adapter_type="full_adapter",
    )
    pipeline = diffusers.StableDiffusionAdapterPipeline(
        **_text_to_image(
            "DDIMScheduler",
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        ),
        adapter=adapter,
        **_unchecked(),
    )
    return pipeline, {**TEXT, "image": picture(), "height": 16, "width": 16}


def ip_adapter() -> Built:
    """Stable Diffusion with an IP-Adapter: the picture's embeddings through added_cond_kwargs."""
    pipeline, call = stable_diffusion()
    pipeline.register_modules(image_encoder=clip_vision(), feature_extractor=clip_processor())
    pipeline.unet._load_ip_adapter_weights([_ip_adapter_weights(pipeline.unet)])
    return pipeline, {**call, "ip_adapter_image": picture()}


def _ip_adapter_weights(unet: Any) -> dict[str, Any]:
    """Random weights of an IP-Adapter of one token per picture."""
    import torch

    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Any:
        return torch.randn(shape, generator=generator) * 0.2

    projection = {
        "proj.weight": drawn(4 * TEXT_WIDTH, TEXT_WIDTH),
        "proj.bias": drawn(4 * TEXT_WIDTH),
        "norm.weight": torch.ones(TEXT_WIDTH),
        "norm.bias": torch.zeros(TEXT_WIDTH),
    }
    layers = {}
    for number, name in enumerate(n for n in unet.attn_processors if "attn2" in n):
        width = unet.get_submodule(name.removesuffix(".processor")).to_q.out_features
        layers[f"{2 * number + 1}.to_k_ip.weight"] = drawn(width, TEXT_WIDTH)
        layers[f"{2 * number + 1}.to_v_ip.weight"] = drawn(width, TEXT_WIDTH)
    return {"image_proj": projection, "ip_adapter": layers}


def _xl(scheduler: str, ids: int) -> dict[str, Any]:
    """The parts of SDXL; ``ids`` numbers say the picture's size."""
    width = TEXT_WIDTH // 2
    unet = tiny_conditional_unet(
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=width + 8 * ids,
    )
    return {
        "vae": tiny_vae(4),
        "text_encoder": clip_text(width),
        "text_encoder_2": clip_text(width, projected=True),
        "tokenizer": clip_tokenizer(),
        "tokenizer_2": clip_tokenizer(),
        "unet": unet,
        "scheduler": ddim(scheduler),
    }


def xl() -> Built:
    """SDXL."""
    pipeline = diffusers.StableDiffusionXLPipeline(
        **_xl("EulerDiscreteScheduler", 6), add_watermarker=False
    )
    return pipeline, {**TEXT}


def xl_refiner() -> Built:
    """SDXL's refiner: the second text encoder alone, five ids."""
    parts = {**_xl("EulerDiscreteScheduler", 5), "text_encoder": None, "tokenizer": None}
    parts["text_encoder_2"] = clip_text(TEXT_WIDTH, projected=True)
    parts["unet"] = tiny_conditional_unet(
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=TEXT_WIDTH + 8 * 5,
    )
    pipeline = diffusers.StableDiffusionXLImg2ImgPipeline(
        **parts, requires_aesthetics_score=True, add_watermarker=False
    )
    return pipeline, {**TEXT, "image": picture(), "strength": 0.7}


def ddpm() -> Built:
    """Pixels, without any condition."""
    unet = tiny_unet(num_class_embeds=None)
    return diffusers.DDPMPipeline(unet=unet, scheduler=ddim("DDPMScheduler")), {}


def ddim_pixels() -> Built:
    """Pixels by DDIM."""
    unet = tiny_unet(num_class_embeds=None, **ONE_LEVEL_CLASSES)
    return diffusers.DDIMPipeline(unet=unet, scheduler=ddim()), {"eta": 0.5}


def consistency() -> Built:
    """A consistency model with classes."""
    scheduler = diffusers.CMStochasticIterativeScheduler(num_train_timesteps=40)
    unet = tiny_unet(num_class_embeds=CLASSES)
    pipeline = diffusers.ConsistencyModelPipeline(unet=unet, scheduler=scheduler)
    return pipeline, {"class_labels": 2}


def latent_superresolution() -> Built:
    """A low-resolution picture beside the latents."""
    pipeline = diffusers.LDMSuperResolutionPipeline(
        vqvae=_movq(3),
        unet=tiny_unet(in_channels=6, num_class_embeds=None),
        scheduler=ddim(),
    )
    return pipeline, {"image": picture(size=32)}


def _movq(channels: int, spatial: bool = False) -> Any:
    options: dict[str, Any] = {"norm_type": "spatial"} if spatial else {}
    attention = (
        ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        (
            "AttnUpDecoderBlock2D",
            "UpDecoderBlock2D",
        ),
    )
    plain = ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2
    down, up = attention if spatial else plain
    return seeded(
        diffusers.VQModel,
        # Spatial norms have 32 groups, whatever the configuration says.
        block_out_channels=(32, 32) if spatial else UNET_CHANNELS,
        down_block_types=down,
        up_block_types=up,
        norm_num_groups=4,
        latent_channels=channels,
        num_vq_embeddings=12,
        vq_embed_dim=channels,
        **options,
    )


def kandinsky() -> Built:
    """Kandinsky 2.2's decoder: pictures' embeddings alone, given by the prior."""
    unet = tiny_conditional_unet(
        out_channels=8,
        addition_embed_type="image",
        class_embed_type=None,
        encoder_hid_dim=TEXT_WIDTH,
        encoder_hid_dim_type="image_proj",
        resnet_time_scale_shift="scale_shift",
    )
    scheduler = ddim("DDPMScheduler", variance_type="learned_range")
    pipeline = diffusers.KandinskyV22Pipeline(unet=unet, scheduler=scheduler, movq=_movq(4, True))
    return pipeline, {
        "image_embeds": embedding(0),
        "negative_image_embeds": embedding(1),
        "height": 32,
        "width": 32,
    }


def kandinsky_3() -> Built:
    """Kandinsky 3."""
    unet = seeded(
        diffusers.Kandinsky3UNet,
        time_embedding_dim=8,
        groups=4,
        attention_head_dim=4,
        layers_per_block=2,
        # Its lists are of four levels.
        block_out_channels=(8, 16, 16, 16),
        cross_attention_dim=8,
        encoder_hid_dim=TEXT_WIDTH,
    )
    pipeline = diffusers.Kandinsky3Pipeline(
        tokenizer=t5_tokenizer(128),
        text_encoder=t5_text(),
        unet=unet,
        scheduler=ddim("DDPMScheduler"),
        movq=_movq(4, True),
    )
    return pipeline, {**TEXT, "height": 64, "width": 64}
