"""Prompts as token ids, as transformers' tokenizers give them, by the library ``tokenizers``."""

from __future__ import annotations

from typing import Any

from mpq_deploy.device.generate.generation_folder import TokenizerUse
from mpq_deploy.device.generate.noise_schedule import Array
from mpq_deploy.errors import InputError, MissingDependencyError


def token_ids(
    use: TokenizerUse, texts: list[str], vectors: bool = False
) -> tuple[Array, list[str]]:
    """Return ids [N, length] int64 of ``texts``, and for each what was cut off (empty: nothing).

    ``vectors``: whether a word of textual inversion stands for all of its vectors, as in most of
    diffusers' pipelines.
    """
    import numpy as np

    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise MissingDependencyError("tokenizers", "generate", "A prompt") from error
    try:
        tokenizer = Tokenizer.from_file(str(use.file))
    except Exception as error:
        # The library raises Exception itself.
        raise InputError(f"{use.file} is no tokenizer: {error}.", "Write it again.") from error
    if tokenizer.get_vocab_size() != use.vocabulary:
        raise InputError(
            f"{use.file} has {tokenizer.get_vocab_size():,} words, not the {use.vocabulary:,} of "
            "its text encoder's.",
            "Take the tokenizer that belongs to the text encoder.",
        )
    tokenizer.no_padding()
    tokenizer.no_truncation()
    if vectors:
        texts = [_with_all_vectors(tokenizer, text) for text in texts]
    whole = [tokenizer.encode(text) for text in texts]
    tokenizer.enable_truncation(use.length)
    ids = np.full((len(texts), use.length), use.pad, np.int64)
    cut = []
    for row, (text, before) in enumerate(zip(texts, whole)):
        kept = tokenizer.encode(text).ids
        ids[row, : len(kept)] = kept
        # The user's own words from the first token on that is not kept.
        longer = len(before.ids) > use.length
        cut.append(text[before.offsets[use.length - 1][0] :] if longer else "")
    return ids, cut


def _with_all_vectors(tokenizer: Any, text: str) -> str:
    """Return ``text`` with ``WORD WORD_1 WORD_2`` for an added word of several vectors.

    Source: diffusers 0.42, ``TextualInversionLoaderMixin._maybe_convert_prompt``.
    """
    added = {one.content for one in tokenizer.get_added_tokens_decoder().values()}
    for word in dict.fromkeys(tokenizer.encode(text, add_special_tokens=False).tokens):
        if word in added and f"{word}_1" in added:
            count = next(n for n in range(1, len(added) + 1) if f"{word}_{n}" not in added)
            text = text.replace(word, " ".join([word, *(f"{word}_{n}" for n in range(1, count))]))
    return text
