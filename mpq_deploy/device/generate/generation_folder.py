"""A GENERATION folder, read and checked: what ``mpq_deploy.delivery.generation`` writes.

``generation.json`` names the pipeline, its parts with their tensors, its tokenizers and the
defaults of a call; beside it ``scheduler_config.json``, ``tokenizer*/`` and ``components/NAME/``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from mpq_deploy.errors import InputError, UsageError
from mpq_deploy.system.inputs import read_json_object
from mpq_deploy.system.names import path_inside, printable
from mpq_deploy.system.typed import typed

FORMAT = 1
FILE, SCHEDULER, COMPONENTS = "generation.json", "scheduler_config.json", "components"
TOKENIZER = "tokenizer.json"
DTYPES = ("float32", "float16", "int64", "int32", "uint8", "bool")
LONGEST = 100_000  # tokens of a prompt, pixels of a side
AGAIN = "Write the folder again on the build machine."
PICTURED = (
    "Build it from a folder of a pipeline that takes images (such as "
    "StableDiffusionImg2ImgPipeline), with --call FILE.yaml that gives it some."
)
SD, SDXL, SD3, FLUX = "sd", "sdxl", "sd3", "flux"
# What each part is, and whether a kind needs it (T5 of SD3 is optional: then its states are zeros).
WHAT = {
    "text_encoder": "the CLIP text encoder",
    "text_encoder_2": "the second text encoder",
    "text_encoder_3": "the T5 text encoder",
    "unet": "the denoiser",
    "transformer": "the denoiser",
    "vae_decoder": "what turns latents into the image",
    "vae_encoder": "what turns a given image into latents",
}
NEEDED = {
    SD: ("text_encoder", "unet", "vae_decoder"),
    SDXL: ("text_encoder", "text_encoder_2", "unet", "vae_decoder"),
    SD3: ("text_encoder", "text_encoder_2", "transformer", "vae_decoder"),
    FLUX: ("text_encoder", "text_encoder_2", "transformer", "vae_decoder"),
}
# Outputs that a kind takes of a text encoder: all tokens' states, one vector per text.
STATES, POOLED = "hidden_states", "pooled"
TEXT_OUTPUTS: dict[str, dict[str, tuple[str, ...]]] = {
    SD: {"text_encoder": (STATES,)},
    SDXL: {"text_encoder": (STATES,), "text_encoder_2": (STATES, POOLED)},
    SD3: {
        "text_encoder": (STATES, POOLED),
        "text_encoder_2": (STATES, POOLED),
        "text_encoder_3": (STATES,),
    },
    FLUX: {"text_encoder": (POOLED,), "text_encoder_2": (STATES,)},
}


@dataclass(frozen=True)
class Tensor:
    """A tensor of a part: NumPy's name of its type; None in ``shape`` is any size."""

    dtype: str
    shape: tuple[int | None, ...]

    def __post_init__(self) -> None:
        """Raise ValueError for a type that no graph has, and for a size below 1."""
        if self.dtype not in DTYPES or any(one is not None and one < 1 for one in self.shape):
            raise ValueError(f"a tensor of {self.dtype!r} {self.shape!r}")


@dataclass(frozen=True)
class _Figures:
    """What ``generation.json`` holds of the VAE and of a call, for a check of its types."""

    scaling_factor: float
    scale_factor: int
    latent_channels: int
    steps: int
    guidance: float
    strength: float
    shift_factor: float | None = None
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        """Raise ValueError for what no pipeline has."""
        counts = (self.scale_factor, self.latent_channels, self.steps)
        if not self.scaling_factor or min(counts) < 1:
            raise ValueError(f"{self}")


@dataclass(frozen=True)
class Part:
    """A part of the pipeline. ``largest_batch``: None where its graph takes any.

    ``slots``: further inputs, the same for all calls: a LoRA's factors (``device.lora_inputs``);
    ``weight_norms``: of the layers with slots, where a LoRA can leave the ranges of quantized activations.
    ``memory_bytes``: what it takes while it is open, estimated; None: not known.
    """

    name: str
    file: Path
    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]
    vocabulary: int | None = None
    largest_batch: int | None = None
    memory_bytes: int | None = None
    slots: Mapping[str, Tensor] = field(default_factory=dict)
    weight_norms: Mapping[str, float] = field(default_factory=dict)

    @property
    def rows(self) -> int | None:
        """The fixed batch of its graph; None where it takes any."""
        return next((one.shape[0] for one in self.inputs.values() if len(one.shape) > 1), None)


