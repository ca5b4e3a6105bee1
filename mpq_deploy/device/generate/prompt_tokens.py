"""Prompts as token ids, as transformers' tokenizers give them, by the library ``tokenizers``."""

from __future__ import annotations

from mpq_deploy.device.generate.generation_folder import TokenizerUse
from mpq_deploy.device.generate.noise_schedule import Array
from mpq_deploy.errors import InputError, MissingDependencyError


def token_ids(use: TokenizerUse, texts: list[str]) -> tuple[Array, list[str]]:
    """Return ids [N, length] int64 of ``texts``, and for each what was cut off (empty: nothing)."""
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
