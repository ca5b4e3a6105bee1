"""report.html of a run of several targets: a row for each, with a link to its own report."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote

from markupsafe import Markup

from mpq_deploy.evaluate.cache import write_aside
from mpq_deploy.report import words
from mpq_deploy.report.page import rendered
from mpq_deploy.report.read import REPORT, ReadReport, read_report
from mpq_deploy.run.folder import TARGETS, targets_in

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


def write_targets(run: Path) -> Path:
    """Write the page of the targets in ``run`` that have a report; return its path."""
    found = [one for one in targets_in(run) if (one / REPORT).exists()]
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
        columns=COLUMNS,
        rows=[_row(name, report) for name, report in reports.items()],
    )


def _row(name: str, report: ReadReport) -> list[str]:
    link = Markup('<a href="{}">{}</a>').format(f"{TARGETS}/{quote(name)}/{PAGE}", name)
    predicted, images = words.NOT_PREDICTED, report.predicted_images
    if images is not None:
        predicted = f"{words.decibels(images.psnr_db)} (PSNR)"
    if report.predicted_nmse is not None:
        predicted = words.ranged_error(report.predicted_nmse, report.predicted_interval)
    speed, expected = words.latency(report)[0], report.expected_latency
    if expected is not None and (report.engine is None or report.engine.latency_ms is None):
        speed = f"{words.digits(expected.ours_ms)} ms, {expected.source}"
    return [
        link,
        words.percent(report.size_ratio),
        words.size(report.size_bytes) + (", nominal" if report.simulated else ""),
        predicted,
        words.ranged_error(report.measured_nmse, report.nmse_interval),
        words.psnr(report),
        speed,
    ]
