"""The stage recover: the plan's graphs, trained towards the float model."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from mpq_deploy.errors import MissingDependencyError
from mpq_deploy.formats.scheme import SCHEMES
from mpq_deploy.graph.dialects import dialect_named
from mpq_deploy.graph.writers.plan_graphs import write_plan
from mpq_deploy.recover.training_trajectories import TrajectoryRecorder
from mpq_deploy.rounding.candidate_store import iterate_candidates
from mpq_deploy.run.stage import Stage, settings, version_of
from mpq_deploy.stages.quantize import check_deployed, slot_fields
from mpq_deploy.system.files import Fields, canonical_json

if TYPE_CHECKING:
    from mpq_deploy.recover.recover import RecoverTask
    from mpq_deploy.run.view import Run

# Raised with every change of what training does.
RECOVER_FORMAT = 3
# State of unfinished training, beside the stage's folder, which appears only when complete.
CHECKPOINT = "recover.checkpoint"


def inputs(run: Run) -> Fields:
    """Return the settings and versions that the stage depends on, beside the stages it reads."""
    return {
        "recover.format": RECOVER_FORMAT,
        "dialect": run.target.dialect,
        **slot_fields(run),
        **settings(run.recipe.recover, "recover"),
        "recipe.calibrate.steps": run.recipe.calibrate.steps,
        "recipe.evaluate.sampler": run.recipe.evaluate.sampler,
        **version_of("torch", "onnx", "onnx-ir", "onnxruntime", "numpy"),
    }


def make(run: Run, folder: Path) -> str:
    """Make the stage in ``folder``; return a few words for the log."""
    if importlib.util.find_spec("torch") is None:
        raise MissingDependencyError("torch", "torch", "Recovering quality by training")
    from mpq_deploy.recover.recover import recover, write_recovered

    plan = run.plan
    task = recover_task(run, plan.schemes)
    steps, sampler = run.recipe.calibrate.steps, run.recipe.evaluate.sampler
    recorder = TrajectoryRecorder(run.exported.model, steps, sampler)
    checkpoint = run.path / CHECKPOINT
    key = hashlib.sha256(canonical_json(STAGE.fields(run)).encode()).hexdigest()
    recovered = recover(task, run.recipe.recover, recorder, run.talk, checkpoint, key)
    recovery = recovered.recovery
    if recovery.improved:
        written = write_recovered(task, recovered, folder, dialect_named(run.target.dialect))
    else:
        written = write_plan(run, plan.schemes, folder)
    check_deployed(run, folder, written)
    recovery.save(folder)
    checkpoint.unlink(missing_ok=True)
    return recovery.summary()


def recover_task(run: Run, schemes: dict[str, str]) -> RecoverTask:
    """Gather what training starts from: the codes that ``schemes`` (layer -> scheme) deploy."""
    from mpq_deploy.recover.recover import RecoverTask
    from mpq_deploy.recover.trained_weights import StartingWeight

    exported = run.exported
    calibration = run.calibration
    starts = []
    for candidates in iterate_candidates(run.stage("candidates"), exported.graph):
        scheme = SCHEMES[schemes[candidates.layer.name]]
        matrix = candidates.forms.get(scheme.weight_form)
        starts.append(StartingWeight(candidates.layer, scheme, matrix, candidates.weight))
    return RecoverTask(exported.path, exported.graph, exported.spec, starts, *calibration)


STAGE = Stage(
    "recover",
    make,
    inputs,
    reads=("export", "calibrate", "candidates", "allocate"),
    after=("quantize",),
    applies=lambda recipe: recipe.recover.steps > 0,
)
