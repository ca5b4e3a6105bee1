"""Builds that are killed: what runs in the child processes. A forked server has the imports, so each is quick."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from mpq_deploy.recipe import Recipe
from mpq_deploy.run.folder import RunFolder
from mpq_deploy.run.pipeline import STAGES
from tests.pipeline.runs import build

FORKED = multiprocessing.get_context("forkserver")
PRELOAD = ["mpq_deploy.run.pipeline", "mpq_deploy.sensitivity.probe", "mpq_deploy.runtime.ort"]
PRELOAD += ["mpq_deploy.report.write"]
PRELOAD += [
    "mpq_deploy.calibrate.calibrate",
    "mpq_deploy.evaluate.evaluate",
    "tests.pipeline.kills",
]


def die() -> None:
    """End at once: no handler runs, nothing is cleaned up."""
    os.kill(os.getpid(), signal.SIGKILL)


def kill_while_making(stage: str) -> None:
    """Die when the stage's files are written but not yet in place."""
    declared = STAGES[stage]

    def make_and_die(run: Any, folder: Path) -> str:
        # The report has no folder of its own: its files are in place at once.
        if stage != "report":
            declared.make(run, folder)
        die()
        return ""

    STAGES[stage] = replace(declared, make=make_and_die)


def kill_after(stage: str) -> None:
    """Die when the stage is in place, before its timing is kept."""
    save = RunFolder.save_timing

    def save_or_die(self: RunFolder, name: str, *rest: Any) -> None:
        if name == stage:
            die()
        save(self, name, *rest)

    RunFolder.save_timing = save_or_die  # type: ignore[method-assign]


def kill_in_session(stage: str) -> None:
    """Die when the stage has opened a session over the model's external weights."""
    from mpq_deploy.evaluate import evaluate
    from mpq_deploy.system import sessions

    opened, denoiser = sessions._session, evaluate.OrtDenoiser

    def open_and_die(*rest: Any) -> Any:
        opened(*rest)
        die()

    class DyingDenoiser(denoiser):  # type: ignore[misc, valid-type]
        def __init__(self, *rest: Any, **more: Any) -> None:
            super().__init__(*rest, **more)
            die()

    if stage == "evaluate":
        evaluate.OrtDenoiser = DyingDenoiser  # type: ignore[misc]
    else:
        sessions._session = open_and_die


def kill_between_renames(stage: str) -> None:
    """Die when the stage's old folder was moved away and the new one is not yet in its place."""
    rename = Path.replace

    def replace_or_die(self: Path, target: Path) -> Path:
        if Path(target).name == stage:
            die()
        return rename(self, target)

    Path.replace = replace_or_die  # type: ignore[method-assign]


def _child(
    recipe: Recipe, run: Path, prepare: Callable[[str], None] | None, stage: str, told: Path
) -> None:
    if prepare is not None:
        prepare(stage)
    told.write_text(json.dumps(build(recipe, run).made), encoding="utf-8")


def build_in_child(
    recipe: Recipe, run: Path, prepare: Callable[[str], None] | None = None, stage: str = ""
) -> tuple[int, list[str]]:
    """Build in a child; return its exit code (negative: the signal) and the stages that it made, when it ended."""
    FORKED.set_forkserver_preload(PRELOAD)
    told = run.with_name("made.json")
    told.unlink(missing_ok=True)
    process = FORKED.Process(target=_child, args=(recipe, run, prepare, stage, told))
    process.start()
    process.join(300)
    assert process.exitcode is not None, "the build does not end"
    return process.exitcode, json.loads(told.read_text(encoding="utf-8")) if told.exists() else []
