"""Tiny pipelines that make videos and sounds."""

from __future__ import annotations

from typing import Any

import diffusers

from tests.oracle.image_transformers import HEADS, PROMPT, SHORT, SIZE
from tests.oracle.parts import (
    clip_processor,
    clip_text,
    clip_tokenizer,
    clip_vision,
    ddim,
    flow,
    language_model,
    picture,
    seeded,
    t5_text,
    t5_tokenizer,
    tiny_conditional_unet,
    tiny_vae,
    word_tokenizer,
)
from tests.oracle.unets import TEXT, Built
from tests.tiny_models import POOLED_WIDTH, TEXT_WIDTH, UNET_CHANNELS


def ltx() -> Built:
    """LTX Video: tokens of a video, positions from sizes."""
    transformer = seeded(
        diffusers.LTXVideoTransformer3DModel,
        **HEADS,
        in_channels=4,
        out_channels=4,
        cross_attention_dim=16,
        num_layers=1,
        caption_channels=TEXT_WIDTH,
    )
    vae = seeded(
        diffusers.AutoencoderKLLTXVideo,
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        patch_size=1,
        encoder_causal=True,
        decoder_causal=False,
    )
    pipeline = diffusers.LTXPipeline(
        scheduler=flow(),
        vae=vae,
        text_encoder=t5_text(),
        tokenizer=t5_tokenizer(),
        transformer=transformer,
    )
    return pipeline, {**TEXT, "height": 32, "width": 32, "num_frames": 9, **SHORT}


def _wan_transformer(**options: Any) -> Any:
    return seeded(
        diffusers.WanTransformer3DModel,
        **{
            **HEADS,
            "attention_head_dim": 12,
            "in_channels": 4,
            "out_channels": 4,
            "text_dim": TEXT_WIDTH,
            "freq_dim": 8,
            "ffn_dim": 16,
            "num_layers": 1,
            "rope_max_seq_len": 32,
            **options,
        },
    )


def _wan_vae() -> Any:
    return seeded(
        diffusers.AutoencoderKLWan,
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )


def _wan(**options: Any) -> Any:
    return diffusers.WanPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=t5_text(name="UMT5"),
        vae=_wan_vae(),
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        **{"transformer": _wan_transformer(), **options},
    )


WAN = {**TEXT, "height": 32, "width": 32, "num_frames": 5, **SHORT}


def wan() -> Built:
    """Wan 2.1."""
    return _wan(), {**WAN}


def wan_two() -> Built:
    """Wan 2.2: a transformer for noisy steps and another for the rest."""
    pipeline = _wan(transformer_2=_wan_transformer(ffn_dim=24), boundary_ratio=0.8)
    return pipeline, {**WAN}


def wan_per_token() -> Built:
    """Wan 2.2's small model: a timestep for each token."""
    return _wan(expand_timesteps=True), {**WAN}


def video_diffusion() -> Built:
    """Stable Video Diffusion: a picture, frames as the second axis, three time ids."""
    unet = seeded(
        diffusers.UNetSpatioTemporalConditionModel,
        sample_size=8,
        in_channels=8,
        out_channels=4,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        # Its norms have 32 groups, whatever the configuration says.
        block_out_channels=(32, 64),
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24,
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        num_attention_heads=(2, 2),
        num_frames=2,
    )
    vae = seeded(
        diffusers.AutoencoderKLTemporalDecoder,
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        latent_channels=4,
    )
    pipeline = diffusers.StableVideoDiffusionPipeline(
        vae=vae,
        image_encoder=clip_vision(size=224),
        unet=unet,
        scheduler=diffusers.EulerDiscreteScheduler(
            prediction_type="v_prediction",
            timestep_type="continuous",
            timestep_spacing="leading",
            sigma_min=0.002,
            sigma_max=700.0,
            use_karras_sigmas=True,
        ),
        feature_extractor=clip_processor(),
    )
    return pipeline, {"image": picture(), **SIZE, "num_frames": 2}


def animate_diff() -> Built:
    """AnimateDiff: frames in the batch axis of a UNet with motion modules."""
    unet = tiny_conditional_unet(block_out_channels=UNET_CHANNELS)
    adapter = seeded(
        diffusers.MotionAdapter,
        block_out_channels=UNET_CHANNELS,
        motion_layers_per_block=1,
        motion_num_attention_heads=2,
        motion_norm_num_groups=4,
    )
    pipeline = diffusers.AnimateDiffPipeline(
        vae=tiny_vae(4),
        text_encoder=clip_text(),
        tokenizer=clip_tokenizer(),
        unet=unet,
        motion_adapter=adapter,
        scheduler=ddim(),
    )
    return pipeline, {**TEXT, "num_frames": 2}


