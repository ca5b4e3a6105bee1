"""Checks of an untrusted folder's weights, made before a class is created or any of them is loaded.

In: the folder of a diffusers or transformers model. Out: nothing, or a ModelError. A class is made
as its config.json says, and so could fill the memory or never end; the header of the weights says
how large it can be.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from mpq_deploy.errors import ModelError
from mpq_deploy.models.weight_kinds import (
    PICKLE_ENDINGS,
    refuse_quantized_config,
    refuse_weights,
)
from mpq_deploy.system.inputs import open_input, read_json_object
from mpq_deploy.system.names import path_inside, printable

CONFIG, SAFETENSORS, INDEX = "config.json", ".safetensors", ".safetensors.index.json"
# How the weights' files of diffusers and of transformers begin.
STEMS = ("diffusion_pytorch_model", "model")
AGAIN = "The file belongs to another config.json, or is damaged: download or save the model again."
DAMAGED = "The file is damaged or not safetensors: download or save it again."
# Numbers in a configuration up to this are taken as they are; larger ones must be a dimension of
# some weight (our choice: widths, heads, tokens of an image, steps of training).
USUAL_NUMBER = 16384
# Sides of images, latents and tables of positions: a table of their square is made in memory.
LARGEST_SIDE = 8192
# Text encoders note lengths and tokens that have no weight.
TEXT_NUMBER = 10_000_000
# A class may hold so many elements beside those of the file: buffers, tables.
SPARE_ELEMENTS = 64_000_000
_SIDES = re.compile(r"size|height|width|side|max_pos|seq")
_COUNTS = re.compile(r"num_layers|layers_per|num_blocks|depth|num_.*_layers|n_layers")


@dataclass(frozen=True)
class Stored:
    """The tensors of a folder's weights by name: shapes and types, from the headers of its files."""

    shapes: dict[str, tuple[int, ...]]
    types: dict[str, str]

    @property
    def elements(self) -> int:
        """Elements of all tensors."""
        return sum(prod(shape) for shape in self.shapes.values())

    @property
    def largest(self) -> int:
        """The largest dimension of all."""
        return max((size for shape in self.shapes.values() for size in shape), default=0)


def stored_weights(folder: Path, stem: str, variant: str | None) -> Stored:
    """Read the headers of ``folder``'s safetensors of that ``stem`` and ``variant``.

    Raises ModelError as ``weight_paths``, and for files that are damaged.
    """
    return read_headers(weight_paths(folder, stem, variant))


def read_headers(paths: Iterable[Path], hint: str = AGAIN) -> Stored:
    """Read the headers of safetensors. Raises ModelError (with ``hint``) for files that are damaged."""
    from safetensors import SafetensorError, safe_open

    shapes: dict[str, tuple[int, ...]] = {}
    types: dict[str, str] = {}
    for path in paths:
        open_input(path, error=ModelError, hint=hint).close()
        try:
            with safe_open(path, framework="numpy") as file:
                for name in file.keys():  # noqa: SIM118 (no mapping)
                    part = file.get_slice(name)
                    shapes[name], types[name] = tuple(part.get_shape()), str(part.get_dtype())
        except (SafetensorError, OSError, ValueError) as error:
            said = printable(str(error).splitlines()[0] if str(error) else "")
            raise ModelError(f"The weights in {path} cannot be read: {said}.", hint) from error
    return Stored(shapes, types)


def own_tensors(folder: Path, stem: str, variant: str | None) -> dict[str, Any]:
    """Return, in float32, the tensors that belong to a module itself and to none of its layers."""
    from safetensors import safe_open

    found: dict[str, Any] = {}
    for path in weight_paths(folder, stem, variant):
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if "." not in name]  # noqa: SIM118 (no mapping)
            found |= {name: file.get_tensor(name).float() for name in names}
    return found


def find_weights(folder: Path, stem: str) -> str | None:
    """Return the variant (such as ``fp16``; None: plain) of the safetensors in ``folder``.

    Raises ModelError when there are none; pickled weights are refused: loading runs their code.
    """
    parts = r"(-\d+-of-\d+)?"
    file = re.compile(
        rf"{re.escape(stem)}{parts}(\.([A-Za-z]\w*))?{parts}\.safetensors(\.index(\.([A-Za-z]\w*))?\.json)?"
    )
    found = [match for path in folder.iterdir() if (match := file.fullmatch(path.name))]
    variants = {match[3] or match[7] for match in found}
    if variants:
        return None if None in variants else sorted(variants)[0]
    pickled = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLE_ENDINGS)
    if pickled:
        raise ModelError(
            f"The weights in {folder} are pickled ({pickled[0]}), which is refused: loading them can run any code.",
            "If you trust the file, load the model with diffusers and save it again with "
            "save_pretrained(FOLDER, safe_serialization=True).",
        )
    raise ModelError(
        f"{folder} holds no weights ({stem}.safetensors).", "Copy the weights into the folder."
    )


