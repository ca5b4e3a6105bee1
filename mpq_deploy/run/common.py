"""What several stages need: an opened export, recorded calls, and fields for the digests of their inputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpq_deploy.calibrate.stats import CalibrationSet, CalibrationStats
from mpq_deploy.errors import UsageError
from mpq_deploy.graph.layers import LayerGraph, layer_graph
from mpq_deploy.graph.load import load_model
from mpq_deploy.models.spec import Array
from mpq_deploy.run.folder import Fields, canonical_json, file_digest
from mpq_deploy.system.release import __version__

if TYPE_CHECKING:
    from mpq_deploy.recipe import Recipe
    from mpq_deploy.run.pipeline import Pipeline


# What orm is reported beside, at the same budget: the same programme without any ORM.
ORM_CONTROLS = ("size-only", "random")


def version_of(*packages: str) -> Fields:
    """Return ``version.NAME`` for each installed package, and this tool's own version."""
    from importlib.metadata import PackageNotFoundError, version

    found: Fields = {"version.mpq-deploy": __version__}
    for package in packages:
        try:
            found[f"version.{package}"] = version(package)
        except PackageNotFoundError:
            found[f"version.{package}"] = None
    return found


def settings(section: Any, prefix: str) -> Fields:
    """Return a recipe section as flat fields ``recipe.PREFIX.KEY``."""
    return {f"recipe.{prefix}.{key}": value for key, value in section.model_dump(mode="json").items()}


def path_digest(path: Path) -> str:
    """Digest of a file, or of a folder's files by name. Raises UsageError when there is none."""
    if path.is_file():
        return file_digest(path)
    if path.is_dir():
        return canonical_json({p.name: file_digest(p) for p in sorted(path.iterdir()) if p.is_file()})
    raise UsageError(f"There is no file {path}.", "Check the path.")


class Exported:
    """The export stage, opened: graph, specification, conditions."""

    def __init__(self, pipeline: Pipeline) -> None:
        from mpq_deploy.models.export import load_exported

        self.folder = pipeline.folder("export")
        exported = load_exported(self.folder)
        self.path = exported.model
        self.spec = exported.spec
        self.conditions: dict[str, Array] = dict(exported.conditions.arrays)
        self.facts: dict[str, Any] = json.loads((self.folder / "facts.json").read_text(encoding="utf-8"))
        self.graph: LayerGraph = layer_graph(load_model(self.path))


def load_calibration(pipeline: Pipeline) -> tuple[CalibrationSet, CalibrationStats]:
    """Read the calibrate stage."""
    folder = pipeline.folder("calibrate")
    return CalibrationSet.load(folder / "inputs.npz"), CalibrationStats.load(folder / "stats.npz")


def deployed_stage(pipeline: Pipeline) -> str:
    """Return the stage whose graphs are deployed and compared: recover where the recipe wants it, else quantize."""
    return "recover" if pipeline.recipe.recover.steps else "quantize"


def weighs_bits(recipe: Recipe) -> bool:
    """Whether the recipe's method weighs bits by importance: orm, one of its controls, or kurtosis."""
    return recipe.measure.method in ("orm", "kurtosis", *ORM_CONTROLS)
