"""LoRA files as the inputs of slots, with NumPy alone.

In: ``FILE[:SCALE]`` in the names of kohya, diffusers or peft, and what they are for: the parts of a
GENERATION folder, or a denoiser alone. Out: for each part with slots the FP16 arrays of all of them,
zero where no file has an update. Several files add up, one behind the other along the rank.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mpq_deploy.device.generate.generation_folder import AGAIN, Generation, Part
from mpq_deploy.device.generate.noise_schedule import Array
from mpq_deploy.device.lora_inputs import DOWN as DOWN_INPUT
from mpq_deploy.device.lora_inputs import UP as UP_INPUT
from mpq_deploy.errors import InputError, ModelError, UsageError
from mpq_deploy.models.lora_names import (
    DOWN,
    check_names,
    peft_scale,
    peft_settings,
    plain_shape,
    up_of,
)
from mpq_deploy.models.lora_option import LoraOption, check_lora
from mpq_deploy.system.inputs import decoded, open_input, parse_json
from mpq_deploy.system.names import printable

# NumPy's types of safetensors'; bfloat16 is read as the upper halves of float32.
TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4"}
# The limit of safetensors' own reader.
HEADER_BYTES = 100_000_000
# Above this share of a layer's weights, by Frobenius norms, a LoRA is warned of where activations are quantized:
# up to it the error was at most twice what quantizing costs without LoRAs, at 0.5 up to 17 times (tiny models).
LARGE_UPDATE = 0.2
DAMAGED = "The file is damaged or not safetensors: download or save it again."
PREFIXES = {"te": "text_encoder", "te1": "text_encoder"}
PREFIXES |= {f"te{number}": f"text_encoder_{number}" for number in (2, 3)}
KOHYA = re.compile(r"lora_(unet|transformer|te\d?)_(.+)")
# Blocks numbered through, as Stable Diffusion's own code and kohya's files for SDXL have them.
NUMBERED = re.compile(r"(?:(input|output)_blocks_(\d+)|middle_block)_1_(.+)")
TEXT_LAYER = re.compile(r"encoder_layers_(\d+)_")
FUSE = "Fuse it at the build instead: --lora FILE."
OTHER = f"It was trained for another model, or updates convolutions. {FUSE}"


@dataclass(frozen=True)
class Update:
    """An update of a layer by its name in the file: ``a`` [r, in], ``b`` [out, r], scaled."""

    name: str
    part: str
    key: str
    a: Array
    b: Array
    kernel: tuple[int, ...]


@dataclass(frozen=True)
class SlottedModel:
    """What LoRAs are given to: its ``parts``, which of them denoises, and ``place`` for messages.

    ``others``: why layers of text encoders that are not there are left out; None: there are no others, and
    a LoRA with layers of one is for another model.
    """

    place: Path
    parts: Mapping[str, Part]
    denoiser: str
    others: str | None = None

    @classmethod
    def of(cls, generation: Generation) -> SlottedModel:
        """Return a whole pipeline."""
        return cls(generation.folder, generation.parts, generation.denoiser.name)


@dataclass(frozen=True)
class _Slots:
    """The slots of a part: its modules by their names with ``_`` for dots, and one rank for all."""

    part: Part
    modules: Mapping[str, str]

    @classmethod
    def of(cls, part: Part) -> _Slots:
        names = [n.removesuffix(DOWN_INPUT) for n in part.slots if n.endswith(DOWN_INPUT)]
        both = {name + end for name in names for end in (DOWN_INPUT, UP_INPUT)}
        if both != set(part.slots) or any(len(one.shape) != 2 for one in part.slots.values()):
            raise InputError(f"The slots of {part.name} are not pairs of matrices.", AGAIN)
        return cls(part, {_key(name): name for name in names})

    def shapes(self, module: str) -> tuple[int, int, int]:
        """Return rank, input channels and output channels of a slot."""
        rank, width = self.part.slots[module + DOWN_INPUT].shape
        return (
            int(rank or 0),
            int(width or 0),
            int(self.part.slots[module + UP_INPUT].shape[0] or 0),
        )

    def unread(self, key: str) -> bool:
        """Whether it names a text encoder's last layer, which SDXL does not read: no graph has it."""
        layers = [int(found[1]) for one in self.modules if (found := TEXT_LAYER.match(one))]
        found = TEXT_LAYER.match(key)
        if not layers or found is None or int(found[1]) != max(layers) + 1:
            return False
        return f"{key[: found.start(1)]}{max(layers)}{key[found.end(1) :]}" in self.modules

    def module(self, key: str) -> str | None:
        """Return the module of a name; None where it has no slot."""
        found = NUMBERED.fullmatch(key)
        if found is None or key in self.modules:
            # Only diffusers' own attention has a list of layers there.
            alone = key.removesuffix("_0") if key.endswith("_to_out_0") else key
            return self.modules.get(key, self.modules.get(alone))
        kind, number, rest = found.groups()
        if kind is None:
            return self.modules.get(f"mid_block_attentions_0_{rest}")
        within = [re.match(r"down_blocks_\d+_attentions_(\d+)_", one) for one in self.modules]
        layers = 1 + max((int(one[1]) for one in within if one), default=0)
        way, start = ("down", int(number) - 1) if kind == "input" else ("up", int(number))
        level, place = divmod(start, layers + 1)
        return self.modules.get(f"{way}_blocks_{level}_attentions_{place}_{rest}")


