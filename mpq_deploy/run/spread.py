"""What stages need to spread their work over workers: a run folder as workers open it, and where results are kept."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mpq_deploy.evaluate.cache import SampleCache
    from mpq_deploy.run.view import Run

# Under the run folder: finished shards of a stage that is not finished.
KEPT = ".shards"
# The samples of models, by content.
SAMPLES = ".samples"


def kept_shards(run: Run, stage: str) -> SampleCache:
    """Return where the finished shards of ``stage`` are kept until all are."""
    from mpq_deploy.evaluate.cache import SampleCache

    return SampleCache(run.path / KEPT / stage, run.talk)


def forget_shards(run: Run, stage: str) -> None:
    """Remove what ``kept_shards`` kept: the stage is finished."""
    kept = run.path / KEPT
    shutil.rmtree(kept / stage, ignore_errors=True)
    if kept.is_dir() and not any(kept.iterdir()):
        kept.rmdir()
