"""Open a denoiser from whatever the user names: a bundled demo, a folder, a hub id or an ONNX file."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from mpq_deploy.errors import MissingDependencyError, ModelError, UsageError, nearest
from mpq_deploy.models.additions import DENOISERS, Additions
from mpq_deploy.models.bundled import DEMOS, bundled_demo
from mpq_deploy.models.denoiser import Denoiser
from mpq_deploy.models.hub import PARTS, PICKLE_ENDINGS, fetch, is_hub_id
from mpq_deploy.system.progress import Talk

if TYPE_CHECKING:
    from mpq_deploy.recipe import Recipe

# Files of a diffusers folder that are read: configurations, weights, tokenizers.
SOURCE_ENDINGS = (".json", ".safetensors", ".txt", ".model")


def open_denoiser(
    source: str | Path | None = None,
    *,
    conditions: Path | None = None,
    scheduler: Path | None = None,
    prompts: Path | None = None,
    guidance_scale: float | None = None,
    description: Path | None = None,
    component: str | None = None,
    component_samples: int = 64,
    talk: Talk | None = None,
) -> Denoiser:
    """Open the denoiser that ``source`` names.

    ``source``: None, ``emoji`` or ``digits`` (bundled); a diffusers pipeline or UNet folder; an ONNX file with a
    YAML beside it (or at ``description``); a hub id. ``component``: a part of a pipeline folder, such as ``vae``, which
    gets ``component_samples`` inputs. ``conditions``, ``scheduler``, ``prompts`` and
    ``guidance_scale`` replace or add to what the model brings.
    Raises UsageError when there is no such model or something is missing, ModelError when it cannot be read.
    """
    talk = talk or Talk()
    additions = Additions(conditions, scheduler, prompts, guidance_scale, description, component, component_samples)
    if source is None or str(source) in DEMOS:
        folder = bundled_demo(None if source is None else str(source))
        return _open_folder(folder, f"bundled:{folder.name}", additions, talk)
    path = locate(source, talk)
    if path.is_dir():
        return _open_folder(path, str(source), additions, talk)
    if component is not None:
        raise UsageError(f"{path} is an ONNX file, which has no component '{component}'.", "Give a pipeline folder.")
    from mpq_deploy.models.onnx_file import open_onnx

    return open_onnx(path, str(source), additions, talk)


def locate(source: str | Path | None, talk: Talk | None = None) -> Path:
    """Return the folder or ONNX file of ``source``; a hub id is fetched.

    Raises UsageError when there is none, ModelError for a file that is a pickle or no ONNX by its name.
    """
    if source is None or str(source) in DEMOS:
        return bundled_demo(None if source is None else str(source))
    path = Path(source)
    # Path("") is the current folder, which nobody named.
    if source != "" and (path.is_dir() or (path.suffix == ".onnx" and path.is_file())):
        return path
    if path.is_file():
        raise ModelError(
            f"{path} is a file, but no .onnx file.",
            "Pickled checkpoints are refused, because loading them runs their code: load the model in diffusers where "
            "you trust it and write it with save_pretrained(FOLDER, safe_serialization=True), then give the folder."
            if path.suffix in PICKLE_ENDINGS
            else "Give a diffusers folder or an .onnx file.",
        )
    if is_hub_id(str(source)) and path.suffix not in (".onnx", *PICKLE_ENDINGS):
        return fetch(str(source), talk or Talk())
    raise UsageError(
        f"There is no model '{source}'.",
        f"{nearest(str(source), DEMOS)}Give a diffusers folder, an .onnx file, a hub id (org/name), or one of the "
        f"bundled models: {', '.join(DEMOS)}.",
    )


def source_files(source: str | Path | None, description: Path | None = None) -> list[tuple[str, Path]]:
    """Return the files that decide what ``open_denoiser(source)`` gives, as (name within the model, path), sorted.

    For an ONNX file: itself, its external data, its YAML and the scheduler that this names.
    """
    path = locate(source)
    if path.is_dir():
        folders = [path, *(path / part for part in PARTS if (path / part).is_dir())]
        files = {p for folder in folders for p in folder.iterdir() if p.suffix in SOURCE_ENDINGS and p.is_file()}
        return sorted((p.relative_to(path).as_posix(), p) for p in files)
    from mpq_deploy.graph.load import external_files, read_proto
    from mpq_deploy.models.onnx_file import description_path, read_description

    yaml_path = description_path(path, description)
    files = {path, yaml_path, *external_files(read_proto(path), path)}
    scheduler = read_description(yaml_path).scheduler
    if isinstance(scheduler, str) and (yaml_path.parent / scheduler).is_file():
        files.add(yaml_path.parent / scheduler)
    return sorted((p.name, p) for p in files)


def _open_folder(folder: Path, source: str, additions: Additions, talk: Talk) -> Denoiser:
    for package in ("torch", "diffusers"):
        if importlib.util.find_spec(package) is None:
            raise MissingDependencyError(package, "torch", "Opening a diffusers folder")
    if additions.component is not None and additions.component not in DENOISERS:
        from mpq_deploy.models.component import open_component

        return open_component(folder, source, additions, talk)
    from mpq_deploy.models.pipeline_folder import open_folder

    return open_folder(folder, source, additions, talk)


def source_denoiser(recipe: Recipe, talk: Talk) -> Denoiser:
    """Open the model that ``recipe`` names."""
    return open_denoiser(
        recipe.model,
        conditions=Path(recipe.conditions) if recipe.conditions else None,
        scheduler=Path(recipe.scheduler) if recipe.scheduler else None,
        prompts=Path(recipe.prompts) if recipe.prompts else None,
        description=Path(recipe.description) if recipe.description else None,
        guidance_scale=recipe.guidance_scale,
        component=recipe.component,
        component_samples=recipe.component_samples,
        talk=talk,
    )
