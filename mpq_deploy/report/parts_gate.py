"""Limits on a whole pipeline's run: its bytes, its final images, its time per image."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from mpq_deploy.errors import UsageError
from mpq_deploy.report.gate import GateResult, Limits, Outcome, Status
from mpq_deploy.run.pipeline_file import PipelineFile

BUILD = "Run: mpq-deploy build -o RUN."
MEASURE = (
    "To measure: mpq-deploy install PACKAGE on the device, then here mpq-deploy report RUN "
    "--device results.json."
)
TAKEN = ("max_size", "min_psnr", "max_nmse", "max_latency")


def check_pipeline(run: Path, limits: Limits, allow_estimate: bool) -> GateResult:
    """Hold the run of a whole pipeline against ``limits``: errors and PSNR are those of final images.

    Raises UsageError without any limit, and for one that is of a single part's report.
    """
    view = PipelineFile.load(run)
    given = [item.name for item in fields(limits) if getattr(limits, item.name) is not None]
    other = next((name for name in given if name not in TAKEN), None)
    if other is not None or not given:
        shown = ", ".join(f"--{name.replace('_', '-')}" for name in TAKEN)
        what = (
            f"--{other.replace('_', '-')} is a limit on one part" if other else "There is no limit"
        )
        raise UsageError(f"{what}.", f"Of {run}: {shown}; of a part: {run}/components/NAME.")
    latency = None if limits.max_latency is None else limits.max_latency.milliseconds
    outcomes = [_size(view, limits)] if limits.max_size is not None else []
    for name, limit, value, unit, detail in (
        ("PSNR", limits.min_psnr, view.psnr_db, " dB", ""),
        ("error of images", limits.max_nmse, view.measured_image_error, "", ""),
        ("latency per image", latency, *_image_ms(view, allow_estimate)),
    ):
        if limit is not None:
            outcomes.append(_held(name, limit, value, unit, detail))
    target = str(view.recipe.get("target", ""))
    return GateResult(str(run), view.class_name, target, tuple(outcomes), view.notes)


def _image_ms(view: PipelineFile, allow_estimate: bool) -> tuple[float | None, str, str]:
    """Return the time of an image, its unit, and a remark on it.

    It is what devices measured, the slowest; without any the estimate, where that is allowed.
    """
    measured = [one.image_ms for one in view.devices if one.image_ms is not None]
    if measured:
        return max(measured), " ms", "Measured on a device."
    if view.image_ms is None:
        return None, " ms", MEASURE
    if allow_estimate:
        return view.image_ms, " ms", "Estimated from the target's figures; no device measured it."
    estimate = f"Estimated at {view.image_ms:.4g} ms, which --allow-estimate takes."
    return None, " ms", f"{estimate} {MEASURE}"


def _size(view: PipelineFile, limits: Limits) -> Outcome:
    assert limits.max_size is not None
    if view.size_bytes is None or not view.fp16_size_bytes or view.weights is None:
        return Outcome(
            "size", f"at most {limits.max_size}", "not planned", "not measured", detail=BUILD
        )
    allowed = limits.max_size.bytes(view.fp16_size_bytes, view.weights)
    measured = f"{view.size_bytes / view.fp16_size_bytes:.4f} of FP16, {view.size_bytes:,} bytes"
    status: Status = "passed" if view.size_bytes <= allowed else "failed"
    limit = f"at most {limits.max_size} ({allowed:,} bytes)"
    return Outcome("size", limit, measured, status, view.size_bytes, allowed)


def _held(name: str, limit: float, value: float | None, unit: str, detail: str) -> Outcome:
    at_least = name == "PSNR"
    required = f"at {'least' if at_least else 'most'} {limit:g}{unit}"
    if value is None:
        detail = detail or BUILD
        return Outcome(name, required, "not measured", "not measured", None, limit, detail=detail)
    status: Status = "passed" if (value >= limit if at_least else value <= limit) else "failed"
    return Outcome(name, required, f"{value:.4g}{unit}", status, value, limit, detail=detail)
