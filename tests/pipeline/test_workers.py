"""Builds over several processes: every stage has the bytes of a build in one."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from mpq_deploy.pipeline import open_pipeline
from mpq_deploy.shards.processes import Processes
from tests.pipeline.runs import Built, Notes, recipe_for, stage_bytes


def build_over(crew: object, model: Path, run: Path, **changes: object) -> list[str]:
    notes = Notes()
    with open_pipeline(recipe_for(model, **changes), run, notes, crew) as pipeline:
        pipeline.run_until("report")
    return notes.lines


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_a_build_has_the_same_bytes_over_any_number_of_workers(
    model: Path, finished: Built, tmp_path: Path, workers: int
) -> None:
    said = build_over(Processes(workers), model, tmp_path / "run")
    assert stage_bytes(tmp_path / "run") == stage_bytes(finished.run)
    for name in ("calibration", "probes", "evaluation"):
        assert any(line.startswith(f"  {name} on {workers} worker") for line in said), said
    assert not (tmp_path / "run" / ".shards").exists()
