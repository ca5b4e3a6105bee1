"""report.md: the result for a pull request. Short, tables, no HTML."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from mpq_deploy.report.data import ReportData, kept_in_fp16
from mpq_deploy.report.words import (
    DEVICE_COLUMNS,
    FRECHET_COLUMNS,
    count,
    device_row,
    duration,
    engine_state,
    error,
    expected_latency,
    frechet_groups,
    headline,
    importance,
    intervals_note,
    latency,
    percent,
    prediction,
    psnr,
    score_groups,
    similarity,
    size,
    title_of,
)

# What Markdown would take as formatting or as HTML.
_SPECIAL = "\\`*_{}[]<>#|~"


def markdown_report(data: ReportData) -> str:
    """Return the report as GitHub Markdown."""
    parts = [
        f"## {plain(data.model.name)}: {percent(data.size_ratio)} of FP16 for {plain(data.target.name)}",
        " ".join(headline(data)),
        *_warning(data),
        table(("", "size", "of FP16", "PSNR", "SSIM", "output error (NMSE)"), _variants(data)),
        intervals_note(data),
        f"Output error: {prediction(data)}. {_engine_line(data)}",
        *_frechet(data),
        *_scores(data),
        *_importance(data),
        *_devices(data),
        *([plain(f"Recovery: {data.recovery.summary}.")] if data.recovery is not None else []),
        "### Precision",
        table(("op", "scheme", "layers", "bytes", "of their FP16"), _totals(data)),
        *_kept(data),
        "### Stages",
        table(("stage", "time", "peak memory", ""), _stages(data)),
        *_notes(data),
        "### Reproduce",
        _code(data.reproduce),
        ", ".join(f"{plain(name)} {plain(version)}" for name, version in sorted(data.versions.items())),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table; the first column is left-aligned, the others right. Cells are escaped."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)]]
    text = ["| " + " | ".join(lines[0]) + " |", "| " + " | ".join(lines[1]) + " |"]
    text += ["| " + " | ".join(plain(cell) for cell in row) + " |" for row in rows]
    return "\n".join(text)


def plain(text: str) -> str:
    """Return ``text`` so that Markdown shows it as it is, on one line."""
    flat = " ".join(text.split())
    return "".join(f"\\{letter}" if letter in _SPECIAL else letter for letter in flat)


def _code(text: str) -> str:
    """Return a fenced block whose fence is longer than any row of backticks in ``text``."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}\n{text}\n{fence}"


def _warning(data: ReportData) -> list[str]:
    return [f"> **Note:** {plain(data.model.synthetic)}"] if data.model.synthetic else []


def _importance(data: ReportData) -> list[str]:
    return [plain(importance(data.importance))] if data.importance is not None else []


def _frechet(data: ReportData) -> list[str]:
    parts = ["### Distribution of the images"] if data.frechet else []
    for about, rows, other in frechet_groups(data):
        parts += [plain(about), table(FRECHET_COLUMNS, rows), plain(other)]
    return parts


def _scores(data: ReportData) -> list[str]:
    parts = ["### Image by image"] if data.scores else []
    for about, columns, rows in score_groups(data):
        parts += [plain(about), table(columns, rows)]
    return parts


def _variants(data: ReportData) -> list[list[str]]:
    rows = [
        [
            title_of("ours", data),
            size(data.size_bytes),
            percent(data.size_ratio),
            psnr(data),
            similarity(data),
            error(data.measured_nmse),
        ]
    ]
    for control in data.compared.values():
        rows.append(
            [
                control.title,
                size(control.size_bytes),
                percent(control.size_ratio),
                psnr(control),
                similarity(control),
                error(control.measured_nmse),
            ]
        )
    return rows


def _engine_line(data: ReportData) -> str:
    word, line = engine_state(data)
    speed, where = latency(data)
    expected = f" {plain(expected_latency(data.expected_latency))}." if data.expected_latency else ""
    return f"Engine: {word} ({plain(line)}). Latency: {speed} ({plain(where)}).{expected}"


def _devices(data: ReportData) -> list[str]:
    return ["### On devices", table(DEVICE_COLUMNS, map(device_row, data.devices))] if data.devices else []


def _totals(data: ReportData) -> list[list[str]]:
    return [
        [t.op, t.scheme, str(t.layers), size(t.bytes), percent(t.bytes / t.fp16_bytes) if t.fp16_bytes else "–"]
        for t in data.totals
    ]


def _kept(data: ReportData) -> list[str]:
    kept = kept_in_fp16(data)
    if not kept:
        return []
    lines = [
        f"- {count(k.count, 'layer' if k.kind == 'layer' else 'other constant')}, {size(k.bytes)}: {plain(k.reason)}"
        for k in kept
    ]
    return ["Stayed in FP16:", "\n".join(lines)]


def _stages(data: ReportData) -> list[list[str]]:
    return [[s.name, duration(s.seconds), size(s.peak_rss_bytes), "kept" if s.cached else "made"] for s in data.stages]


def _notes(data: ReportData) -> list[str]:
    return ["### Notes", "\n".join(f"- {plain(note)}" for note in data.notes)] if data.notes else []
