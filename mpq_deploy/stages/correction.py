"""The stage correction: PTQD's fit on calls that the weights were not rounded on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mpq_deploy.calibrate.fit_correction import call_moments, fit_correction
from mpq_deploy.calls.recorded import RecordedCalls, dealt
from mpq_deploy.evaluate.cache import model_digest
from mpq_deploy.graph.writers.deployed_graphs import DEPLOYED, SIMULATED
from mpq_deploy.run.stage import Stage, version_of
from mpq_deploy.runtime.correction import FILE as CORRECTION
from mpq_deploy.runtime.correction import FORMAT as CORRECTION_FORMAT
from mpq_deploy.runtime.correction import Correction
from mpq_deploy.system.files import Fields

if TYPE_CHECKING:
    from mpq_deploy.run.view import Run

# Calls that the correction is fitted on.
CORRECTION_CALLS = 48


def inputs(run: Run) -> Fields:
    """Return the settings and versions that the stage depends on, beside the stages it reads."""
    return {
        "quantize": run.digest(run.deployed_stage),
        "correction.format": CORRECTION_FORMAT,
        "recipe.evaluate.correction_bias": run.recipe.evaluate.correction_bias,
        "recipe.calibrate.batch_size": run.recipe.calibrate.batch_size,
        "recipe.measure.samples": run.recipe.measure.samples,
        **version_of("onnxruntime", "numpy"),
    }


def correction_for(run: Run, quantized: Path) -> Correction:
    """Fit the correction of the graphs in ``quantized``, on calls not used for rounding."""
    exported = run.exported
    recorded = run.calibration.inputs
    _, held_out = recorded.split(run.recipe.measure.samples)
    chosen = held_out.take(dealt(held_out.rows, np.arange(held_out.count))[:CORRECTION_CALLS])
    moments = call_moments(
        exported.path,
        quantized / SIMULATED,
        RecordedCalls(chosen, exported.spec),
        run.recipe.calibrate.batch_size,
        run.talk,
    )
    return fit_correction(
        moments,
        {name: model_digest(quantized / name) for name in (DEPLOYED, SIMULATED)},
        exported.spec.prediction_type,
        run.recipe.evaluate.correction_bias,
        unseen_by_rounding=held_out is not recorded,
    )


def make(run: Run, folder: Path) -> str:
    """Make the stage in ``folder``; return a few words for the log."""
    correction = correction_for(run, run.deployed)
    correction.save(folder / CORRECTION)
    return correction.summary()


STAGE = Stage(
    "correction",
    make,
    inputs,
    reads=("export", "calibrate"),
    after=("quantize", "recover"),
    applies=lambda recipe: recipe.evaluate.correction != "none",
)
