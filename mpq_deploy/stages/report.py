"""The stage report: report.html, report.md and report.json in the run folder, from all the other stages."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mpq_deploy.report.collect import write_report
from mpq_deploy.run.stage import Stage

if TYPE_CHECKING:
    from mpq_deploy.run.view import Run


def make(run: Run, folder: Path) -> str:
    """Write the reports into ``folder``; there is nothing to say for the log."""
    write_report(run, folder)
    return ""


STAGE = Stage(
    "report",
    make,
    None,
    after=("export", "calibrate", "measure", "allocate", "quantize", "engine", "evaluate"),
)
