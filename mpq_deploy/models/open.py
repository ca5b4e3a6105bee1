"""Open a denoiser from what the user names: a bundled demo, a folder, a hub id or an ONNX file."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from mpq_deploy.errors import MissingDependencyError, ModelError, UsageError
from mpq_deploy.models.additions import DENOISERS, Additions
from mpq_deploy.models.denoiser import Denoiser
from mpq_deploy.models.locate import DEMOS, locate
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
    try:
        return _open(path, source, additions, talk)
    except ValidationError as error:
        # What the model's files say of it, put together, is no denoiser.
        raise ModelError(f"{path}: {first_error(error)}.", "Correct its configuration.") from error


def _open(path: Path, source: str | Path | None, additions: Additions, talk: Talk) -> Denoiser:
    if path.is_dir():
        name = f"bundled:{path.name}" if source is None or str(source) in DEMOS else str(source)
        return _open_folder(path, name, additions, talk)
    if additions.component is not None:
        raise UsageError(
            f"{path} is an ONNX file, which has no component '{additions.component}'.",
            "Give a pipeline folder.",
        )
    from mpq_deploy.models.onnx_file import open_onnx

    return open_onnx(path, str(source), additions, talk)


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
    files = ("conditions", "scheduler", "prompts", "description", "call")
    additions = Additions(
        guidance_scale=recipe.guidance_scale,
        component=recipe.component,
        component_samples=recipe.component_samples,
        **{name: Path(value) for name in files if (value := getattr(recipe, name))},
    )
    return open_denoiser(recipe.model, additions, talk)