@dataclass(frozen=True)
class TokenizerUse:
    """A tokenizer: its file, the length that prompts are padded to and with what, its words."""

    file: Path
    length: int
    pad: int
    vocabulary: int


@dataclass(frozen=True)
class Generation:
    """The folder's content. ``sizes``: (width, height) that its graphs take; ``size_step``: above 0
    where they take all multiples of it between these, too.
    """

    folder: Path
    kind: str
    parts: Mapping[str, Part]
    tokenizers: Mapping[str, TokenizerUse]
    scheduler: Mapping[str, Any]
    defaults: Mapping[str, Any]
    sizes: tuple[tuple[int, int], ...]
    vae: Mapping[str, Any]
    settings: Mapping[str, Any]
    size_step: int = 0

    def part(self, name: str) -> Part:
        """Return a part. InputError says what a missing one would have been."""
        if name not in self.parts:
            hint = PICTURED if name == "vae_encoder" else AGAIN
            raise InputError(f"{self.folder} has no {name}, {WHAT.get(name, 'a part')}.", hint)
        return self.parts[name]

    @property
    def denoiser(self) -> Part:
        """The part that is called at each step."""
        return self.part("unet" if self.kind in (SD, SDXL) else "transformer")

    @property
    def paints(self) -> bool:
        """Whether the UNet takes the mask and the masked image beside the latents."""
        sample = self.denoiser.inputs.get("sample")
        return sample is not None and sample.shape[1] == 2 * self.vae["latent_channels"] + 1

    def check_size(self, size: tuple[int, int]) -> None:
        """Raise UsageError with the list, or the range, where no graph takes images of ``size``."""
        step, ends = self.size_step, zip(*self.sizes)
        inside = all(min(one) <= side <= max(one) for side, one in zip(size, ends))
        if size not in self.sizes and not (step and inside and not any(n % step for n in size)):
            sizes = ", ".join(f"{width}x{height}" for width, height in self.sizes)
            taken = range_text(self.sizes, step) if step else sizes
            raise UsageError(
                f"{self.folder} makes no images of {size[0]}x{size[1]}.", f"It makes {taken}."
            )


def range_text(sizes: Sequence[tuple[int, int]], step: int) -> str:
    """Return the range with the corners ``sizes`` (width, height) for a message."""
    widths, heights = zip(*sizes)
    low, high = (f"{end(widths)}x{end(heights)}" for end in (min, max))
    return f"every size from {low} to {high} in steps of {step}"


def open_generation(folder: Path, files: bool = True) -> Generation:
    """Read and check ``folder``; InputError says in one line what is wrong.

    ``files``: whether the parts' files must be there.
    """
    file = folder / FILE
    if folder.is_file():
        raise InputError(
            f"{folder} is a file.", f"Install a package first: mpq-deploy install {folder}"
        )
    hint = "Give the run of a whole pipeline, an installed package or a generation folder."
    if not file.exists() and (folder / "recipe.yaml").is_file():
        what = f"{folder} is the run of one model, not of a whole pipeline."
        raise InputError(what, f"For its images: mpq-deploy sample {folder}")
    if not file.exists() and (folder / "pipeline.json").is_file():
        what = f"{folder} is the run of a whole pipeline, which mpq-deploy generate opens."
        raise InputError(what, f"Give the folder that it writes: {folder / 'generation'}")
    if not file.exists() and (folder / "model_index.json").is_file():
        what = f"{folder} is a pipeline that was not built."
        raise InputError(what, f"Build it first: mpq-deploy build {folder}")
    read = read_json_object(file, error=InputError, hint=hint)
    if read.get("format") != FORMAT:
        what = f"{file} is of format {read.get('format')!r}; this version reads {FORMAT}."
        raise InputError(what, AGAIN)
    try:
        generation = _generation(folder, read)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        missing = isinstance(error, KeyError)
        what = f"{file} {'lacks' if missing else 'cannot be used:'} {printable(str(error))}."
        raise InputError(what, AGAIN) from error
    _check_parts(generation, files)
    return generation


