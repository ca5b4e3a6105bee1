"""The stage evaluate: the comparison with the float model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mpq_deploy.calls.recorded import RecordedCalls
from mpq_deploy.evaluate.half import ComparedFiles, half_precision
from mpq_deploy.evaluate.interval import ends_text
from mpq_deploy.evaluate.variants import BEFORE, CORRECTED, LATENCY, evaluate_variants
from mpq_deploy.formats.scheme import SCHEMES
from mpq_deploy.graph.writers.deployed_graphs import DEPLOYED, SIMULATED
from mpq_deploy.run.stage import Stage, settings, version_of
from mpq_deploy.runtime.correction import FILE as CORRECTION
from mpq_deploy.runtime.correction import load_correction
from mpq_deploy.system.files import Fields
from mpq_deploy.system.inputs import read_json_object, whole

if TYPE_CHECKING:
    from mpq_deploy.evaluate.half import HalfPrecision
    from mpq_deploy.run.view import Run


# Raised with every change of what evaluation.json holds.
EVALUATION_FORMAT = 8


def inputs(run: Run) -> Fields:
    """Return the settings and versions that the stage depends on, beside the stages it reads."""
    return {
        "evaluation.format": EVALUATION_FORMAT,
        **({"recover": run.digest("recover")} if run.recipe.recover.steps else {}),
        "correction": None
        if run.recipe.evaluate.correction == "none"
        else run.digest("correction"),
        **settings(run.recipe.evaluate, "evaluate"),
        "recipe.calibrate.seed": run.recipe.calibrate.seed,
        **version_of("onnxruntime", "numpy"),
    }


def _half_precision(run: Run, deployed: Path) -> HalfPrecision:
    """Compare the FP16 graph in the folder ``deployed`` with its twin, on calls that were calibrated on."""
    exported = run.exported
    recorded = run.calibration.inputs
    files = ComparedFiles(exported.path, deployed / DEPLOYED, deployed / SIMULATED)
    calls = RecordedCalls(recorded, exported.spec)
    activations = {SCHEMES[name].activation for name in run.plan.schemes.values()}
    simulated = sorted({one.twin_only for one in activations if one and one.twin_only})
    wide = run.calibration.beyond_fp16
    return half_precision(files, calls, run.talk, wide, "; ".join(simulated))


def _size(deployed: Path) -> int:
    path = deployed / "size.json"
    with whole(path):
        return int(read_json_object(path)["size_bytes"])


def make(run: Run, folder: Path) -> str:
    """Make the stage in ``folder``; return a few words for the log."""
    deployed = run.deployed
    size = _size(deployed)
    graph, correction = deployed / SIMULATED, None
    if run.recipe.evaluate.correction != "none":
        correction = load_correction(run.stage("correction") / CORRECTION, graph)
    before = run.stage("quantize") / SIMULATED if run.recipe.recover.steps else None
    result = evaluate_variants(run, graph, size, latency=True, correction=correction, before=before)
    half = _half_precision(run, deployed)
    if half.warning:
        run.talk.warn(half.warning)
    replace(result, notes=(*result.notes, half.note)).save(folder)
    # What a clock said is not part of what must repeat byte for byte.
    if (folder / LATENCY).exists():
        (folder / LATENCY).replace(run.path / LATENCY)
    measured = [
        (name, result.variants[name])
        for name in ("ours", CORRECTED, BEFORE)
        if name in result.variants
    ]
    figures = [
        f"{n}: NMSE {v.measured_nmse:.2e}{ends_text(v.nmse_interval)}, PSNR {v.psnr_db:.1f} dB"
        for n, v in measured
    ]
    return "; ".join(figures).removeprefix("ours: ")


STAGE = Stage(
    "evaluate",
    make,
    inputs,
    reads=("export", "calibrate", "controls", "quantize"),
    after=("allocate", "recover", "correction"),
)
