"""Tiny models and recipes with which a whole build takes seconds, and ways to run them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mpq_deploy.recipe import AllocateSettings, Recipe, load_recipe, recipe_over
from mpq_deploy.run.pipeline import open_pipeline
from mpq_deploy.system.progress import Talk
from tests.graphs import GraphBuilder, denoiser_graph
from tests.tiny_models import tiny_scheduler

# The stages whose folders are digested, in order.
DIGESTED = (
    "export",
    "calibrate",
    "candidates",
    "measure",
    "allocate",
    "quantize",
    "controls",
    "engine",
    "evaluate",
)
# One scheme of each family, one kind of branch and of ranges: what there is to choose from takes most of a tiny build.
RECIPE: dict[str, Any] = {
    "budget": 0.4,
    "allocate": {
        "schemes": ["fp16", "w8a8", "w8a16", "w4a16-b32", "w4a8-b32"],
        "branches": ["rows"],
        "ranges": ["timestep"],
    },
    "calibrate": {"timesteps": 2, "samples": 4, "steps": 4, "batch_size": 4, "reservoir": 256},
    "measure": {"probes": 2, "samples": 2, "batch_size": 2},
    "quantize": {"hessian_rows": 64},
    "engine": {"build": False},
    "evaluate": {"samples": 2, "steps": 3, "timesteps": 2, "batch_size": 2},
}
# Two widths beside FP16 and no branches, for tests of what does not depend on the choices.
FEW_SCHEMES: dict[str, Any] = {
    "allocate__schemes": ["fp16", "w8a8", "w4a16-b32"],
    "allocate__branches": [],
}
# All that a layer may take where a recipe says nothing.
EVERY_SCHEME: dict[str, Any] = {
    f"allocate__{name}": list(AllocateSettings.model_fields[name].default)
    for name in ("schemes", "branches", "ranges")
}


class Notes(Talk):
    """Keeps every line that a stage says."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)

    def warn(self, text: str) -> None:
        self.lines.append(f"warning: {text}")


def save_denoiser(folder: Path, graph: GraphBuilder | None = None, **entries: Any) -> Path:
    """Write ``model.onnx`` (by default the tiny denoiser) and its YAML; ``entries`` replace those of the YAML."""
    path = (graph or denoiser_graph(channels=16, size=8)).save(folder / "model.onnx")
    return describe(path, **entries)


def describe(path: Path, **entries: Any) -> Path:
    """Write the YAML beside an ONNX file and return the file's path."""
    described: dict[str, Any] = {
        "sample": "sample",
        "timestep": "timestep",
        "prediction_type": "epsilon",
    }
    described |= {"scheduler": tiny_scheduler(), "pixel_range": [-1, 1], **entries}
    path.with_suffix(".yaml").write_text(yaml.safe_dump(described), encoding="utf-8")
    return path


def write_recipe(path: Path, **changes: Any) -> Path:
    """Write the tiny recipe; ``changes`` by dotted key with ``__`` for the dot."""
    values = json.loads(json.dumps(RECIPE))
    for dotted, value in changes.items():
        place = values
        *parents, last = dotted.split("__")
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def recipe_for(model: Path | str, **changes: Any) -> Recipe:
    """The tiny recipe for ``model``."""
    overrides = {key.replace("__", "."): value for key, value in changes.items()}
    values = json.loads(json.dumps(RECIPE))
    return recipe_over(values, {"model": str(model), **overrides}, "recipe.yaml")


@dataclass(frozen=True)
class Built:
    """A run folder after a call, what was made in this call, what was said, and the report."""

    run: Path
    made: list[str]
    said: list[str]
    report: dict[str, Any]


def build(recipe: Recipe, run: Path, last: str = "report") -> Built:
    """Run the pipeline in this process."""
    notes = Notes()
    with open_pipeline(recipe, run, notes) as pipeline:
        pipeline.run_until(last)
        made = [result.name for result in pipeline.results.values() if not result.cached]
    report = (
        json.loads((run / "report.json").read_text(encoding="utf-8"))
        if (run / "report.json").exists()
        else {}
    )
    return Built(run, made, notes.lines, report)


def environment(**more: str) -> dict[str, str]:
    """The environment for a child: one thread, no display."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", **more}


def command(*arguments: object) -> list[str]:
    """The command line of ``mpq-deploy``, run as users run it."""
    return [sys.executable, "-c", "from mpq_deploy.cli import main; main()", *map(str, arguments)]


def call(*arguments: object, **more: str) -> subprocess.CompletedProcess[str]:
    """Run ``mpq-deploy`` in a child."""
    return subprocess.run(
        command(*arguments),
        capture_output=True,
        encoding="utf-8",
        env=environment(**more),
        timeout=300,
    )


def children_of(parent: int, module: str) -> list[int]:
    """The processes that ``parent`` started to run a module of the package."""
    found = []
    for place in Path("/proc").iterdir():
        try:
            status, line = (
                (place / "status").read_text(encoding="utf-8"),
                (place / "cmdline").read_bytes(),
            )
        except (OSError, ValueError):
            continue
        if f"PPid:\t{parent}\n" in status and module.encode() in line:
            found.append(int(place.name))
    return found


def stage_bytes(run: Path, stages: tuple[str, ...] = DIGESTED) -> dict[str, bytes]:
    """Every file of the stage folders."""
    files = [p for stage in stages for p in sorted((run / stage).rglob("*")) if p.is_file()]
    return {p.relative_to(run).as_posix(): p.read_bytes() for p in files}


def tiny_whole_run(place: Path) -> None:
    """A pipeline with a text encoder in ``place``, and its run up to its graphs in ``run``, planned for RTX."""
    from mpq_deploy.models.pipeline_parts import whole_parts
    from mpq_deploy.run.several_parts import build_whole
    from tests.tiny_models import ONE_LEVEL, tiny_text_pipeline_folder

    folder = tiny_text_pipeline_folder(place, **ONE_LEVEL)
    (place / "prompts.txt").write_text("abc\ndef\nghi\njkl\n", encoding="utf-8")
    given = {"target": "rtx", "prompts": str(place / "prompts.txt"), "component_samples": 8}
    settings = recipe_for(folder, **{**FEW_SCHEMES, **given, "budget": 0.6})
    parts = whole_parts(settings)
    assert parts is not None
    build_whole(settings, place / "run", parts, "allocate", Talk())
    for name in parts.names:
        own = place / "run" / "components" / name
        with open_pipeline(load_recipe(own / "recipe.yaml"), own, Talk()) as part:
            part.deployed()
