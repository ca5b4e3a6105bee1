"""Which parts of a pipeline's folder are built under one budget.

In: a recipe. Out: the parts' names in the order in which they are built, and which of them are
pinned to FP16; None where a run of one part is what the recipe asks for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpq_deploy.errors import UsageError, nearest
from mpq_deploy.models.additions import (
    CONFIG,
    DECODE,
    DENOISERS,
    LEFT_OUT,
    VAE,
    VAE_PARTS,
    denoiser_part,
    pipeline_index,
    place_of,
)
from mpq_deploy.models.call_file import pictures_of
from mpq_deploy.models.locate import locate

if TYPE_CHECKING:
    from mpq_deploy.recipe import Recipe

TEXT, ENCODER = "text_encoder", "vae_encoder"
CARD = "demo.json"


@dataclass(frozen=True)
class Parts:
    """The parts of the pipeline in ``folder`` that are built, ``pinned`` ones in FP16.

    ``where_called``: parts that nobody named, built where the pipeline calls them at all.
    """

    folder: Path
    class_name: str
    denoiser: str
    names: tuple[str, ...]
    pinned: frozenset[str]
    where_called: frozenset[str] = frozenset()


def whole_parts(recipe: Recipe) -> Parts | None:
    """Return the parts that share the recipe's budget; None where one part alone is built.

    That is so where the recipe names one, where its model is no folder of a whole pipeline (an ONNX
    file, a denoiser's folder, a checkpoint in one file, the bundled models), where ``conditions``
    stand in for the text, and where a pipeline has no text encoder. Raises UsageError for parts
    that the folder lacks, and for pinned ones that are not built.
    """
    listed = [name.strip() for name in (recipe.component or "").split(",") if name.strip()]
    folder = locate(recipe.model)
    index = pipeline_index(folder) if folder.is_dir() else {}
    found = None if len(listed) == 1 else _chosen(recipe, folder, index, listed)
    if found is None and (len(listed) > 1 or recipe.pinned):
        what = "parts" if len(listed) > 1 else "part to pin"
        shown = ",".join(listed if len(listed) > 1 else recipe.pinned)
        raise UsageError(
            f"One part of {folder} is built alone, so there is no {what} '{shown}'.",
            "Give the folder of a pipeline with text encoders, without --conditions.",
        )
    return found


def _chosen(
    recipe: Recipe, folder: Path, index: Mapping[str, Any], listed: Sequence[str]
) -> Parts | None:
    named = index.get("_class_name") not in (None, "DiffusionPipeline")
    if not named or recipe.conditions or (folder / CARD).is_file():
        return None
    texts = [name for name in index if name.startswith(TEXT) and _entry(index, name)]
    denoiser = denoiser_part(folder, None)
    if not texts or not (denoiser or any(_entry(index, name) for name in DENOISERS)):
        return None
    _check_whole(folder, index)
    assert denoiser is not None  # its folder was looked at above
    pictures = bool(recipe.call and pictures_of(Path(recipe.call)))
    decoders = [n for n in VAE_PARTS if pictures or VAE_PARTS[n] == DECODE]
    here = [*texts, denoiser.name, *(decoders if _entry(index, VAE) else [])]
    names = _expanded(listed, here, folder) or here
    pinned = _expanded(recipe.pinned, names, folder)
    order = tuple(name for name in here if name in names)
    # A ControlNet takes its pictures as they are, and embeddings take the place of texts.
    given = {*texts, ENCODER} & set(order) if pictures else set()
    unnamed = given - {*listed, *recipe.pinned}
    return Parts(
        *(folder, str(index["_class_name"]), denoiser.name, order),
        frozenset(pinned),
        frozenset(unnamed),
    )


def _entry(index: Mapping[str, Any], name: str) -> bool:
    entry = index.get(name)
    return isinstance(entry, list) and len(entry) == 2 and entry[0] is not None


def _check_whole(folder: Path, index: Mapping[str, Any]) -> None:
    """Raise UsageError for parts that the index names and the folder lacks, with what they would be."""
    absent = [
        f"{name} ({index[name][1]} of {index[name][0]})"
        for name in index
        if _entry(index, name)
        and name not in LEFT_OUT
        and not (folder / name / CONFIG if _weighs(name) else folder / name).exists()
    ]
    if absent:
        raise UsageError(
            f"The pipeline in {folder} lacks its {', '.join(absent)}.",
            "Download or save all of it; or build one part alone: --only unet, with --conditions FILE.npz.",
        )


def _weighs(name: str) -> bool:
    """Whether a part has weights, and so a configuration of its own."""
    return name in (*DENOISERS, VAE) or name.startswith(TEXT)


def _expanded(given: Sequence[str], known: Sequence[str], folder: Path) -> list[str]:
    """Return the parts that names stand for: ``vae`` for both of its own."""
    found: list[str] = []
    for name in given:
        own = [one for one in known if name in (one, place_of(one)[0])]
        if not own:
            raise UsageError(
                f"The pipeline in {folder} has no part '{name}' that is built.",
                f"{nearest(name, known)}Its parts: {', '.join(known)}.",
            )
        found.extend(own)
    return found
