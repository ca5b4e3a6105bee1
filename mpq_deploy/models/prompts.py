"""Prompts through a pipeline's own text encoders: the conditions of a text-conditional denoiser.

In: a diffusers pipeline folder, a file of prompts. Out: ``Conditions``, the empty prompt last.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mpq_deploy.errors import ModelError, UsageError
from mpq_deploy.models.additions import DENOISERS, read_json
from mpq_deploy.models.conditions import Conditions, WantedInput, list_inputs
from mpq_deploy.models.model_form import model_form
from mpq_deploy.models.spec import Array
from mpq_deploy.models.transformer import FLUX, PIXART, SD3
from mpq_deploy.models.unet import find_weights
from mpq_deploy.models.weight_files import refuse_unborne
from mpq_deploy.system.libraries import no_bars
from mpq_deploy.system.names import printable
from mpq_deploy.system.progress import Talk

# Classes of transformers that are opened: those of the Stable Diffusion and T5 families.
ENCODERS = ("CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel")
TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast", "T5Tokenizer", "T5TokenizerFast")
WEIGHTS_STEM = "model"
BATCH = 8
EMPTY_LABEL = "(empty prompt)"
# Denoisers whose pipelines hand T5 the prompts in lower case, without blanks around them.
LOWER_CASE = (PIXART,)
# T5 has no length limit of its own: tokens to which the pipelines of diffusers pad its prompts, by the pipeline's class
# where denoisers of one class differ in it, else by the denoiser's.
T5_TOKENS = {
    "PixArtAlphaPipeline": 120,
    PIXART: 300,
    SD3: 256,
    FLUX: 512,
}
LENGTH_LIMIT = 77
# Default guidance scales of the Flux and latent consistency pipelines, which are inputs there.
TOLD_GUIDANCE = {"guidance": 3.5, "timestep_cond": 8.5}
# A consistency model embeds its scale like a timestep 1,000 times as large (Luo et al. 2023).
GUIDANCE_FACTOR, LONGEST_PERIOD = 1000.0, 10000.0
FROM_TEXT = (
    "encoder_hidden_states",
    "encoder_attention_mask",
    "text_embeds",
    "time_ids",
    "pooled_projections",
    "resolution",
    "aspect_ratio",
    *TOLD_GUIDANCE,
)


@dataclass(frozen=True)
class Wanted:
    """What a denoiser of ``class_name`` takes; ``image_size``: height and width in pixels."""

    class_name: str
    inputs: tuple[WantedInput, ...]
    image_size: tuple[int, int]
    guidance: float | None = None

    def shape(self, name: str) -> tuple[int | None, ...] | None:
        """Return the shape of an input without its rows, None where it is not wanted."""
        return next((item.shape for item in self.inputs if item.name == name), None)


def prompts_file() -> Path:
    """Return the package's own prompts (``calibration/prompts.txt`` of the source tree)."""
    package = Path(str(resources.files("mpq_deploy")))
    for path in (
        package / "calibration_data" / "prompts.txt",
        package.parent / "calibration" / "prompts.txt",
    ):
        if path.is_file():
            return path
    raise ModelError(
        "The package's prompts.txt is missing.", "Install it again, or give --prompts FILE."
    )


def read_prompts(path: Path) -> tuple[str, ...]:
    """Return the prompts of a file, one per line, without empty lines and # comments."""
    if not path.is_file():
        raise UsageError(
            f"There is no prompts file at {path}.", "Give a text file with one prompt per line."
        )
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{path} is no UTF-8 text: {error}", "Give one prompt per line."
        ) from error
    prompts = tuple(line for line in lines if line and not line.startswith("#"))
    if not prompts:
        raise UsageError(f"{path} holds no prompt.", "Give a text file with one prompt per line.")
    return prompts


