"""The stage calibrate: the inputs of the sampler's trajectories, and activation statistics."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mpq_deploy.check.check import OPERATOR_RULES, check_dialect
from mpq_deploy.graph.attention import operand_names
from mpq_deploy.run.stage import Stage, settings, version_of
from mpq_deploy.run.stage_memory import batch_within_memory, check_memory
from mpq_deploy.run.view import CALLS
from mpq_deploy.system.files import Fields

if TYPE_CHECKING:
    from mpq_deploy.run.view import Run


# Raised with every change of what calibration leaves behind.
CALIBRATION_FORMAT = 6


def inputs(run: Run) -> Fields:
    """Return the settings and versions that the stage depends on, beside the stages it reads."""
    # Its operands are calibrated where they may be rounded.
    attention = run.recipe.allocate.attention
    return {
        "calibration.format": CALIBRATION_FORMAT,
        **({} if attention == "fp16" else {"recipe.allocate.attention": attention}),
        **settings(run.recipe.calibrate, "calibrate"),
        "recipe.evaluate.sampler": run.recipe.evaluate.sampler,
        **version_of("onnxruntime", "numpy"),
    }


def make(run: Run, folder: Path) -> str:
    """Make the stage in ``folder``; return a few words for the log."""
    from mpq_deploy.calibrate.calibrate import calibrate
    from mpq_deploy.calibrate.fp16_range import WIDE_FROM, large_values, named, save_beyond
    from mpq_deploy.calibrate.spread_calibration import CalibrationSetup

    section = run.recipe.calibrate
    exported = run.exported
    check_memory(run, STAGE)
    section = section.replace(batch_size=batch_within_memory(run, STAGE))
    check_dialect(run, exported.path, OPERATOR_RULES)
    # A component without timesteps has so many inputs and no more.
    rows = exported.spec.calibration_rows
    if rows is not None:
        section = section.replace(samples=min(section.samples, rows))
    sampler = run.recipe.evaluate.sampler
    attention = run.recipe.allocate.attention != "fp16"
    operands = operand_names(exported.graph.model) if attention else ()
    setup = CalibrationSetup(exported.model, section, sampler, operands)
    recorded, stats = calibrate(
        setup, exported.graph, run.talk, scratch=run.scratch(), crew=run.crew
    )
    recorded.save(folder / CALLS)
    stats.save(folder / "stats.npz")
    # One call at each timestep.
    watched = setup.calls(recorded.take(np.zeros(1, np.int64)))
    beyond = large_values(exported.path, watched, run.talk, above=WIDE_FROM)
    if beyond:
        run.talk.line(
            f"  {len(beyond)} nodes stay in FP32, near FP16's limit or beyond: {named(beyond)}"
        )
    save_beyond(beyond, folder)
    return f"{len(recorded.timesteps)} timesteps x {recorded.count} calls, {len(stats.activations)} activations"


STAGE = Stage(
    "calibrate",
    make,
    inputs,
    reads=("export",),
    hint="Lower calibrate.batch_size, or",
)
