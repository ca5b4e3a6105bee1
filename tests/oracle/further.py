"""Further tiny pipelines: ControlNets of others, priors, pictures into videos, tokens, sounds."""

from __future__ import annotations

from typing import Any

import diffusers
import transformers

from tests.oracle.image_transformers import HEADS, PROMPT, SHORT, SIZE, _flux, _sd3_parts
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
    tiny_vae,
    word_tokenizer,
)
from tests.oracle.sequences import WAN, _wan_transformer, _wan_vae, cog_video_x, ltx
from tests.oracle.unets import TEXT, Built, _control_net, _text_to_image, _unchecked, _xl
from tests.tiny_models import POOLED_WIDTH, TEXT_WIDTH, UNET_CHANNELS


def xl_control_net() -> Built:
    """SDXL with a ControlNet."""
    unet = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": TEXT_WIDTH // 2 + 48,
    }
    pipeline = diffusers.StableDiffusionXLControlNetPipeline(
        **_xl("EulerDiscreteScheduler", 6), controlnet=_control_net(**unet), add_watermarker=False
    )
    return pipeline, {**TEXT, "image": picture()}


def flux_control_net() -> Built:
    """Flux with a ControlNet: two lists of residuals."""
    control = seeded(
        diffusers.FluxControlNetModel,
        **HEADS,
        in_channels=16,
        patch_size=1,
        num_layers=1,
        num_single_layers=1,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=POOLED_WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(2, 2, 4),
    )
    pipeline = _flux("FluxControlNetPipeline", controlnet=control)
    return pipeline, {**PROMPT, **SIZE, **SHORT, "control_image": picture()}


def sd3_control_net() -> Built:
    """Stable Diffusion 3 with a ControlNet."""
    control = seeded(
        diffusers.SD3ControlNetModel,
        **HEADS,
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=1,
        joint_attention_dim=TEXT_WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=POOLED_WIDTH,
        out_channels=4,
        pos_embed_max_size=8,
    )
    pipeline = diffusers.StableDiffusion3ControlNetPipeline(**_sd3_parts(), controlnet=control)
    return pipeline, {**TEXT, **SIZE, **SHORT, "control_image": picture()}


def perturbed_attention() -> Built:
    """Guidance by perturbed attention: the pipeline changes how its UNet computes."""
    pipeline = diffusers.StableDiffusionPAGPipeline(
        **_text_to_image("DDIMScheduler"), **_unchecked(), pag_applied_layers="mid"
    )
    return pipeline, {**TEXT, "pag_scale": 3.0}


def deep_floyd() -> Built:
    """DeepFloyd IF: pixels, with a variance beside the noise."""
    unet = tiny_conditional_unet(
        in_channels=3,
        out_channels=6,
        addition_embed_type="text",
        addition_embed_type_num_heads=2,
        encoder_hid_dim=TEXT_WIDTH,
    )
    pipeline = diffusers.IFPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=t5_text(),
        unet=unet,
        scheduler=ddim("DDPMScheduler", variance_type="learned_range"),
        watermarker=None,
        **_unchecked(),
    )
    return pipeline, {**TEXT, "clean_caption": False}


def kandinsky_prior() -> Built:
    """Kandinsky 2.2's prior, which gives a picture's embedding."""
    prior = seeded(
        diffusers.PriorTransformer,
        **HEADS,
        num_layers=1,
        embedding_dim=TEXT_WIDTH,
        num_embeddings=8,
    )
    pipeline = diffusers.KandinskyV22PriorPipeline(
        prior=prior,
        image_encoder=clip_vision(),
        text_encoder=clip_text(projected=True),
        tokenizer=clip_tokenizer(),
        scheduler=diffusers.UnCLIPScheduler(prediction_type="sample", num_train_timesteps=1000),
        image_processor=clip_processor(),
    )
    return pipeline, {**TEXT}


def _embedded(call: dict[str, Any]) -> dict[str, Any]:
    """Return a call with embeddings for its texts, which some pipelines clean by ftfy otherwise."""
    texts = {f"{name}_embeds": embedding(i, 8, TEXT_WIDTH) for i, name in enumerate(TEXT)}
    return {**{name: value for name, value in call.items() if name not in TEXT}, **texts}


def wan_image() -> Built:
    """Wan on a picture, beside the latents' channels."""
    pipeline = diffusers.WanImageToVideoPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=t5_text(name="UMT5"),
        vae=_wan_vae(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=_wan_transformer(in_channels=12),
    )
    return pipeline, {**_embedded(WAN), "image": picture(size=32)}


def wan_image_per_token() -> Built:
    """Wan 2.2's small model on a picture: its tokens have the timestep 0."""
    pipeline = diffusers.WanImageToVideoPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=t5_text(name="UMT5"),
        vae=_wan_vae(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=_wan_transformer(),
        expand_timesteps=True,
    )
    return pipeline, {**_embedded(WAN), "image": picture(size=32)}


def ltx_image() -> Built:
    """LTX Video on a picture: a timestep for each token."""
    pipeline, call = ltx()
    pipeline = diffusers.LTXImageToVideoPipeline(**pipeline.components)
    return pipeline, {**call, "image": picture(size=32)}


