"""report.md: the result for a pull request. Short, tables, no HTML."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from mpq_deploy.report.data import Control, ReportData, SchemeTotal, StageRow, kept_in_fp16
from mpq_deploy.report.words import (
    DEVICE_COLUMNS,
    FRECHET_COLUMNS,
    SIZE_COLUMNS,
    control_layers,
    controls_note,
    count,
    device_row,
    duration,
    engine_state,
    expected_latency,
    frechet_groups,
    headline,
    importance,
    intervals_note,
    latency,
    percent,
    prediction,
    psnr,
    ranged_error,
    score_groups,
    similarity,
    size,
    size_rows,
    title_of,
)

# What Markdown would take as formatting or as HTML.
_SPECIAL = "\\`*_{}[]<>#|~"


def markdown_report(data: ReportData) -> str:
    """Return the report as GitHub Markdown."""
    subject = "Output error" if data.predicted_images is None else "Final images"
    parts = [
        f"## {plain(data.model.name)}: {percent(data.size_ratio)} of FP16 for {plain(data.target.name)}",
        " ".join(headline(data)),
        *_warning(data),
        table(("", "size", "of FP16", "PSNR", "SSIM", "output error (NMSE)"), _variants(data)),
        plain(controls_note(data)),
        plain(control_layers(data)),
        intervals_note(data),
        f"{subject}: {prediction(data)}. {plain(data.prediction_note)} {_engine_line(data)}".replace(
            "  ", " "
        ),
        *(["### Sizes", table(SIZE_COLUMNS, size_rows(data))] if data.by_size else []),
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
        ", ".join(
            f"{plain(name)} {plain(version)}" for name, version in sorted(data.versions.items())
        ),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table; the first column is left-aligned, the others right. Cells are escaped."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    lines = [header, rule, *([plain(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


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
    def row(title: str, of: ReportData | Control) -> list[str]:
        bytes_ = [size(of.size_bytes), percent(of.size_ratio)]
        return [
            title,
            *bytes_,
            psnr(of),
            similarity(of),
            ranged_error(of.measured_nmse, of.nmse_interval),
        ]

    controls = [row(control.title, control) for control in data.compared.values()]
    return [row(title_of("ours", data), data), *controls]


def _engine_line(data: ReportData) -> str:
    word, line = engine_state(data)
    speed, where = latency(data)
    expected = (
        f" {plain(expected_latency(data.expected_latency))}." if data.expected_latency else ""
    )
    return f"Engine: {word} ({plain(line)}). Latency: {speed} ({plain(where)}).{expected}"


def _devices(data: ReportData) -> list[str]:
    return (
        ["### On devices", table(DEVICE_COLUMNS, map(device_row, data.devices))]
        if data.devices
        else []
    )


def _totals(data: ReportData) -> list[list[str]]:
    def row(of: SchemeTotal) -> list[str]:
        ratio = percent(of.bytes / of.fp16_bytes) if of.fp16_bytes else "–"
        return [of.op, of.scheme, str(of.layers), size(of.bytes), ratio]

    return [row(total) for total in data.totals]


def _kept(data: ReportData) -> list[str]:
    nouns = {"layer": "layer", "other": "other constant"}
    lines = [
        f"- {count(group.count, nouns[group.kind])}, {size(group.bytes)}: {plain(group.reason)}"
        for group in kept_in_fp16(data)
    ]
    return ["Stayed in FP16:", "\n".join(lines)] if lines else []


def _how_made(stage: StageRow) -> str:
    made = "kept" if stage.cached else "made"
    return made if stage.device == "cpu" else f"{made} on {stage.device}"


def _stages(data: ReportData) -> list[list[str]]:
    return [
        [s.name, duration(s.seconds), size(s.peak_rss_bytes), _how_made(s)] for s in data.stages
    ]


def _notes(data: ReportData) -> list[str]:
    lines = [f"- {plain(note)}" for note in data.notes]
    return ["### Notes", "\n".join(lines)] if lines else []
