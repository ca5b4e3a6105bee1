"""Tiny pipelines around a transformer that makes images."""

from __future__ import annotations

from typing import Any

import diffusers
import transformers

from tests.oracle.parts import (
    clip_text,
    clip_tokenizer,
    ddim,
    flow,
    language_model,
    picture,
    seeded,
    t5_text,
    t5_tokenizer,
    tiny_vae,
    word_tokenizer,
)
from tests.oracle.unets import TEXT, Built, _unchecked
from tests.tiny_models import CLASSES, POOLED_WIDTH, TEXT_WIDTH, TOKENS, tiny_transformer

SIZE = {"height": 16, "width": 16}
LARGER = {"height": 32, "width": 32}
PROMPT = {"prompt": "a red fox"}
HEADS: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 8}
SHORT = {"max_sequence_length": TOKENS}


def dit() -> Built:
    """Classes, guided by the empty one. The pipeline has 1,000 classes, the last of them empty."""
    pipeline = diffusers.DiTPipeline(
        transformer=tiny_transformer("DiTTransformer2DModel", num_embeds_ada_norm=1000),
        vae=tiny_vae(4),
        scheduler=ddim(),
    )
    return pipeline, {"class_labels": [CLASSES]}


def _pixart(name: str, **options: Any) -> Built:
    pipeline = getattr(diffusers, name)(
        tokenizer=t5_tokenizer(),
        text_encoder=t5_text(),
        vae=tiny_vae(4),
        transformer=tiny_transformer("PixArtTransformer2DModel", **options),
        scheduler=ddim(),
    )
    call = {**TEXT, **SIZE, **SHORT, "use_resolution_binning": False}
    return pipeline, call


def pixart_alpha() -> Built:
    """PixArt Alpha with the picture's size as a condition."""
    return _pixart(
        "PixArtAlphaPipeline", sample_size=128, attention_head_dim=12, cross_attention_dim=24
    )


def pixart_sigma() -> Built:
    """PixArt Sigma."""
    return _pixart("PixArtSigmaPipeline")


def _sd3_parts(**options: Any) -> dict[str, Any]:
    widths = {"": 4, "_2": 6}
    encoders = {f"text_encoder{n}": clip_text(width, projected=True) for n, width in widths.items()}
    return {
        **encoders,
        "tokenizer": clip_tokenizer(),
        "tokenizer_2": clip_tokenizer(),
        "text_encoder_3": t5_text(),
        "tokenizer_3": t5_tokenizer(),
        "transformer": tiny_transformer("SD3Transformer2DModel", **options),
        "vae": tiny_vae(4, shift_factor=0.1),
        "scheduler": flow(),
    }


def sd3() -> Built:
    """Stable Diffusion 3."""
    return diffusers.StableDiffusion3Pipeline(**_sd3_parts()), {**TEXT, **SIZE, **SHORT}


def sd3_skipping() -> Built:
    """Stable Diffusion 3.5 with guidance by skipped layers: a third kind of call on some steps."""
    call = {"skip_guidance_layers": [0], "skip_layer_guidance_stop": 0.6}
    return diffusers.StableDiffusion3Pipeline(**_sd3_parts()), {**TEXT, **SIZE, **SHORT, **call}


def _flux(name: str, channels: int = 16, guided: bool = True, **parts: Any) -> Any:
    transformer = tiny_transformer(
        "FluxTransformer2DModel", in_channels=channels, out_channels=16, guidance_embeds=guided
    )
    return getattr(diffusers, name)(
        scheduler=flow(use_dynamic_shifting=True),
        vae=tiny_vae(4, shift_factor=0.1),
        text_encoder=clip_text(POOLED_WIDTH),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5_text(),
        tokenizer_2=t5_tokenizer(),
        transformer=transformer,
        **parts,
    )


def flux() -> Built:
    """Flux dev: packed latents, embedded guidance, ids of tokens without a batch axis."""
    return _flux("FluxPipeline"), {**PROMPT, **SIZE, **SHORT}


def flux_schnell_guided() -> Built:
    """Flux schnell with a negative prompt: two calls per step."""
    call = {**TEXT, **SIZE, **SHORT, "true_cfg_scale": 2.0}
    return _flux("FluxPipeline", guided=False), call