def cog_video_image() -> Built:
    """CogVideoX on a picture."""
    pipeline, call = cog_video_x(in_channels=8)
    pipeline = diffusers.CogVideoXImageToVideoPipeline(**pipeline.components)
    return pipeline, {**call, "image": picture()}


def text_to_video() -> Built:
    """ModelScope's text to video: a UNet of three axes."""
    unet = seeded(
        diffusers.UNet3DConditionModel,
        sample_size=8,
        # Its temporal layers have 32 groups, whatever the configuration says.
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=8,
    )
    pipeline = diffusers.TextToVideoSDPipeline(
        vae=tiny_vae(4),
        text_encoder=clip_text(),
        tokenizer=clip_tokenizer(),
        unet=unet,
        scheduler=ddim(),
    )
    return pipeline, {**TEXT, **SIZE, "num_frames": 2}


def amused() -> Built:
    """aMUSEd: tokens of a picture as whole numbers, and no timestep."""
    transformer = seeded(
        diffusers.UVit2DModel,
        hidden_size=16,
        use_bias=False,
        hidden_dropout=0.0,
        cond_embed_dim=TEXT_WIDTH,
        micro_cond_encode_dim=2,
        micro_cond_embed_dim=10,
        encoder_hidden_size=TEXT_WIDTH,
        vocab_size=32,
        codebook_size=8,
        in_channels=8,
        block_out_channels=8,
        num_res_blocks=1,
        downsample=True,
        upsample=True,
        block_num_heads=1,
        num_hidden_layers=1,
        num_attention_heads=1,
        attention_dropout=0.0,
        intermediate_size=32,
        layer_norm_eps=1e-06,
        ln_elementwise_affine=True,
    )
    vqvae = seeded(
        diffusers.VQModel,
        block_out_channels=UNET_CHANNELS,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=8,
        num_vq_embeddings=8,
        lookup_from_codebook=True,
    )
    pipeline = diffusers.AmusedPipeline(
        vqvae=vqvae,
        tokenizer=clip_tokenizer(),
        text_encoder=clip_text(projected=True),
        transformer=transformer,
        scheduler=diffusers.AmusedScheduler(mask_token_id=31),
    )
    return pipeline, {**TEXT, **SIZE}


def latent_upscale() -> Built:
    """The upscaler of latents: a picture beside them, timesteps from noise levels."""
    unet = tiny_conditional_unet(
        in_channels=8,
        # The last is dropped.
        out_channels=5,
        # The noise level in 128 numbers, and the pooled text.
        time_cond_proj_dim=128 + TEXT_WIDTH,
    )
    pipeline = diffusers.StableDiffusionLatentUpscalePipeline(
        vae=tiny_vae(4),
        text_encoder=clip_text(),
        tokenizer=clip_tokenizer(),
        unet=unet,
        scheduler=ddim("EulerDiscreteScheduler"),
    )
    return pipeline, {**TEXT, "image": picture(size=64)}


def cog_view_3() -> Built:
    """CogView 3 Plus."""
    transformer = seeded(
        diffusers.CogView3PlusTransformer2DModel,
        **HEADS,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        text_embed_dim=TEXT_WIDTH,
        time_embed_dim=8,
        condition_dim=2,
        pos_embed_max_size=8,
        sample_size=8,
    )
    pipeline = diffusers.CogView3PlusPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=t5_text(),
        vae=tiny_vae(4),
        transformer=transformer,
        scheduler=ddim("CogVideoXDDIMScheduler"),
    )
    return pipeline, {**TEXT, **SIZE, **SHORT}


def marigold() -> Built:
    """Marigold: depth of a picture, with an empty prompt."""
    pipeline = diffusers.MarigoldDepthPipeline(
        **_text_to_image("DDIMScheduler", in_channels=8), prediction_type="depth"
    )
    return pipeline, {"image": picture(), "processing_resolution": 0}


def audio_ldm() -> Built:
    """AudioLDM: text as an embedded class, and no encoder_hidden_states."""
    clap = transformers.ClapTextConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=40,
        projection_dim=TEXT_WIDTH,
    )
    unet = tiny_conditional_unet(
        class_embed_type="simple_projection",
        projection_class_embeddings_input_dim=TEXT_WIDTH,
        class_embeddings_concat=True,
        # Nothing to attend to but itself.
        cross_attention_dim=UNET_CHANNELS,
    )
    vocoder = transformers.SpeechT5HifiGanConfig(
        model_in_dim=8,
        sampling_rate=16000,
        upsample_initial_channel=16,
        upsample_rates=[2, 2],
        upsample_kernel_sizes=[4, 4],
        resblock_kernel_sizes=[3, 7],
        resblock_dilation_sizes=[[1, 3, 5], [1, 3, 5]],
        normalize_before=False,
    )
    pipeline = diffusers.AudioLDMPipeline(
        vae=tiny_vae(4, in_channels=1, out_channels=1),
        text_encoder=seeded(transformers.ClapTextModelWithProjection, clap),
        tokenizer=word_tokenizer(32),
        unet=unet,
        scheduler=ddim(),
        vocoder=seeded(transformers.SpeechT5HifiGan, vocoder),
    )
    return pipeline, {**TEXT, "audio_length_in_s": 0.032}
