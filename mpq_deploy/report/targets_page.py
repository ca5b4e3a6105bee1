"""report.html of a run of several targets: a row for each, with a link to its own report."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote

from markupsafe import Markup

from mpq_deploy.evaluate.cache import write_aside
from mpq_deploy.report import words
from mpq_deploy.report.page import rendered
from mpq_deploy.report.read import REPORT, ReadReport, read_report
from mpq_deploy.run.folder import PIPELINE, TARGETS, targets_in
from mpq_deploy.run.pipeline_file import PipelineFile

PAGE = "report.html"
COLUMNS = (
    "Target",
    "Of FP16",
    "Size",
    "Predicted error",
    "Measured error",
    "PSNR",
    "Latency",
)

OUTPUTS = "Errors are those of the denoiser's output, relative to the float model's. In parentheses: 95 % intervals."
IMAGES = (
    "Errors are those of final images, relative to the float pipeline's; times those of an image."
)


def write_targets(run: Path) -> Path:
    """Write the page of the targets in ``run`` that have a report; return its path."""
    several = targets_in(run)
    wholes = [one for one in several if (one / PIPELINE).exists()]
    if wholes:
        page = wholes_page({one.name: PipelineFile.load(one) for one in wholes})
    else:
        found = [one for one in several if (one / REPORT).exists()]
        page = targets_page({one.name: read_report(one) for one in found})
    write_aside(run / PAGE, page.encode())
    return run / PAGE


def targets_page(reports: dict[str, ReadReport]) -> str:
    """Return the page. Every string of the reports is escaped."""
    first = next(iter(reports.values()))
    return rendered(
        "targets.html.j2",
        model=first.model.name,
        synthetic=first.model.synthetic,
        lead=OUTPUTS,
        columns=COLUMNS,
        rows=[_row(name, report) for name, report in reports.items()],
    )


def wholes_page(views: dict[str, PipelineFile]) -> str:
    """Return the page of a whole pipeline's targets. Every string of the views is escaped."""
    first = next(iter(views.values()))
    return rendered(
        "targets.html.j2",
        model=first.class_name,
        synthetic="",
        lead=IMAGES,
        columns=COLUMNS,
        rows=[_row_of_whole(name, view) for name, view in views.items()],
    )


def _link(name: str) -> str:
    return Markup('<a href="{}">{}</a>').format(f"{TARGETS}/{quote(name)}/{PAGE}", name)


def _row_of_whole(name: str, view: PipelineFile) -> list[str]:
    size, fp16 = view.size_bytes, view.fp16_size_bytes
    measured = [one.image_ms for one in view.devices if one.image_ms is not None]
    speed = words.NOT_MEASURED
    if measured:
        speed = f"{words.digits(max(measured))} ms"
    elif view.image_ms is not None:
        speed = f"{words.digits(view.image_ms)} ms, estimated"
    return [
        _link(name),
        words.percent(size / fp16) if size and fp16 else "not planned",
        words.size(size) if size else "not planned",
        words.error(view.predicted_image_error),
        words.error(view.measured_image_error),
        words.decibels(view.psnr_db),
        speed,
    ]


def _row(name: str, report: ReadReport) -> list[str]:
    predicted, images = words.NOT_PREDICTED, report.predicted_images
    if images is not None:
        predicted = f"{words.decibels(images.psnr_db)} (PSNR)"
    if report.predicted_nmse is not None:
        predicted = words.ranged_error(report.predicted_nmse, report.predicted_interval)
    speed, expected = words.latency(report)[0], report.expected_latency
    if expected is not None and (report.engine is None or report.engine.latency_ms is None):
        speed = f"{words.digits(expected.ours_ms)} ms, {expected.source}"
    return [
        _link(name),
        words.percent(report.size_ratio),
        words.size(report.size_bytes) + (", nominal" if report.simulated else ""),
        predicted,
        words.ranged_error(report.measured_nmse, report.nmse_interval),
        words.psnr(report),
        speed,
    ]
