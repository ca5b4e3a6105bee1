"""The stage recover: the plan's graphs with codes, scales and constants trained towards the float model."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from mpq_deploy.allocate.milp import PrecisionPlan
from mpq_deploy.engine.target import load_target
from mpq_deploy.errors import MissingDependencyError, MpqError
from mpq_deploy.formats.scheme import SCHEMES
from mpq_deploy.graph.dialect_check import check_dialect
from mpq_deploy.graph.dialects import dialect_named
from mpq_deploy.graph.writers.deployed_graphs import DEPLOYED
from mpq_deploy.run.common import Exported, load_calibration, settings, version_of
from mpq_deploy.run.folder import Fields, canonical_json
from mpq_deploy.stages.candidates import iterate_candidates
from mpq_deploy.stages.quantize import write_plan

if TYPE_CHECKING:
    from mpq_deploy.recover.options import RecoverOptions
    from mpq_deploy.recover.recover import RecoverTask
    from mpq_deploy.run.pipeline import Pipeline

# Raised with every change of what training does.
RECOVER_FORMAT = 3
# The state of training that has not ended yet, outside the stage's folder, which appears only when it is whole.
CHECKPOINT = "recover.checkpoint"


def recover_inputs(pipeline: Pipeline) -> Fields:
    """Return what the stage recover reads: digests and settings."""
    return {
        "recover.format": RECOVER_FORMAT,
        **{name: pipeline.digest(name) for name in ("export", "calibrate", "candidates", "allocate")},
        "dialect": load_target(pipeline.recipe.target).dialect,
        **settings(pipeline.recipe.recover, "recover"),
        "recipe.calibrate.steps": pipeline.recipe.calibrate.steps,
        "recipe.evaluate.sampler": pipeline.recipe.evaluate.sampler,
        **version_of("torch", "onnx", "onnx-ir", "onnxruntime", "numpy"),
    }


def make_recover(pipeline: Pipeline, folder: Path) -> str:
    """Make the stage recover in ``folder``; return a few words for the log."""
    if importlib.util.find_spec("torch") is None:
        raise MissingDependencyError("torch", "torch", "Recovering quality by training")
    from mpq_deploy.recover.recover import recover, write_recovered
    from mpq_deploy.recover.training_trajectories import TrajectoryRecorder

    plan = PrecisionPlan.load(pipeline.folder("allocate") / "plan.json")
    task = recover_task(pipeline, plan.schemes)
    steps, sampler = pipeline.recipe.calibrate.steps, pipeline.recipe.evaluate.sampler
    recorder = TrajectoryRecorder(task.model, task.spec, task.conditions, steps, sampler)
    checkpoint = pipeline.run.path / CHECKPOINT
    key = hashlib.sha256(canonical_json(recover_inputs(pipeline)).encode()).hexdigest()
    recovered = recover(task, recover_options(pipeline), recorder, pipeline.talk, checkpoint, key)
    recovery = recovered.recovery
    if recovery.improved:
        dialect = dialect_named(load_target(pipeline.recipe.target).dialect)
        written = write_recovered(task, recovered, folder, dialect)
    else:
        written = write_plan(pipeline, plan.schemes, folder)
    check_dialect(pipeline, folder / DEPLOYED)
    if written != plan.size_bytes:
        raise MpqError(
            f"The recovered file holds {written:,} bytes of constants, the plan says {plan.size_bytes:,}.",
            "This is a defect: please report it with the model's structure.",
        )
    (folder / "size.json").write_text(canonical_json({"size_bytes": written}), encoding="utf-8")
    recovery.save(folder)
    checkpoint.unlink(missing_ok=True)
    return recovery.summary()


def recover_task(pipeline: Pipeline, schemes: dict[str, str]) -> RecoverTask:
    """Gather what training starts from: the codes that ``schemes`` (layer -> scheme) deploy."""
    from mpq_deploy.recover.recover import RecoverTask
    from mpq_deploy.recover.trained_weights import StartingWeight

    exported = Exported(pipeline)
    recorded, stats = load_calibration(pipeline)
    starts = []
    for candidates in iterate_candidates(pipeline.folder("candidates"), exported.graph):
        scheme = SCHEMES[schemes[candidates.layer.name]]
        matrix = candidates.forms.get(scheme.weight_form)
        starts.append(StartingWeight(candidates.layer, scheme, matrix, candidates.weight))
    return RecoverTask(exported.path, exported.graph, exported.spec, exported.conditions, starts, recorded, stats)


def recover_options(pipeline: Pipeline) -> RecoverOptions:
    """Return the recipe's settings."""
    from mpq_deploy.recover.options import RecoverOptions

    return RecoverOptions(**pipeline.recipe.recover.model_dump())