def flux_img2img() -> Built:
    """Flux on a picture."""
    call = {**PROMPT, **SIZE, **SHORT, "image": picture(), "strength": 0.7}
    return _flux("FluxImg2ImgPipeline"), call


def flux_fill() -> Built:
    """Flux Fill: masked picture and mask beside the latents' channels."""
    pictures = {"image": picture(), "mask_image": picture(grey=True)}
    return _flux("FluxFillPipeline", 16 + 16 + 16), {**PROMPT, **SIZE, **SHORT, **pictures}


def flux_control() -> Built:
    """Flux Control: a picture beside the latents' channels."""
    return _flux("FluxControlPipeline", 32), {
        **PROMPT,
        **SIZE,
        **SHORT,
        "control_image": picture(),
    }


def flux_kontext() -> Built:
    """Flux Kontext: a picture beside the latents' tokens, so that the output is cut."""
    call = {**PROMPT, **SIZE, **SHORT, "image": picture(), "_auto_resize": False, "max_area": 256}
    return _flux("FluxKontextPipeline"), call


def aura_flow() -> Built:
    """AuraFlow."""
    transformer = seeded(
        diffusers.AuraFlowTransformer2DModel,
        **HEADS,
        sample_size=8,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        joint_attention_dim=TEXT_WIDTH,
        caption_projection_dim=16,
        pos_embed_max_size=16,
    )
    pipeline = diffusers.AuraFlowPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=t5_text(name="UMT5"),
        vae=tiny_vae(4),
        transformer=transformer,
        scheduler=flow(),
    )
    return pipeline, {**TEXT, **SIZE, **SHORT}


def _deep_vae(channels: int) -> Any:
    return seeded(
        diffusers.AutoencoderDC,
        latent_channels=channels,
        attention_head_dim=2,
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_block_out_channels=(8, 16),
        decoder_block_out_channels=(8, 16),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
    )


def _sana_transformer(**options: Any) -> Any:
    return seeded(
        diffusers.SanaTransformer2DModel,
        **HEADS,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=TEXT_WIDTH,
        sample_size=8,
        **options,
    )


def sana() -> Built:
    """Sana, linear attention."""
    pipeline = diffusers.SanaPipeline(
        tokenizer=word_tokenizer(),
        text_encoder=language_model("Gemma2"),
        vae=_deep_vae(4),
        transformer=_sana_transformer(),
        scheduler=flow(),
    )
    options = {"use_resolution_binning": False, "complex_human_instruction": []}
    return pipeline, {**TEXT, **LARGER, **SHORT, **options}


def sana_sprint() -> Built:
    """Sana Sprint: embedded guidance, the schedule of SCM."""
    pipeline = diffusers.SanaSprintPipeline(
        tokenizer=word_tokenizer(),
        text_encoder=language_model("Gemma2"),
        vae=_deep_vae(4),
        transformer=_sana_transformer(guidance_embeds=True, qk_norm="rms_norm_across_heads"),
        scheduler=diffusers.SCMScheduler(),
    )
    options = {"use_resolution_binning": False, "complex_human_instruction": []}
    return pipeline, {**PROMPT, **LARGER, **SHORT, **options, "num_inference_steps": 2}


def lumina_2() -> Built:
    """Lumina 2: two calls per step, guided on part of the steps."""
    transformer = seeded(
        diffusers.Lumina2Transformer2DModel,
        sample_size=8,
        in_channels=4,
        hidden_size=24,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=8,
        axes_dim_rope=(4, 4, 4),
        axes_lens=(64, 16, 16),
        cap_feat_dim=TEXT_WIDTH,
    )
    pipeline = diffusers.Lumina2Pipeline(
        transformer=transformer,
        scheduler=flow(),
        vae=tiny_vae(4, shift_factor=0.1),
        text_encoder=language_model("Gemma2"),
        tokenizer=word_tokenizer(),
    )
    return pipeline, {**TEXT, **SIZE, **SHORT, "system_prompt": "a"}


def cog_view_4() -> Built:
    """CogView 4: sizes of the picture as tensors, two calls per step."""
    transformer = seeded(
        diffusers.CogView4Transformer2DModel,
        **HEADS,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        text_embed_dim=TEXT_WIDTH,
        time_embed_dim=8,
        condition_dim=4,
        sample_size=8,
        pos_embed_max_size=8,
        rope_axes_dim=(4, 4),
    )
    pipeline = diffusers.CogView4Pipeline(
        tokenizer=word_tokenizer(),
        text_encoder=language_model("Glm"),
        vae=tiny_vae(4),
        transformer=transformer,
        scheduler=flow(base_shift=0.25, max_shift=0.75, use_dynamic_shifting=True),
    )
    return pipeline, {**TEXT, **SIZE, "max_sequence_length": 16}


