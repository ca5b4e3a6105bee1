"""What was measured, as a terminal table of at most 80 columns, and as sentences for reports."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable

from mpq_deploy.evaluate.metrics.kept import OURS, ImageMetrics
from mpq_deploy.report.data import FrechetInfo, ScoreInfo
from mpq_deploy.report.words import (
    frechet_about,
    frechet_other,
    frechet_verdict,
    score_about,
    score_verdict,
)


def metrics_text(metrics: ImageMetrics) -> str:
    """Return every distance, grouped by what it is to, with what it depends on."""
    everything = [*metrics.frechet, *(row for rows in metrics.controls.values() for row in rows)]
    lines: list[str] = []
    for first in metrics.frechet:
        group = [row for row in everything if row.kind == first.kind]
        lines += [
            *_wrapped(frechet_about(first)),
            *_table(group),
            *_wrapped(frechet_other(first)),
            "",
        ]
    for own in (row for row in metrics.scores if row.variant == OURS):
        lines += [
            *_wrapped(score_about(own)),
            *_score_table(row for row in metrics.scores if row.kind == own.kind),
            "",
        ]
    for note in metrics.notes:
        lines += _wrapped(note)
    return "\n".join(lines)


def _table(rows: Iterable[FrechetInfo]) -> list[str]:
    lines = [f"  {'':<9} {'distance':>9} {'over float':>10}  95 % interval"]
    for row in rows:
        interval = f"{row.increase_interval.low:+.2g} to {row.increase_interval.high:+.2g}"
        figures = f"{row.distance:>9.4g} {row.increase:>+10.3g}  {interval:<22}"
        lines.append(f"  {row.variant:<9} {figures}{frechet_verdict(row)}")
    return lines


def _score_table(rows: Iterable[ScoreInfo]) -> list[str]:
    lines = [f"  {'':<9} {'mean':>9} {'over float':>10}  95 % interval"]
    for row in rows:
        ends = row.increase_interval
        interval = "" if ends is None else f"{ends.low:+.2g} to {ends.high:+.2g}"
        lines.append(
            f"  {row.variant:<9} {row.value:>9.4g} {row.increase:>+10.3g}  {interval:<22}{score_verdict(row)}"
        )
    return lines


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, 80, break_long_words=False, break_on_hyphens=False)
