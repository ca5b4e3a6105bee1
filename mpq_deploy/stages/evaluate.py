"""The stages correction and evaluate: PTQD's fit, and the comparison with the float model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mpq_deploy.calibrate.stats import dealt
from mpq_deploy.graph.writers.deployed_graphs import DEPLOYED, SIMULATED
from mpq_deploy.run.common import settings, version_of
from mpq_deploy.runtime.correction import FILE as CORRECTION
from mpq_deploy.runtime.correction import FORMAT as CORRECTION_FORMAT
from mpq_deploy.runtime.correction import Correction, load_correction
from mpq_deploy.system.files import Fields

if TYPE_CHECKING:
    from mpq_deploy.evaluate.evaluation_result import Evaluation
    from mpq_deploy.evaluate.half import HalfPrecision
    from mpq_deploy.run.view import Run


LATENCY = "latency.json"
# As above, for evaluation.json: 2 has the PSNR as a mean over images, and the pooled one; 3 also those of each image
# and the float graph's digest; 4 what the deployed file's FP16 arithmetic costs, among its notes.
EVALUATION_FORMAT = 4
# Calls that the correction is fitted on.
CORRECTION_CALLS = 48
# The variant that samples the plan's graph with PTQD's correction in front of the sampler.
CORRECTED = "ours+ptqd"
# The plan as it was before recovery, where there was one.
BEFORE = "plan"


def correction_inputs(run: Run) -> Fields:
    """Return what the stage correction reads: digests and settings."""
    return {
        **{name: run.digest(name) for name in ("export", "calibrate")},
        "quantize": run.digest(run.deployed_stage),
        "correction.format": CORRECTION_FORMAT,
        "recipe.evaluate.correction_bias": run.recipe.evaluate.correction_bias,
        "recipe.calibrate.batch_size": run.recipe.calibrate.batch_size,
        "recipe.measure.samples": run.recipe.measure.samples,
        **version_of("onnxruntime", "numpy"),
    }


def correction_for(run: Run, quantized: Path) -> Correction:
    """Fit the correction of the graphs in the folder ``quantized``, on calls that their weights were not rounded on."""
    from mpq_deploy.calibrate.fit_correction import call_moments, fit_correction
    from mpq_deploy.evaluate.cache import model_digest

    exported = run.exported
    inputs = run.calibration.inputs
    _, held_out = inputs.split(run.recipe.measure.samples)
    moments = call_moments(
        exported.path,
        quantized / SIMULATED,
        held_out.take(dealt(held_out.rows, np.arange(len(held_out.rows)))[:CORRECTION_CALLS]),
        exported.conditions,
        exported.spec,
        run.recipe.calibrate.batch_size,
        run.talk,
    )
    return fit_correction(
        moments,
        {name: model_digest(quantized / name) for name in (DEPLOYED, SIMULATED)},
        exported.spec.prediction_type,
        run.recipe.evaluate.correction_bias,
        unseen_by_rounding=held_out is not inputs,
    )


def make_correction(run: Run, folder: Path) -> str:
    """Make the stage correction in ``folder``; return a few words for the log."""
    correction = correction_for(run, run.deployed)
    correction.save(folder / CORRECTION)
    return correction.summary()


def evaluate_inputs(run: Run) -> Fields:
    """Return what the stage evaluate reads: digests and settings."""
    return {
        "evaluation.format": EVALUATION_FORMAT,
        **{name: run.digest(name) for name in ("export", "calibrate", "controls")},
        "quantize": run.digest("quantize"),
        **({"recover": run.digest("recover")} if run.recipe.recover.steps else {}),
        "correction": None if run.recipe.evaluate.correction == "none" else run.digest("correction"),
        **settings(run.recipe.evaluate, "evaluate"),
        "recipe.calibrate.seed": run.recipe.calibrate.seed,
        **version_of("onnxruntime", "numpy"),
    }


def evaluate_variants(
    run: Run,
    ours: Path,
    size_bytes: int,
    latency: bool,
    correction: Correction | None = None,
    before: Path | None = None,
) -> Evaluation:
    """Compare the graph ``ours`` (without and with ``correction``) and the controls with the float model.

    ``before``: the plan's graph where ``ours`` is the recovered one, of the same size.

    Samples are cached by content.
    """
    from mpq_deploy.evaluate.evaluate import evaluate
    from mpq_deploy.evaluate.evaluation_result import EvaluationOptions

    exported = run.exported
    section = run.recipe.evaluate
    known, steps, samples = exported.spec.calibration_rows, section.steps, section.samples
    if exported.spec.timestep is None:
        held_out = len(exported.conditions[exported.spec.sample.name]) - (known or 0)
        steps, samples = 1, min(samples, held_out)
    options = EvaluationOptions(
        samples=samples,
        steps=steps,
        timesteps=min(section.timesteps, steps),
        calls=section.calls,
        batch_size=section.batch_size,
        seed=section.seed,
        sampler=section.sampler,
        **({} if latency else {"latency_calls": 0}),
    )
    controls = run.stage("controls")
    sizes: dict[str, int] = json.loads((controls / "sizes.json").read_text(encoding="utf-8"))
    corrected = {} if correction is None else {CORRECTED: correction}
    plan = {} if before is None else {BEFORE: before}
    return evaluate(
        {
            "ours": ours,
            **dict.fromkeys(corrected, ours),
            **plan,
            **{name: controls / name / SIMULATED for name in sizes},
        },
        exported.path,
        exported.spec,
        exported.conditions,
        options,
        run.talk,
        sizes={**sizes, "ours": size_bytes, **dict.fromkeys((*corrected, *plan), size_bytes)},
        cache=run.path / ".samples",
        corrections=corrected,
        crew=run.crew,
    )


def _half_precision(run: Run, deployed: Path) -> HalfPrecision:
    """Compare the FP16 graph in the folder ``deployed`` with its twin, on calls that were calibrated on."""
    from mpq_deploy.evaluate.half import half_precision

    exported = run.exported
    recorded = run.calibration.inputs
    files = exported.path, deployed / DEPLOYED, deployed / SIMULATED
    return half_precision(*files, recorded, exported.conditions, exported.spec, run.talk)


def make_evaluate(run: Run, folder: Path) -> str:
    """Make the stage evaluate in ``folder``; return a few words for the log."""
    deployed = run.deployed
    size = json.loads((deployed / "size.json").read_text(encoding="utf-8"))["size_bytes"]
    graph, correction = deployed / SIMULATED, None
    if run.recipe.evaluate.correction != "none":
        correction = load_correction(run.stage("correction") / CORRECTION, graph)
    before = run.stage("quantize") / SIMULATED if run.recipe.recover.steps else None
    result = evaluate_variants(run, graph, size, latency=True, correction=correction, before=before)
    half = _half_precision(run, deployed)
    if half.warning:
        run.talk.warn(half.warning)
    replace(result, notes=(*result.notes, half.note)).save(folder)
    # What a clock said is no part of what must repeat byte for byte.
    if (folder / LATENCY).exists():
        (folder / LATENCY).replace(run.path / LATENCY)
    measured = [(name, result.variants[name]) for name in ("ours", CORRECTED, BEFORE) if name in result.variants]
    said = [f"{name}: NMSE {found.measured_nmse:.2e}, PSNR {found.psnr_db:.1f} dB" for name, found in measured]
    return "; ".join(said).removeprefix("ours: ")
