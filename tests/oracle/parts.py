"""Parts that tiny pipelines are put together from: tokenizers, text encoders, VAEs, schedulers."""

from __future__ import annotations

import functools
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from PIL import Image

from tests.tiny_models import (
    PROMPT_LETTERS,
    TEXT_WIDTH,
    TOKENS,
    randomize,
    tiny_conditional_unet,
    tiny_flow_scheduler,
    tiny_scheduler,
    tiny_unet,
    tiny_vae,
)

PIXELS = 16
__all__ = ["tiny_conditional_unet", "tiny_unet", "tiny_vae"]


def seeded(make: Any, *args: Any, **config: Any) -> Any:
    """Return ``make(*args, **config)`` with random weights that are the same each time."""
    torch.manual_seed(0)
    return randomize(make(*args, **config))


def clip_tokenizer(tokens: int = TOKENS) -> Any:
    """A CLIP tokenizer whose vocabulary is the letters."""
    letters = [*PROMPT_LETTERS, *(f"{letter}</w>" for letter in PROMPT_LETTERS)]
    words = [*letters, "<|startoftext|>", "<|endoftext|>"]
    return transformers.CLIPTokenizer(
        vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=tokens
    )


def clip_text(width: int = TEXT_WIDTH, projected: bool = False, tokens: int = TOKENS) -> Any:
    """A CLIP text model of two layers."""
    end = len(clip_tokenizer()) - 1
    config = transformers.CLIPTextConfig(
        vocab_size=end + 1,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokens,
        projection_dim=width,
        bos_token_id=end - 1,
        eos_token_id=end,
        pad_token_id=end,
    )
    name = "CLIPTextModelWithProjection" if projected else "CLIPTextModel"
    return seeded(getattr(transformers, name), config)


def clip_vision(width: int = TEXT_WIDTH, size: int = 28) -> Any:
    """A CLIP vision model with projection for pictures of ``size`` x ``size`` pixels."""
    config = transformers.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=size,
        patch_size=size // 2,
        projection_dim=width,
    )
    return seeded(transformers.CLIPVisionModelWithProjection, config)


def clip_processor() -> Any:
    """The pictures' processor that goes with ``clip_vision``."""
    return transformers.CLIPImageProcessor(
        crop_size={"height": 28, "width": 28}, size={"shortest_edge": 28}
    )


def t5_tokenizer(tokens: int = TOKENS) -> Any:
    """A T5 tokenizer whose vocabulary is the letters."""
    special = ["<pad>", "</s>", "<unk>"]
    words = [*special, *(f"\u2581{letter}" for letter in PROMPT_LETTERS), *PROMPT_LETTERS, "\u2581"]
    vocabulary = [(word, 0.0 if word in special else -2.0) for word in words]
    return transformers.T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=tokens)


def t5_text(width: int = TEXT_WIDTH, name: str = "T5") -> Any:
    """A T5 encoder (``name`` UMT5: that of AuraFlow and Wan) of one layer."""
    config = getattr(transformers, f"{name}Config")(
        vocab_size=len(t5_tokenizer()),
        d_model=width,
        d_kv=4,
        d_ff=2 * width,
        num_layers=1,
        num_heads=2,
    )
    return seeded(getattr(transformers, f"{name}EncoderModel"), config)


def word_tokenizer(tokens: int = 32, **options: Any) -> Any:
    """A tokenizer of letters that any language model can be fed with."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<bos>", "<eos>", "<unk>", *PROMPT_LETTERS, " "]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=tokens,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        **options,
    )


def language_model(kind: str, width: int = TEXT_WIDTH, **options: Any) -> Any:
    """A language model of two layers without its head, such as Gemma2 or Llama."""
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=64,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=width // 2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **options,
    )
    return seeded(getattr(transformers, f"{kind}Model"), config)


def flow(**options: Any) -> Any:
    """The scheduler of flow matching."""
    config = tiny_flow_scheduler(**options)
    return diffusers.FlowMatchEulerDiscreteScheduler.from_config(config)


def ddim(name: str = "DDIMScheduler", **options: Any) -> Any:
    """A scheduler of those that know DDIM's configuration."""
    return getattr(diffusers, name).from_config(tiny_scheduler(clip_sample=False, **options))


def embedding(seed: int, *shape: int) -> Any:
    """A random embedding of a picture [1, *shape], by default [1, width]."""
    return torch.randn(1, *(shape or (TEXT_WIDTH,)), generator=torch.Generator().manual_seed(seed))


@functools.cache
def picture(seed: int = 0, grey: bool = False, size: int = PIXELS) -> Any:
    """A random picture, or a mask whose left half is black."""
    if grey:
        mask = np.zeros((size, size), np.uint8)
        mask[:, size // 2 :] = 255
        return Image.fromarray(mask)
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (size, size, 3), np.uint8))
