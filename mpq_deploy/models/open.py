"""Open a denoiser from what the user names: a bundled demo, a folder, a hub id or an ONNX file."""

from __future__ import annotations

import atexit
import importlib.util
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from mpq_deploy.errors import MissingDependencyError, ModelError, UsageError
from mpq_deploy.models.additions import CONFIG, DENOISERS, Additions, denoiser_part, read_json
from mpq_deploy.models.denoiser import Denoiser
from mpq_deploy.models.locate import DEMOS, SINGLE_FILE, folder_files, locate
from mpq_deploy.models.lora_option import parse_lora
from mpq_deploy.models.sample_sizes import with_sizes
from mpq_deploy.models.weight_files import STEMS, find_weights, stored_weights
from mpq_deploy.models.weight_kinds import refuse_quantized_config, refuse_weights
from mpq_deploy.system.hub_cache import refuse_links_out
from mpq_deploy.system.progress import Talk
from mpq_deploy.system.validated import first_error

if TYPE_CHECKING:
    from mpq_deploy.recipe import Recipe


def open_denoiser(
    source: str | Path | None = None, additions: Additions | None = None, talk: Talk | None = None
) -> Denoiser:
    """Open the denoiser that ``source`` names (see ``locate``), with the user's ``additions``.

    Raises UsageError for an absent or incomplete model, ModelError for an unreadable one.
    """
    talk, additions = talk or Talk(), additions or Additions()
    path = locate(source, talk)
    if additions.config is not None and path.suffix != SINGLE_FILE:
        raise UsageError(
            f"{path} has its own configuration, so --config does not apply.",
            "--config is for a checkpoint in one file (.safetensors).",
        )
    try:
        denoiser = _open(path, source, additions, talk)
        return with_sizes(denoiser, additions.sizes, path) if additions.sizes else denoiser
    except ValidationError as error:
        # What the model's files say of it, put together, is not a denoiser.
        raise ModelError(f"{path}: {first_error(error)}.", "Correct its configuration.") from error


def _open(path: Path, source: str | Path | None, additions: Additions, talk: Talk) -> Denoiser:
    if path.is_dir():
        name = f"bundled:{path.name}" if source is None or str(source) in DEMOS else str(source)
        return _open_folder(path, name, additions, talk)
    if additions.component not in (None, path.parent.name):
        raise UsageError(
            f"{path} is an ONNX file, which has no component '{additions.component}'.",
            "Give a pipeline folder.",
        )
    if path.suffix == SINGLE_FILE:
        given = additions.conditions is not None
        folder, note = model_folder(path, additions.config, additions.unpacked, talk, given)
        denoiser = _open_folder(folder, str(source), replace(additions, config=None), talk)
        return replace(denoiser, notes=(note, *denoiser.notes))
    if additions.loras:
        raise UsageError(
            f"{path} is an ONNX file; LoRAs cannot be fused into it.",
            "Fuse it before the export to ONNX, or give the diffusers folder that the file was made from.",
        )
    from mpq_deploy.models.onnx_file import open_onnx

    return open_onnx(path, str(source), additions, talk)


def model_folder(
    path: Path, config: Path | None, place: Path | None, talk: Talk, lone: bool = False
) -> tuple[Path, str]:
    """Return the folder of a model that ``locate`` found, and a note; a checkpoint is written as one.

    ``place``: where to write it; ``lone``: a denoiser alone will do. Raises as ``single_file.unpack``.
    """
    if path.suffix != SINGLE_FILE:
        return path, ""
    _require_diffusers("Opening a checkpoint")
    from mpq_deploy.models.single_file import unpack

    if place is None:
        place = Path(tempfile.mkdtemp(prefix="mpq-deploy-"))
        atexit.register(shutil.rmtree, place, ignore_errors=True)
    return unpack(path, config, place, talk, lone)


def _require_diffusers(purpose: str) -> None:
    for package in ("torch", "diffusers"):
        if importlib.util.find_spec(package) is None:
            raise MissingDependencyError(package, "torch", purpose)


def look_at_weights(folder: Path, component: str | None) -> None:
    """Raise ModelError for quantized weights and unmerged adapters, by headers alone.

    Folders that cannot be opened for other reasons pass: whoever opens them says why.
    """
    part = denoiser_part(folder, component)
    if part is None:
        return
    refuse_quantized_config(read_json(part / CONFIG), part / CONFIG)
    for stem in STEMS:
        if any(part.glob(f"{stem}*.safetensors*")):
            stored = stored_weights(part, stem, find_weights(part, stem))
            refuse_weights(stored.types, part)


def _open_folder(folder: Path, source: str, additions: Additions, talk: Talk) -> Denoiser:
    refuse_links_out(path for _, path in folder_files(folder))
    look_at_weights(folder, additions.component)
    _require_diffusers("Opening a diffusers folder")
    component = additions.component
    if component is not None and component not in DENOISERS and not _denoises(folder / component):
        from mpq_deploy.models.component import open_component

        return open_component(folder, source, additions, talk)
    from mpq_deploy.models.pipeline_folder import open_folder

    denoiser = open_folder(folder, source, additions, talk)
    chosen = denoiser_part(folder, additions.component)
    average = f"{chosen.name}_ema" if chosen is not None else ""
    if additions.component is not None or not (folder / average / CONFIG).is_file():
        return denoiser
    note = (
        f"{average}, the average of training, is also in the folder; use it with --only {average}"
    )
    talk.line(f"  {note}")
    return replace(denoiser, notes=(*denoiser.notes, note))


def _denoises(part: Path) -> bool:
    """Whether a part of a pipeline takes a sample and a timestep: a prior, a second transformer."""
    import diffusers

    from mpq_deploy.models.transformer import signature_of

    name = read_json(part / CONFIG).get("_class_name") if (part / CONFIG).is_file() else None
    found = (
        getattr(diffusers, name, None) if isinstance(name, str) and name.isidentifier() else None
    )
    model = isinstance(found, type) and issubclass(found, diffusers.ModelMixin)
    return model and signature_of(found) is not None


def source_denoiser(recipe: Recipe, talk: Talk, unpacked: Path | None = None) -> Denoiser:
    """Open the model that ``recipe`` names; ``unpacked``: where a checkpoint is written as a folder."""
    return open_denoiser(recipe.model, additions_of(recipe, unpacked), talk)


def additions_of(recipe: Recipe, unpacked: Path | None = None) -> Additions:
    """Return what ``recipe`` gives beside its model."""
    files = ("conditions", "scheduler", "prompts", "description", "call", "calls", "config")
    return Additions(
        guidance_scale=recipe.guidance_scale,
        component=recipe.component,
        component_samples=recipe.component_samples,
        component_steps=recipe.calibrate.steps,
        sizes=recipe.sizes,
        loras=tuple(map(parse_lora, recipe.lora)),
        unpacked=unpacked,
        **{name: Path(value) for name in files if (value := getattr(recipe, name))},
    )