def _key(module: str) -> str:
    # CLIPTextModel has lost a level of its names, which files still have.
    return module.removeprefix("text_model.").replace(".", "_").removeprefix("text_model_")


def slot_arrays(
    loras: Sequence[LoraOption], model: SlottedModel, warn: Callable[[str], None]
) -> dict[str, dict[str, Array]]:
    """Return the inputs of all slots by part, filled from ``loras``; ``warn`` of layers left out.

    Raises UsageError where there are no slots or their rank is too small, ModelError for a file
    that is damaged, no LoRA, or for another model, naming the first weight that does not fit.
    """
    slots = {name: _Slots.of(part) for name, part in model.parts.items() if part.slots}
    arrays = {
        name: {
            key: np.zeros([n or 0 for n in one.shape], np.float16) for key, one in values.items()
        }
        for name, values in ((name, found.part.slots) for name, found in slots.items())
    }
    denoiser = model.denoiser
    if loras and denoiser not in slots:
        raise UsageError(
            f"The {denoiser} in {model.place} has no slots for LoRAs.",
            f"Build with --lora-slots RANK. {FUSE}",
        )
    taken: dict[tuple[str, str], list[tuple[LoraOption, Update]]] = {}
    for lora in loras:
        left: dict[str, int] = {}
        for update in updates_in(lora, denoiser):
            if update.part not in slots:
                _check_part(update, lora, model)
                left[update.part] = left.get(update.part, 0) + 1
                continue
            if slots[update.part].unread(update.key):
                continue
            module = _fitting(update, lora, slots[update.part])
            taken.setdefault((update.part, module), []).append((lora, update))
        for part, count in left.items():
            why = "which has no slots" if part in model.parts else model.others
            warn(f"{lora.file}: {count} layers of the {part} are left out, {why}")
    for (part, module), found in taken.items():
        _fill(arrays[part], module, found, slots[part])
    for name, found_slots in slots.items():
        if said := _clipping(found_slots.part, arrays[name]):
            warn(said)
    return arrays


def _clipping(part: Part, arrays: Mapping[str, Array]) -> str:
    """Say where updates are so large that quantized activations are clipped; "" where none is."""
    shares = {
        module: _norm(arrays[module + DOWN_INPUT], arrays[module + UP_INPUT]) / norm
        for module, norm in part.weight_norms.items()
        if module + DOWN_INPUT in arrays and norm > 0
    }
    large = {module: share for module, share in shares.items() if share > LARGE_UPDATE}
    if not large:
        return ""
    largest = max(large, key=lambda module: large[module])
    return (
        f"LoRAs change {len(large)} of {len(shares)} layers of the {part.name} by more than {LARGE_UPDATE:g} times "
        f"their weights' norm ('{largest}': {large[largest]:.2g}). Its quantized activations have ranges that were "
        "calibrated without LoRAs, and are clipped: give smaller scales, fuse them at the build (--lora), or build "
        "with weights alone quantized (allocate.schemes)."
    )