def _generation(folder: Path, read: Mapping[str, Any]) -> Generation:
    kind = str(read["kind"])
    if kind not in NEEDED:
        raise InputError(f"The kind '{kind}' is not known.", f"Known: {', '.join(NEEDED)}.")
    parts = {name: _part(folder, name, values) for name, values in read["parts"].items()}
    tokenizers = {
        name: TokenizerUse(
            path_inside(folder, name, "A tokenizer", InputError) / TOKENIZER,
            *_words(name, values),
        )
        for name, values in read["tokenizers"].items()
    }
    sizes = typed(tuple[tuple[int, int], ...], read["sizes"], "sizes")
    scheduler = read_json_object(folder / SCHEDULER, infinite=True, error=InputError, hint=AGAIN)
    defaults = {key: read["defaults"][key] for key in ("steps", "guidance", "strength")}
    vae = {key: read["vae"][key] for key in ("scaling_factor", "scale_factor", "latent_channels")}
    given = {**read["vae"], **defaults}
    typed(_Figures, {one.name: given[one.name] for one in fields(_Figures) if one.name in given})
    if not sizes or min(map(min, sizes)) < 1 or max(map(max, sizes)) > LONGEST:
        raise ValueError(f"the sizes {sizes}")
    return Generation(
        *(folder, kind, parts, tokenizers, scheduler, defaults, sizes),
        {**read["vae"], **vae},
        dict(read["settings"]),
        int(read.get("size_step", 0)),
    )


def _words(name: str, values: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the length, the padding and the number of words of a tokenizer."""
    numbers = tuple(typed(int, values[key], key) for key in ("length", "pad", "vocabulary"))
    if not (2 <= numbers[0] <= LONGEST and 0 <= numbers[1] < numbers[2] + LONGEST):
        raise ValueError(f"{name} of length, padding and words {numbers}")
    return numbers


def _part(folder: Path, name: str, values: Mapping[str, Any]) -> Part:
    inputs, outputs, slots = (
        typed(dict[str, Tensor], given, name)
        for given in (values["inputs"], values["outputs"], values.get("slots", {}))
    )
    if not inputs or not outputs:
        raise ValueError(f"{name} without inputs or outputs")
    place = path_inside(folder / COMPONENTS, name, "A part", InputError)
    # An engine lies in a folder of its own.
    for piece in str(values["file"]).split("/"):
        place = path_inside(place, piece, "A part's file", InputError)
    more = {key: values.get(key) for key in ("vocabulary", "largest_batch", "memory_bytes")}
    numbers = typed(dict[str, int | None], more, name)
    norms = typed(dict[str, float], values.get("weight_norms", {}), name)
    return Part(name, place, inputs, outputs, **numbers, slots=slots, weight_norms=norms)


def _check_parts(generation: Generation, files: bool) -> None:
    for name in NEEDED[generation.kind]:
        generation.part(name)
    denoiser = generation.denoiser
    sample = denoiser.inputs.get("sample", denoiser.inputs.get("hidden_states"))
    if "timestep" not in denoiser.inputs or sample is None or len(sample.shape) < 3:
        what = f"The {denoiser.name} of {generation.folder} takes no sample and timestep"
        raise InputError(f"{what}.", AGAIN)
    for part in generation.parts.values():
        if files and not part.file.is_file():
            what = f"{generation.folder} lacks {part.file.name} of {part.name}"
            raise InputError(f"{what}, {WHAT.get(part.name, 'a part')}.", AGAIN)
    for name, outputs in TEXT_OUTPUTS[generation.kind].items():
        if name not in generation.parts:
            continue
        part = generation.parts[name]
        absent = [one for one in outputs if one not in part.outputs]
        if absent:
            what = f"The {name} gives {', '.join(part.outputs)}, and no {', '.join(absent)}"
            raise InputError(f"{what}, which {generation.kind} needs.", AGAIN)
        use = generation.tokenizers.get(name.replace("text_encoder", "tokenizer"))
        if use is None or not use.file.is_file():
            raise InputError(f"{generation.folder} has no tokenizer for {name}.", AGAIN)
        if part.vocabulary is not None and use.vocabulary > part.vocabulary:
            raise InputError(
                f"{use.file} has {use.vocabulary:,} words, and {name} knows {part.vocabulary:,}.",
                "Take the tokenizer that belongs to the text encoder.",
            )