def text_conditions(
    folder: Path, pipeline: dict[str, Any], wanted: Wanted, prompts: tuple[str, ...], talk: Talk
) -> Conditions:
    """Return the conditions that the pipeline makes from ``prompts``.

    Raises UsageError listing the arrays to give when the pipeline's encoders do not make them all.
    """
    names = {item.name for item in wanted.inputs}
    if not names <= set(FROM_TEXT):
        raise UsageError(
            f"The text encoder of {folder} does not make all conditions of its denoiser.",
            f"Give --conditions FILE.npz with the arrays {list_inputs(wanted.inputs)}.",
        )
    texts = (*prompts, "")
    encoded = []
    for suffix in ("", "_2", "_3"):
        # Stable Diffusion 3 may come without its third encoder.
        if (folder / f"text_encoder{suffix}").is_dir():
            encoder = Encoder(folder, pipeline, suffix, wanted)
            talk.line(f"  encoding {len(prompts)} prompts with {encoder.name}")
            encoded.append(encoder.encode(texts))
    if "pooled_projections" in names:
        arrays = _joint(encoded, wanted, folder)
    else:
        arrays = {"encoder_hidden_states": np.concatenate([one.states for one in encoded], axis=-1)}
        if "encoder_attention_mask" in names:
            arrays["encoder_attention_mask"] = encoded[0].mask.astype(np.float32)
    if "text_embeds" in names:
        arrays["text_embeds"] = _needed(encoded[-1].pooled, folder)
        if pipeline.get("force_zeros_for_empty_prompt"):
            arrays["encoder_hidden_states"][-1] = 0
            arrays["text_embeds"][-1] = 0
    arrays |= {
        name: np.tile(row, (len(texts), *[1] * row.ndim))
        for name, row in _same_for_all(wanted).items()
    }
    return Conditions(arrays, len(texts), len(prompts), (*prompts, EMPTY_LABEL))


def _joint(encoded: list[_Encoded], wanted: Wanted, folder: Path) -> dict[str, Array]:
    """Return the conditions of Stable Diffusion 3 and Flux: pooled CLIP vectors, and tokens.

    Flux takes T5's tokens alone. Stable Diffusion 3 puts CLIP's (side by side, filled up with
    zeros) before them, and as many tokens of zeros in their place where there is no T5 (Esser et
    al. 2024, section 4).
    """
    pooled = [_needed(one.pooled, folder) for one in encoded if not one.t5]
    t5 = [one.states for one in encoded if one.t5]
    width = int((wanted.shape("encoder_hidden_states") or (None, 0))[1] or 0)
    unlike = next((states.shape[-1] for states in t5 if states.shape[-1] != width), None)
    if unlike is not None:
        raise ModelError(
            f"The T5 of {folder} gives {unlike} values per token, not {width} as its denoiser takes."
        )
    tokens = t5
    if wanted.class_name != FLUX and pooled:
        clip = np.concatenate([one.states for one in encoded if not one.t5], axis=-1)
        if clip.shape[-1] > width:
            raise ModelError(
                f"The text encoders of {folder} give {clip.shape[-1]} values per token, not {width}."
            )
        padded = np.pad(clip, ((0, 0), (0, 0), (0, width - clip.shape[-1])))
        nothing = np.zeros((len(padded), T5_TOKENS[SD3], width), np.float32)
        tokens = [padded, *(t5 or [nothing])]
    if not tokens or not pooled:
        raise UsageError(
            f"{folder} has no CLIP text encoder, or no T5, which its {wanted.class_name} needs.",
            f"Give --conditions FILE.npz with the arrays {list_inputs(wanted.inputs)}.",
        )
    return {
        "encoder_hidden_states": np.concatenate(tokens, axis=1),
        "pooled_projections": np.concatenate(pooled, axis=-1),
    }


def _same_for_all(wanted: Wanted) -> dict[str, Array]:
    """Return what all prompts share: the image's size, and the guidance scale that is an input."""
    height, width = wanted.image_size
    arrays: dict[str, Array] = {}
    if wanted.shape("time_ids") is not None:
        arrays["time_ids"] = np.array([height, width, 0, 0, height, width], np.float32)
    if wanted.shape("resolution") is not None:
        arrays["resolution"] = np.array([height, width], np.float32)
        arrays["aspect_ratio"] = np.array([height / width], np.float32)
    for name, default in TOLD_GUIDANCE.items():
        shape = wanted.shape(name)
        if shape is not None:
            scale = default if wanted.guidance is None else wanted.guidance
            arrays[name] = (
                guidance_embedding(scale - 1, int(shape[0] or 0))
                if shape
                else np.array(scale, np.float32)
            )
    return arrays


def guidance_embedding(scale: float, width: int) -> Array:
    """Return a latent consistency model's embedded guidance, float32 [width], as diffusers does."""
    half = width // 2
    rates = np.exp(-np.log(LONGEST_PERIOD) * np.arange(half) / (half - 1))
    angles = GUIDANCE_FACTOR * scale * rates
    return np.pad(np.concatenate([np.sin(angles), np.cos(angles)]), (0, width % 2)).astype(
        np.float32
    )


def _needed(pooled: Array | None, folder: Path) -> Array:
    if pooled is None:
        raise ModelError(
            f"The text encoders of {folder} give no pooled vector, which its denoiser takes."
        )
    return pooled


@dataclass(frozen=True)
class _Encoded:
    """Encoded prompts: states [texts, tokens, width], mask [texts, tokens], pooled [texts, K]."""

    states: Array
    mask: Array
    pooled: Array | None
    t5: bool