def weight_paths(folder: Path, stem: str, variant: str | None) -> list[Path]:
    """Return the safetensors of that ``stem`` and ``variant``: one, or the parts that an index names.

    Raises ModelError for an index that names anything but safetensors in the folder, and for parts
    without an index.
    """
    named = f"{stem}.{variant}" if variant else stem
    indexes = [f"{named}{INDEX}", f"{stem}{SAFETENSORS}.index.{variant}.json"]
    index = next((folder / name for name in indexes if (folder / name).is_file()), None)
    if index is None:
        whole = folder / f"{named}{SAFETENSORS}"
        shards = sorted(folder.glob(f"{stem}*-of-*{SAFETENSORS}"))
        if shards and not whole.is_file():
            raise ModelError(
                f"{folder} holds parts of weights ({shards[0].name}) without their index.",
                f"Copy {indexes[-1] if variant else indexes[0]} into the folder.",
            )
        return [whole]
    parts = read_json_object(index, error=ModelError, hint=AGAIN).get("weight_map")
    if not isinstance(parts, dict) or not parts:
        raise ModelError(f"{index} has no weight_map.", AGAIN)
    files = set()
    for part in parts.values():
        if not isinstance(part, str) or not part.endswith(SAFETENSORS):
            raise ModelError(
                f"{index} names '{printable(str(part)[:80])}', which is not a safetensors file.",
                "Pickled weights are refused: loading them can run any code. Save the model again "
                "with safe_serialization=True.",
            )
        files.add(path_inside(folder, part, f"A file that {index} names", ModelError))
    return sorted(files)


def check_config(
    config: dict[str, Any], stored: Stored, folder: Path, *, usual: int = USUAL_NUMBER
) -> None:
    """Raise ModelError for a number of config.json that no weight of the file bears out.

    ``usual``: numbers up to this need no weight; text encoders note lengths without any.
    """
    numbers = max(usual, stored.largest)
    sides = max(LARGEST_SIDE, stored.largest) if usual == USUAL_NUMBER else numbers
    for place, value, count in _numbers(config):
        dimensions = f"the largest dimension of its weights is {stored.largest:,}"
        problem = ""
        if _COUNTS.search(place) and value > max(len(stored.shapes), 1):
            problem = f"the file has {len(stored.shapes):,} tensors"
        elif value > (sides if _SIDES.search(place) else numbers) or -value > numbers:
            problem = dimensions
        elif count > max(len(stored.shapes), 1024):
            problem = f"it is one of {count:,}"
        if problem:
            raise ModelError(
                f"{folder / CONFIG}: '{printable(place)}' is {value:,}, but {problem}.", AGAIN
            )


def refuse_unborne(folder: Path, stem: str, variant: str | None) -> None:
    """Check the weights' headers and the configuration of a transformers model. Raises ModelError."""
    config = read_json_object(folder / CONFIG, error=ModelError, hint=AGAIN)
    refuse_quantized_config(config, folder / CONFIG)
    stored = stored_weights(folder, stem, variant)
    refuse_weights(stored.types, folder)
    check_config(config, stored, folder, usual=TEXT_NUMBER)


def _numbers(values: Any, place: str = "", count: int = 1) -> Iterator[tuple[str, int, int]]:
    """Yield the whole numbers of a configuration: place, value, length of the list it is in."""
    if isinstance(values, dict):
        for key, one in values.items():
            if not str(key).startswith("_") and key not in _FREE:
                yield from _numbers(one, f"{place}.{key}" if place else str(key))
    elif isinstance(values, list):
        for one in values:
            yield from _numbers(one, place, len(values))
    elif isinstance(values, int) and not isinstance(values, bool):
        yield place, values, count


# What classes only note: ids of tokens, constants of formulas, how far an average of training was.
_FREE = frozenset({"rope_theta", "theta", "optimization_step", "update_after_step"})


def check_shapes(make: Callable[[], Any], stored: Stored, folder: Path) -> None:
    """Make the class without memory, and raise ModelError where a weight's shape is not the file's.

    ``make`` is called under torch's meta device. Tensors that the file lacks, or has beside, are
    told by whoever loads them, unless they would take much more memory than the file.
    """
    import torch

    try:
        with torch.device("meta"):
            made = make().state_dict()
    except NotImplementedError:
        # An operator without a meta kernel: loading compares the shapes, after allocating them.
        return
    expected = {name: tuple(tensor.shape) for name, tensor in made.items()}
    for name, shape in expected.items():
        if name in stored.shapes and stored.shapes[name] != shape:
            raise ModelError(
                f"'{name}' in the weights of {folder} has the shape {list(stored.shapes[name])}, "
                f"and {CONFIG} asks for {list(shape)}.",
                AGAIN,
            )
    elements = sum(prod(shape) for shape in expected.values())
    if elements > 2 * stored.elements + SPARE_ELEMENTS:
        raise ModelError(
            f"{folder / CONFIG} asks for {elements:,} weights; the file holds {stored.elements:,}.",
            AGAIN,
        )
