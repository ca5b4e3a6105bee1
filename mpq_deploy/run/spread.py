"""What stages need to spread their work over workers: a run folder as workers open it, and where results are kept."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from mpq_deploy.run.folder import RunFolder
from mpq_deploy.system.progress import Talk

if TYPE_CHECKING:
    from mpq_deploy.evaluate.cache import SampleCache
    from mpq_deploy.run.pipeline import Pipeline

# Under the run folder: finished shards of a stage that is not finished.
KEPT = ".shards"
# The samples of models, by content.
SAMPLES = ".samples"
# What the description of a run consists of, beside its stages.
RECIPE = "recipe.yaml"


def opened_run(root: Path, talk: Talk) -> Pipeline:
    """Return the run folder ``root`` (or a copy of its stages) as a worker reads it: without its lock."""
    from mpq_deploy.recipe import load_recipe
    from mpq_deploy.run.pipeline import Pipeline

    return Pipeline(RunFolder(root), load_recipe(root / RECIPE), talk)


def kept_shards(pipeline: Pipeline, stage: str) -> SampleCache:
    """Return where the finished shards of ``stage`` are kept until all are."""
    from mpq_deploy.evaluate.cache import SampleCache

    return SampleCache(pipeline.run.path / KEPT / stage, pipeline.talk)


def forget_shards(pipeline: Pipeline, stage: str) -> None:
    """Remove what ``kept_shards`` kept: the stage is finished."""
    kept = pipeline.run.path / KEPT
    shutil.rmtree(kept / stage, ignore_errors=True)
    if kept.is_dir() and not any(kept.iterdir()):
        kept.rmdir()
