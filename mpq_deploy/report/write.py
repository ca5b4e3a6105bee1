"""Write report.json, report.md and report.html, each aside and then into place."""

from __future__ import annotations

from pathlib import Path

from mpq_deploy.evaluate.cache import write_aside
from mpq_deploy.report.data import ReportData
from mpq_deploy.report.markdown import markdown_report
from mpq_deploy.report.page import html_page
from mpq_deploy.report.seal import report_json


def write_reports(data: ReportData, folder: Path) -> tuple[Path, Path, Path]:
    """Write report.json, report.md and report.html into ``folder``; return their paths.

    All are made before the first is written, so a failure leaves the former three together.
    """
    made = {
        "report.json": report_json(data.as_json()),
        "report.md": markdown_report(data),
        "report.html": html_page(data),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in made.items():
        write_aside(folder / name, text.encode())
    return folder / "report.json", folder / "report.md", folder / "report.html"
