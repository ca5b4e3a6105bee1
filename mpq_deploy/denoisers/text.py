"""Prompts through a pipeline's own text encoders: the conditions of a text-conditional UNet.

In: a diffusers pipeline folder and a file of prompts. Out: ``Conditions`` with one row per prompt and a last one for
the empty prompt.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mpq_deploy.denoisers.additions import WantedInput, list_inputs
from mpq_deploy.denoisers.conditions import Conditions
from mpq_deploy.denoisers.spec import Array
from mpq_deploy.denoisers.unet import find_weights
from mpq_deploy.errors import ModelError, UsageError
from mpq_deploy.talk import Talk

# Classes of transformers that are opened: encoders and tokenizers of the Stable Diffusion and T5 families.
ENCODERS = ("CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel")
TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast", "T5Tokenizer", "T5TokenizerFast")
WEIGHTS_STEM = "model"
BATCH = 8
EMPTY_LABEL = "(empty prompt)"
# T5 has no length limit of its own; diffusers pads its prompts to this length (DeepFloyd IF).
LENGTH_LIMIT = 77


def prompts_file() -> Path:
    """Return the prompts that come with the package (``calibration/prompts.txt`` of the source tree)."""
    package = Path(str(resources.files("mpq_deploy")))
    for path in (package / "calibration_data" / "prompts.txt", package.parent / "calibration" / "prompts.txt"):
        if path.is_file():
            return path
    raise ModelError("The package's prompts.txt is missing.", "Install it again, or give --prompts FILE.")


def read_prompts(path: Path) -> tuple[str, ...]:
    """Return the prompts of a file, one per line; empty lines and lines that begin with # are left out."""
    if not path.is_file():
        raise UsageError(f"There is no prompts file at {path}.", "Give a text file with one prompt per line.")
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is no UTF-8 text: {error}", "Give one prompt per line.") from error
    prompts = tuple(line for line in lines if line and not line.startswith("#"))
    if not prompts:
        raise UsageError(f"{path} holds no prompt.", "Give a text file with one prompt per line.")
    return prompts


def text_conditions(
    folder: Path,
    pipeline: dict[str, Any],
    wanted: tuple[WantedInput, ...],
    image_size: tuple[int, int],
    prompts: tuple[str, ...],
    talk: Talk,
) -> Conditions:
    """Return the conditions that the pipeline makes from ``prompts`` (and ``image_size`` in pixels, for SDXL).

    Raises UsageError listing the arrays to give when the pipeline's encoders do not make them all.
    """
    names = {item.name for item in wanted}
    if not names <= {"encoder_hidden_states", "text_embeds", "time_ids"}:
        raise UsageError(
            f"The text encoder of {folder} does not make all conditions of its UNet.",
            f"Give --conditions FILE.npz with the arrays {list_inputs(wanted)}.",
        )
    texts = (*prompts, "")
    last_states, pooled = [], None
    for suffix in ("", "_2") if (folder / "text_encoder_2").is_dir() else ("",):
        encoder = _Encoder(folder, pipeline, suffix, penultimate="text_embeds" in names)
        talk.line(f"  encoding {len(prompts)} prompts with {encoder.name}")
        states, pooled = encoder.encode(texts)
        last_states.append(states)
    arrays = {"encoder_hidden_states": np.concatenate(last_states, axis=-1)}
    if "text_embeds" in names:
        arrays["text_embeds"] = _needed(pooled, folder)
        height, width = image_size
        arrays["time_ids"] = np.tile(np.array([height, width, 0, 0, height, width], np.float32), (len(texts), 1))
        if pipeline.get("force_zeros_for_empty_prompt"):
            arrays["encoder_hidden_states"][-1] = 0
            arrays["text_embeds"][-1] = 0
    return Conditions(arrays, len(texts), len(prompts), (*prompts, EMPTY_LABEL))


def _needed(pooled: Array | None, folder: Path) -> Array:
    if pooled is None:
        raise ModelError(f"The text encoders of {folder} give no pooled text_embeds, which its UNet takes.")
    return pooled


class _Encoder:
    """A tokenizer with its text encoder. ``penultimate``: the last hidden layer but one, as SDXL takes it."""

    def __init__(self, folder: Path, pipeline: dict[str, Any], suffix: str, penultimate: bool) -> None:
        self.name = f"text_encoder{suffix}"
        self._penultimate = penultimate
        self._tokenizer = _part(folder, pipeline, f"tokenizer{suffix}", TOKENIZERS)
        self._model = _part(folder, pipeline, self.name, ENCODERS)

    def encode(self, texts: tuple[str, ...]) -> tuple[Array, Array | None]:
        """Return hidden states float32 [texts, tokens, width] and, where the model projects, [texts, width]."""
        states, pooled = [], []
        for start in range(0, len(texts), BATCH):
            tokens = self._tokenizer(
                list(texts[start : start + BATCH]),
                padding="max_length",
                max_length=min(self._tokenizer.model_max_length, LENGTH_LIMIT),
                truncation=True,
                return_tensors="pt",
            )
            masked = bool(getattr(self._model.config, "use_attention_mask", False))
            masked = masked or type(self._model).__name__.startswith("T5")
            mask = tokens.attention_mask if masked else None
            with torch.no_grad():
                output = self._model(tokens.input_ids, attention_mask=mask, output_hidden_states=True)
            states.append(output.hidden_states[-2] if self._penultimate else output.last_hidden_state)
            if "text_embeds" in output:
                pooled.append(output.text_embeds)
        return _rows(states), _rows(pooled) if pooled else None


@contextmanager
def _no_bars() -> Iterator[None]:
    """Keep transformers' own progress bars out of the output."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _rows(parts: list[torch.Tensor]) -> Array:
    return np.array(torch.cat(parts).float().numpy(), np.float32)


def _part(folder: Path, pipeline: dict[str, Any], name: str, allowed: tuple[str, ...]) -> Any:
    """Load a tokenizer or text encoder of the pipeline; only the ``allowed`` classes of transformers."""
    import transformers

    library, class_name = (*(pipeline.get(name) or ()), None, None)[:2]
    if library != "transformers" or class_name not in allowed:
        raise UsageError(
            f"The {name} of {folder} is a {class_name or 'part that model_index.json does not name'}.",
            f"Supported: {', '.join(allowed)}; otherwise give --conditions FILE.npz.",
        )
    options: dict[str, Any] = {"local_files_only": True}
    if name.startswith("text_encoder"):
        options["use_safetensors"] = True
        options["variant"] = find_weights(folder / name, WEIGHTS_STEM)
        options["dtype"] = torch.float32
        options["output_loading_info"] = True
    try:
        with _no_bars():
            loaded = getattr(transformers, class_name).from_pretrained(folder / name, **options)
    except (OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
        raise ModelError(f"The {name} of {folder} cannot be loaded: {str(error).splitlines()[0]}") from error
    if not name.startswith("text_encoder"):
        return loaded
    model, info = loaded
    if info["missing_keys"]:
        raise ModelError(f"The weights of the {name} in {folder} lack '{min(info['missing_keys'])}'.")
    return model.eval()