def hunyuan_dit() -> Built:
    """HunyuanDiT: two texts, rotary embeddings as a pair of tensors."""
    transformer = seeded(
        diffusers.HunyuanDiT2DModel,
        **HEADS,
        in_channels=4,
        patch_size=2,
        sample_size=8,
        hidden_size=16,
        num_layers=2,
        mlp_ratio=2.0,
        cross_attention_dim=TEXT_WIDTH,
        # A multiple of the eight heads of its pooling.
        cross_attention_dim_t5=16,
        pooled_projection_dim=16,
        text_len=77,
        text_len_t5=256,
        activation_fn="gelu-approximate",
    )
    bert = transformers.BertConfig(
        vocab_size=64,
        hidden_size=TEXT_WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=80,
    )
    pipeline = diffusers.HunyuanDiTPipeline(
        vae=tiny_vae(4),
        text_encoder=seeded(transformers.BertModel, bert),
        tokenizer=word_tokenizer(77),
        transformer=transformer,
        scheduler=ddim("DDPMScheduler"),
        text_encoder_2=t5_text(16),
        tokenizer_2=t5_tokenizer(256),
        **_unchecked(),
    )
    return pipeline, {**TEXT, **SIZE, "use_resolution_binning": False}


def chroma() -> Built:
    """Chroma: Flux without pooled text, with a mask of text and image."""
    transformer = seeded(
        diffusers.ChromaTransformer2DModel,
        **HEADS,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        joint_attention_dim=TEXT_WIDTH,
        axes_dims_rope=(2, 2, 4),
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )
    pipeline = diffusers.ChromaPipeline(
        scheduler=flow(),
        vae=tiny_vae(4, shift_factor=0.1),
        text_encoder=t5_text(),
        tokenizer=t5_tokenizer(),
        transformer=transformer,
    )
    return pipeline, {**TEXT, **SIZE, **SHORT}


def qwen_image() -> Built:
    """Qwen-Image: sizes of the pictures as lists of numbers, text as long as the prompt."""
    transformer = seeded(
        diffusers.QwenImageTransformer2DModel,
        **HEADS,
        in_channels=16,
        out_channels=4,
        num_layers=1,
        joint_attention_dim=TEXT_WIDTH,
        axes_dims_rope=(2, 2, 4),
    )
    vae = seeded(
        diffusers.AutoencoderKLQwenImage,
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    pipeline = diffusers.QwenImagePipeline(
        scheduler=flow(),
        vae=vae,
        text_encoder=_qwen_vision_language(),
        tokenizer=word_tokenizer(512),
        transformer=transformer,
    )
    call = {"prompt": "a red fox", "negative_prompt": "a dim fox", "true_cfg_scale": 2.0}
    return pipeline, {**call, **SIZE, "max_sequence_length": 512}


def _qwen_vision_language() -> Any:
    text = {
        "vocab_size": 64,
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "rope_parameters": {
            "mrope_section": [1, 1, 1],
            "rope_type": "default",
            "rope_theta": 1000000.0,
        },
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": TEXT_WIDTH,
    }
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    return seeded(transformers.Qwen2_5_VLForConditionalGeneration, config)


def z_image() -> Built:
    """Z-Image: lists of pictures and texts, and a list of outputs."""
    transformer = seeded(
        diffusers.ZImageTransformer2DModel,
        in_channels=4,
        dim=16,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=TEXT_WIDTH,
        axes_dims=[4, 2, 2],
        axes_lens=[256, 32, 32],
    )
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    pipeline = diffusers.ZImagePipeline(
        scheduler=flow(),
        vae=tiny_vae(4, shift_factor=0.1),
        text_encoder=language_model("Qwen3"),
        tokenizer=word_tokenizer(chat_template=template),
        transformer=transformer,
    )
    call = {"prompt": "a red fox", "negative_prompt": "a dim fox"}
    return pipeline, {**call, **SIZE, "max_sequence_length": 16}
