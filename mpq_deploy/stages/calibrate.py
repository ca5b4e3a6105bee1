"""The stage calibrate: the inputs of the sampler's trajectories, and what activations looked like on them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mpq_deploy.graph.dialect_check import OPERATOR_RULES, check_dialect
from mpq_deploy.run.common import Exported, settings, version_of
from mpq_deploy.run.folder import Fields
from mpq_deploy.run.stage_memory import check_memory

if TYPE_CHECKING:
    from mpq_deploy.run.pipeline import Pipeline


# Raised with every change of what calibration leaves behind.
CALIBRATION_FORMAT = 4


def calibrate_inputs(pipeline: Pipeline) -> Fields:
    """Return what the stage calibrate reads: digests and settings."""
    return {
        "export": pipeline.digest("export"),
        "calibration.format": CALIBRATION_FORMAT,
        **settings(pipeline.recipe.calibrate, "calibrate"),
        "recipe.evaluate.sampler": pipeline.recipe.evaluate.sampler,
        **version_of("onnxruntime", "numpy"),
    }


def make_calibrate(pipeline: Pipeline, folder: Path) -> str:
    """Make the stage calibrate in ``folder``; return a few words for the log."""
    from mpq_deploy.calibrate.calibrate import calibrate
    from mpq_deploy.calibrate.options import CalibrationOptions

    section = pipeline.recipe.calibrate
    exported = Exported(pipeline)
    check_memory(pipeline, "calibrate")
    check_dialect(pipeline, exported.path, OPERATOR_RULES)
    # A component without timesteps has so many inputs and no more.
    rows = exported.spec.calibration_rows
    options = CalibrationOptions(
        timesteps=section.timesteps,
        samples=section.samples if rows is None else min(section.samples, rows),
        observed=section.observed,
        steps=section.steps,
        batch_size=section.batch_size,
        seed=section.seed,
        scale_method=section.scale,
        percentile=section.percentile,
        reservoir=section.reservoir,
        sampler=pipeline.recipe.evaluate.sampler,
    )
    inputs, stats = calibrate(
        exported.path,
        exported.graph,
        exported.spec,
        exported.conditions,
        options,
        pipeline.talk,
        scratch=pipeline.run.scratch(),
        crew=pipeline.crew,
    )
    inputs.save(folder / "inputs.npz")
    stats.save(folder / "stats.npz")
    return f"{len(inputs.timesteps)} timesteps x {len(inputs.rows)} calls, {len(stats.activations)} activations"
