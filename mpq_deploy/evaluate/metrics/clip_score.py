"""The CLIP score: how well each image agrees with its prompt (Hessel et al. 2021).

In: a local folder of the transformers library with a whole CLIP: both towers and the tokenizer.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mpq_deploy.errors import MissingDependencyError, UsageError
from mpq_deploy.evaluate.metrics.efficientnet import torch_features
from mpq_deploy.evaluate.metrics.networks import BATCH, CLIP, digest_of
from mpq_deploy.evaluate.metrics.scores import ScoreKind
from mpq_deploy.evaluate.metrics.vision import (
    CONFIG,
    PREPROCESSOR,
    WEIGHTS,
    from_folder,
    preprocessing,
)
from mpq_deploy.models.spec import Array
from mpq_deploy.system.files import file_digest

# What a CLIP tokenizer is saved as; the fast form holds all in one file.
TOKENIZER, VOCABULARY = "tokenizer.json", "vocab.json"


def check_clip_score(path: Path | None, offline: str) -> Path:
    """Return the folder, or say what is missing. Raises MissingDependencyError, UsageError."""
    for package in ("torch", "transformers"):
        if importlib.util.find_spec(package) is None:
            raise MissingDependencyError(package, "torch", "The CLIP score")
    needed = f"{CONFIG}, {PREPROCESSOR}, {WEIGHTS} and the tokenizer's files"
    if path is None:
        raise UsageError(
            "The CLIP score needs weights of your own.",
            f"Give a local folder of the transformers library (such as a copy of clip-vit-large-patch14 from the hub: "
            f"{needed}): --weights {CLIP}=FOLDER. {offline}",
        )
    for file in (CONFIG, PREPROCESSOR, WEIGHTS):
        if not (path / file).is_file():
            raise UsageError(f"{path} holds no {file}.", f"Give a folder with {needed}. {offline}")
    if not any((path / file).is_file() for file in (TOKENIZER, VOCABULARY)):
        raise UsageError(f"{path} holds no tokenizer.", f"Give a folder with {needed}. {offline}")
    return path


class ClipScore:
    """100 times the cosine between CLIP's embeddings of image and prompt, at least 0.

    Images are prepared as for the network 'clip': made as large as the crop, nothing cropped.
    Prompts are cut at the text tower's length, as CLIP's own are.
    """

    name: ScoreKind = "clip-score"
    min_side = 1

    def __init__(self, folder: Path) -> None:
        self._side, self._mean, self._deviation = preprocessing(folder)
        self._model, self._tokenizer = _opened(folder)
        self._length = int(self._model.config.text_config.max_position_embeddings)
        self.title = f"CLIP score ({folder.resolve().name})"
        tokenizer = next(
            folder / file for file in (TOKENIZER, VOCABULARY) if (folder / file).is_file()
        )
        settings = repr((self._side, self._mean, self._deviation, self._length))
        self.digest = digest_of(file_digest(folder / WEIGHTS), file_digest(tokenizer), settings)

    def scores(self, images: Array, reference: Array, prompts: Sequence[str]) -> Array:
        """Return float64 [N] in [0, 100]; ``prompts``: one per image. ``reference`` is not looked at."""
        found = []
        for start in range(0, len(images), BATCH):
            chunk, texts = images[start : start + BATCH], list(prompts[start : start + BATCH])
            cosine = partial(self._cosine, texts)
            found.append(torch_features(cosine, chunk, self._side, self._mean, self._deviation))
        return np.asarray(np.maximum(100 * np.concatenate(found), 0))

    def _cosine(self, texts: list[str], pixels: Any) -> Any:
        tokens = self._tokenizer(
            texts, padding=True, truncation=True, max_length=self._length, return_tensors="pt"
        )
        taken = {name: tokens[name].to(pixels.device) for name in ("input_ids", "attention_mask")}
        # Both embeddings have length 1.
        found = self._model(pixel_values=pixels, **taken)
        return (found.image_embeds * found.text_embeds).sum(dim=-1)


def _opened(folder: Path) -> tuple[Any, Any]:
    """Return the model and its tokenizer. Raises UsageError for a folder that holds no whole CLIP."""
    import transformers

    model = from_folder(transformers.CLIPModel, folder, CLIP)
    try:
        return model, transformers.CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"The tokenizer in {folder} cannot be read: {str(error).splitlines()[0]}",
            "Give a folder that CLIPModel and its tokenizer were saved in.",
        ) from error
