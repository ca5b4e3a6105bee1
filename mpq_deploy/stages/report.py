"""The stage report: report.html, report.md and report.json in the run folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mpq_deploy.report.collect import report_data
from mpq_deploy.run.stage import Stage

if TYPE_CHECKING:
    from mpq_deploy.run.view import Run


def make(run: Run, folder: Path) -> str:
    """Write the reports into ``folder``; there is nothing to say for the log."""
    from mpq_deploy.report.write import write_reports

    write_reports(report_data(run), folder)
    return ""


STAGE = Stage(
    "report",
    make,
    None,
    computes=False,
    after=("export", "calibrate", "measure", "allocate", "quantize", "engine", "evaluate"),
)