class Encoder:
    """A tokenizer with its text encoder, called as the denoiser's own pipeline does.

    SDXL and Stable Diffusion 3 take CLIP's last hidden layer but one; Flux its pooled vector.
    """

    def __init__(self, folder: Path, pipeline: dict[str, Any], suffix: str, wanted: Wanted) -> None:
        self.name = f"text_encoder{suffix}"
        self._tokenizer = load_part(folder, pipeline, f"tokenizer{suffix}", TOKENIZERS)
        self.model = load_part(folder, pipeline, self.name, ENCODERS)
        self.t5 = type(self.model).__name__.startswith("T5")
        joint = wanted.shape("pooled_projections") is not None
        self.penultimate = not self.t5 and (joint or wanted.shape("text_embeds") is not None)
        # Stable Diffusion 3 and Flux let T5 see its padding.
        self.masked = (self.t5 and not joint) or bool(
            getattr(self.model.config, "use_attention_mask", False)
        )
        self._tokens = min(self._tokenizer.model_max_length, LENGTH_LIMIT)
        if self.t5:
            of_class = T5_TOKENS.get(wanted.class_name, self._tokens)
            self._tokens = T5_TOKENS.get(str(pipeline.get("_class_name")), of_class)
        self._lower_case = wanted.class_name in LOWER_CASE

    @classmethod
    def of_pipeline(cls, folder: Path, pipeline: dict[str, Any], name: str) -> Encoder:
        """Open the text encoder ``name`` of a pipeline as the denoiser's class has it called."""
        denoiser = next((part for part in DENOISERS if part in pipeline), "")
        config = folder / denoiser / "config.json"
        values = read_json(config) if denoiser and config.is_file() else {}
        form = model_form(values, config.parent, None) if values else None
        wanted = Wanted(form.class_name, form.wanted, (0, 0)) if form else Wanted("", (), (0, 0))
        return cls(folder, pipeline, name.removeprefix("text_encoder"), wanted)

    @property
    def layer(self) -> str:
        """What of the model's output is taken, in words."""
        return "last hidden layer but one" if self.penultimate else "last hidden layer"

    def states(self, output: Any) -> torch.Tensor:
        """Return the hidden states that the denoiser takes, [texts, tokens, width]."""
        states: torch.Tensor = (
            output.hidden_states[-2] if self.penultimate else output.last_hidden_state
        )
        return states

    def tokenize(self, texts: tuple[str, ...]) -> tuple[Array, Array]:
        """Return token ids and mask, int64 [texts, tokens] each."""
        handed = [text.lower().strip() for text in texts] if self._lower_case else list(texts)
        tokens = self._tokenizer(
            handed,
            padding="max_length",
            max_length=self._tokens,
            truncation=True,
            return_tensors="np",
        )
        return np.asarray(tokens.input_ids, np.int64), np.asarray(tokens.attention_mask, np.int64)

    def encode(self, texts: tuple[str, ...]) -> _Encoded:
        """Return the encoded texts, float32."""
        ids, mask = self.tokenize(texts)
        states, pooled = [], []
        for start in range(0, len(texts), BATCH):
            chunk = slice(start, start + BATCH)
            with torch.no_grad():
                output = self.model(
                    torch.from_numpy(ids[chunk]),
                    attention_mask=torch.from_numpy(mask[chunk]) if self.masked else None,
                    output_hidden_states=True,
                )
            states.append(self.states(output))
            vector = output.get("text_embeds", output.get("pooler_output"))
            if vector is not None:
                pooled.append(vector)
        return _Encoded(_rows(states), mask, _rows(pooled) if pooled else None, self.t5)


def _rows(parts: list[torch.Tensor]) -> Array:
    return np.array(torch.cat(parts).float().numpy(), np.float32)


def load_part(folder: Path, pipeline: dict[str, Any], name: str, allowed: tuple[str, ...]) -> Any:
    """Load the pipeline's tokenizer or text encoder, if its transformers class is ``allowed``."""
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
        refuse_unborne(folder / name, WEIGHTS_STEM, options["variant"])
        options["dtype"] = torch.float32
        options["output_loading_info"] = True
    try:
        with no_bars("transformers"):
            loaded = getattr(transformers, class_name).from_pretrained(folder / name, **options)
    except Exception as error:
        # Classes and tokenizers raise anything at all for files that are not their own.
        reason = printable(" ".join(str(error).split())[:300]) or type(error).__name__
        raise ModelError(f"The {name} of {folder} cannot be loaded: {reason}.") from error
    if not name.startswith("text_encoder"):
        return loaded
    model, info = loaded
    if info["missing_keys"]:
        raise ModelError(
            f"The weights of the {name} in {folder} lack '{min(info['missing_keys'])}'."
        )
    return model.eval()