def _norm(a: Array, b: Array) -> float:
    """Return the Frobenius norm of B A, [out, in], without making it: its square is tr(BᵀB AAᵀ)."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(np.sqrt(max(0.0, np.sum((b.T @ b) * (a @ a.T)))))


def _check_part(update: Update, lora: LoraOption, model: SlottedModel) -> None:
    elsewhere = model.others is not None and update.part in PREFIXES.values()
    if update.part not in model.parts and not elsewhere:
        what = f"'{printable(update.name)}' in {lora.file} updates the {printable(update.part)}"
        raise ModelError(f"{what}, which {model.place} has not.", OTHER)


def _fitting(update: Update, lora: LoraOption, slots: _Slots) -> str:
    """Return the module of an update. Raises ModelError where there is none, or of another shape."""
    module, name = slots.module(update.key), printable(update.name)
    if module is None:
        raise ModelError(
            f"'{name}' in {lora.file} updates a layer for which the {update.part} has no slot.",
            OTHER,
        )
    _, width, out = slots.shapes(module)
    shape = [len(update.b), update.a.shape[1] // prod(update.kernel), *update.kernel]
    if plain_shape(shape) != [out, width]:
        raise ModelError(
            f"'{name}' in {lora.file} updates a weight of the shape {plain_shape(shape)}; in this {update.part} it has "
            f"[{out}, {width}].",
            "It was trained for another model: give one for this model.",
        )
    return module


def _fill(
    arrays: Mapping[str, Array],
    module: str,
    found: Sequence[tuple[LoraOption, Update]],
    slots: _Slots,
) -> None:
    """Write the updates of one module behind each other. Raises UsageError where they are too many."""
    rank, ranks = slots.shapes(module)[0], [len(update.a) for _, update in found]
    if sum(ranks) > rank:
        said = " + ".join(f"{one} of {lora.file.name}" for one, (lora, _) in zip(ranks, found))
        raise UsageError(
            f"'{module}' of the {slots.part.name} has a slot of rank {rank}, and is given {said}.",
            f"Build with --lora-slots {sum(ranks)}, give fewer, or fuse them at the build (--lora).",
        )
    start = 0
    for lora, update in found:
        end = start + len(update.a)
        with np.errstate(all="ignore"):
            a, b = _balanced(update.a, update.b)
            arrays[module + DOWN_INPUT][start:end] = a
            arrays[module + UP_INPUT][:, start:end] = b
        if not all(np.isfinite(arrays[module + one]).all() for one in (DOWN_INPUT, UP_INPUT)):
            raise ModelError(
                f"'{printable(update.name)}' in {lora.file} is beyond the range of FP16.",
                "Give a smaller scale, or another LoRA.",
            )
        start = end


def _balanced(a: Array, b: Array) -> tuple[Array, Array]:
    """Return both factors with ranges alike for each rank, by powers of two: FP16 loses small numbers."""
    down, up = np.abs(a).max(axis=1), np.abs(b).max(axis=0)
    both = (down > 0) & (up > 0)
    halves = np.zeros(len(a))
    halves[both] = np.rint(np.log2(up[both] / down[both]) / 2)
    factor = np.exp2(halves).astype(np.float32)
    return a * factor[:, None], b / factor


def updates_in(lora: LoraOption, denoiser: str) -> Iterator[Update]:
    """Yield the updates in a file. Raises ModelError for tensors that make none."""
    path = lora.file
    check_lora(path)
    tensors, metadata = read_tensors(path)
    settings, left = peft_settings(metadata, path), dict(tensors)
    for name, a in tensors.items():
        found = DOWN.search(name)
        if found is None:
            continue
        stem, b = name[: found.start()].removesuffix("."), left.pop(up_of(name), None)
        alpha = left.pop(f"{stem}.alpha", None)
        del left[name]
        if b is None or not _pairs(a, b) or (alpha is not None and alpha.size != 1):
            raise ModelError(
                f"'{printable(name)}' in {path} is not one of a pair of LoRA matrices.", DAMAGED
            )
        part, key, layer = _place(stem, denoiser)
        rank = len(a)
        scale = (
            peft_scale(settings, part, layer, rank, path) if alpha is None else alpha.item() / rank
        )
        with np.errstate(over="ignore"):
            b = b.reshape(len(b), rank) * np.float32(lora.scale * scale)
        yield Update(name, part, key, a.reshape(rank, -1), b, a.shape[2:])
    if left:
        raise ModelError(
            f"'{printable(next(iter(left)))}' in {path} is no part of a LoRA's update.", DAMAGED
        )


def _pairs(a: Array, b: Array) -> bool:
    whole = a.ndim > 1 and b.ndim > 1 and a.size > 0
    return whole and len(a) == b.shape[1] and b.size == len(b) * len(a)


def _place(stem: str, denoiser: str) -> tuple[str, str, str]:
    """Return the part that a name is of, its key there, and the layer as peft names it."""
    kohya = KOHYA.fullmatch(stem)
    if kohya is not None:
        return PREFIXES.get(kohya[1], denoiser), kohya[2].removeprefix("text_model_"), ""
    part, _, layer = stem.partition(".")
    if part not in ("unet", "transformer", *PREFIXES.values()):
        # What a module's own save_lora_adapter wrote.
        part, layer = denoiser, stem
    # Of "to_q_lora.down" the stem is "to_q_".
    layer = re.sub(r"\.processor\.(to_\w+?)_$", r".\1", layer).removesuffix(".lora_linear_layer")
    layer += ".0" if layer.endswith(".to_out") else ""
    return part, _key(layer), layer


def read_tensors(path: Path) -> tuple[dict[str, Array], dict[str, str]]:
    """Return a LoRA file's tensors in float32, and what its header says beside them.

    Raises ModelError for a file that is damaged, holds NaN or infinity, or is no LoRA.
    """
    with open_input(path, error=ModelError, hint=DAMAGED) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= min(size - 8, HEADER_BYTES):
            raise ModelError(f"The LoRA {path} cannot be read: it has no header.", DAMAGED)
        text = decoded(file.read(length), str(path), error=ModelError, hint=DAMAGED)
        header = parse_json(text, str(path), error=ModelError, hint=DAMAGED)
        try:
            metadata = {str(k): str(v) for k, v in header.pop("__metadata__", {}).items()}
            check_names({name: str(one["dtype"]) for name, one in header.items()}, path)
            start = 8 + length
            tensors = {name: _tensor(file, start, size, one) for name, one in header.items()}
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            what = printable(str(error)[:200])
            raise ModelError(f"The LoRA {path} cannot be read: {what}.", DAMAGED) from error
    for name, values in tensors.items():
        wrong = int((~np.isfinite(values)).sum())
        if wrong:
            raise ModelError(
                f"'{printable(name)}' in {path} holds {wrong:,} values that are NaN or infinite.",
                "The file is damaged, or its training diverged: use another.",
            )
    return tensors, metadata


def _tensor(file: BinaryIO, start: int, size: int, described: Mapping[str, Any]) -> Array:
    """Read one tensor. Raises ValueError where its place is not in the file, or not of its size."""
    kind, (first, last) = np.dtype(TYPES[described["dtype"]]), described["data_offsets"]
    shape = tuple(int(one) for one in described["shape"])
    if any(one < 0 for one in shape) or not 0 <= first <= last <= size - start:
        raise ValueError("a tensor lies outside of it")
    if last - first != kind.itemsize * prod(shape):
        raise ValueError("a tensor has another size than its shape")
    file.seek(start + first)
    values = np.frombuffer(file.read(last - first), kind)
    if described["dtype"] == "BF16":
        values = (values.astype(np.uint32) << 16).view(np.float32)
    with np.errstate(over="ignore"):
        return values.astype(np.float32).reshape(shape)