def cog_video_x(in_channels: int = 4) -> Built:
    """CogVideoX: frames before channels, rotary embeddings as a pair of tensors."""
    transformer = seeded(
        diffusers.CogVideoXTransformer3DModel,
        **{**HEADS, "attention_head_dim": 16},
        in_channels=in_channels,
        out_channels=4,
        time_embed_dim=4,
        text_embed_dim=TEXT_WIDTH,
        num_layers=1,
        sample_width=8,
        sample_height=8,
        sample_frames=9,
        max_text_seq_length=8,
        use_rotary_positional_embeddings=True,
    )
    vae = seeded(
        diffusers.AutoencoderKLCogVideoX,
        down_block_types=("CogVideoXDownBlock3D",) * 2,
        up_block_types=("CogVideoXUpBlock3D",) * 2,
        block_out_channels=(8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    )
    pipeline = diffusers.CogVideoXPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=t5_text(),
        vae=vae,
        transformer=transformer,
        scheduler=ddim("CogVideoXDDIMScheduler"),
    )
    return pipeline, {**TEXT, **SIZE, "num_frames": 5, **SHORT}


def hunyuan_video() -> Built:
    """Hunyuan Video: two texts, a mask, embedded guidance."""
    transformer = seeded(
        diffusers.HunyuanVideoTransformer3DModel,
        **HEADS,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        guidance_embeds=True,
        text_embed_dim=TEXT_WIDTH,
        pooled_projection_dim=POOLED_WIDTH,
        rope_axes_dim=(2, 2, 4),
    )
    vae = seeded(
        diffusers.AutoencoderKLHunyuanVideo,
        latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        mid_block_add_attention=False,
    )
    pipeline = diffusers.HunyuanVideoPipeline(
        text_encoder=language_model("Llama"),
        tokenizer=word_tokenizer(512),
        transformer=transformer,
        vae=vae,
        scheduler=flow(),
        text_encoder_2=clip_text(POOLED_WIDTH, tokens=77),
        tokenizer_2=clip_tokenizer(77),
    )
    template = {"template": "{}", "crop_start": 0}
    return pipeline, {**PROMPT, **SIZE, "num_frames": 5, **SHORT, "prompt_template": template}


def latte() -> Built:
    """Latte: a video from text, attention over time and space in turn."""
    transformer = seeded(
        diffusers.LatteTransformer3DModel,
        **HEADS,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        cross_attention_dim=16,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        caption_channels=TEXT_WIDTH,
        video_length=2,
        attention_bias=True,
        activation_fn="gelu-approximate",
    )
    pipeline = diffusers.LattePipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=t5_text(),
        vae=tiny_vae(4),
        transformer=transformer,
        scheduler=ddim(),
    )
    return pipeline, {**TEXT, **SIZE, "video_length": 2, "clean_caption": False}


def stable_audio() -> Built:
    """Stable Audio: a sound from text and its length."""
    from diffusers.pipelines.stable_audio.modeling_stable_audio import StableAudioProjectionModel

    transformer = seeded(
        diffusers.StableAudioDiTModel,
        sample_size=8,
        in_channels=3,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        num_key_value_attention_heads=2,
        out_channels=3,
        cross_attention_dim=TEXT_WIDTH,
        time_proj_dim=8,
        global_states_input_dim=2 * TEXT_WIDTH,
        cross_attention_input_dim=TEXT_WIDTH,
    )
    vae = seeded(
        diffusers.AutoencoderOobleck,
        encoder_hidden_size=6,
        downsampling_ratios=[1, 2],
        decoder_channels=3,
        decoder_input_channels=3,
        audio_channels=2,
        channel_multiples=[2, 4],
        sampling_rate=4,
    )
    projection = seeded(
        StableAudioProjectionModel,
        text_encoder_dim=TEXT_WIDTH,
        conditioning_dim=TEXT_WIDTH,
        min_value=0,
        max_value=32,
    )
    pipeline = diffusers.StableAudioPipeline(
        vae=vae,
        text_encoder=t5_text(),
        projection_model=projection,
        tokenizer=t5_tokenizer(),
        transformer=transformer,
        scheduler=diffusers.EDMDPMSolverMultistepScheduler(
            solver_order=2, prediction_type="v_prediction", sigma_data=1.0
        ),
    )
    return pipeline, {**TEXT, "audio_end_in_s": 3.0}
