"""A comparison of runs as a terminal table, Markdown and an HTML page, from the same rows."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from mpq_deploy.report import words
from mpq_deploy.report.compare import Comparison, Difference, DistanceChange, Pair, PlanChange
from mpq_deploy.report.markdown import plain, table
from mpq_deploy.report.page import rendered
from mpq_deploy.report.read import ReadReport, slowest

WIDTH = 80
COLUMNS = ("run", "size", "of FP16", "PSNR", "SSIM", "NMSE", "latency")
MOVES = ("from", "to", "layers", "bytes before", "bytes after")
LARGEST = ("layer", "from", "to", "bytes before", "bytes after")
# Names longer than this are cut in the middle in the terminal's table of layers.
_NAME = 38


def comparison_text(comparison: Comparison) -> str:
    """Return the comparison for a terminal, at most 80 columns wide."""
    lines = [
        f"{'':<3} {'size':>9} {'of FP16':>8} {'PSNR dB':>20} {'SSIM':>7} {'NMSE':>9} {'latency':>10}"
    ]
    for number, report in enumerate(comparison.reports, 1):
        row = (
            _bytes(report),
            f"{report.size_ratio:.4f}",
            _psnr(report),
            *_figures(report),
            _milliseconds(report),
        )
        cells = zip(row, (9, 8, 20, 7, 9, 10), strict=True)
        lines.append(f"{number:<3} " + " ".join(f"{cell:>{width}}" for cell, width in cells))
    lines.append("")
    for number, report in enumerate(comparison.reports, 1):
        lines += _wrapped(f"{number}   {report.label}: {'; '.join(about(report))}", indent=4)
        for text in distances(report):
            lines += _wrapped(f"- {text}", lead=4, indent=6)
    for number, pair in enumerate(comparison.pairs, 2):
        lines += ["", f"{number} against 1"]
        for sentence in sentences(pair):
            lines += _wrapped(sentence, lead=4, indent=4)
        lines += _plan_lines(pair.plan)
    return "\n".join(lines)


def comparison_markdown(comparison: Comparison) -> str:
    """Return the comparison for a pull request."""
    parts = ["## Comparison", table(COLUMNS, _rows(comparison))]
    pieces = []
    for report in comparison.reports:
        pieces.append(f"- {plain(report.label)}: {plain('; '.join(about(report)))}")
        pieces += [f"  - {plain(one)}" for one in distances(report)]
    parts.append("\n".join(pieces))
    for pair in comparison.pairs:
        parts.append(f"### {plain(pair.label)} against {plain(comparison.reports[0].label)}")
        parts.append("\n".join(f"- {plain(sentence)}" for sentence in sentences(pair)))
        if pair.plan is not None and pair.plan.moves:
            parts += [table(MOVES, move_rows(pair.plan)), table(LARGEST, layer_rows(pair.plan))]
    return "\n\n".join(parts) + "\n"


def comparison_page(comparison: Comparison) -> str:
    """Return one page that fetches nothing; every string of the reports is escaped."""
    return rendered(
        "comparison.html.j2",
        comparison=comparison,
        title=page_title(comparison.reports),
        columns=COLUMNS,
        rows=_rows(comparison),
        about=[(report.label, about(report), distances(report)) for report in comparison.reports],
        pairs=[
            (
                pair,
                sentences(pair),
                move_rows(pair.plan) if pair.plan else [],
                layer_rows(pair.plan) if pair.plan else [],
            )
            for pair in comparison.pairs
        ],
        moves=MOVES,
        largest=LARGEST,
    )


def about(report: ReadReport) -> list[str]:
    """Say what a run's figures rest on: model, target, images, latency and its source, scores."""
    parts = [f"{report.model.name} for {report.target.name}"]
    if report.simulated:
        parts.append("simulated: nominal bytes")
    used = report.evaluation
    if used is None:
        parts.append("not evaluated")
    else:
        parts.append(f"{words.count(used.samples, 'image')}, {used.sampler}, seed {used.seed}")
    latency = slowest(report)
    if latency is None:
        parts.append("latency not measured on a device")
        if report.expected_latency is not None:
            parts.append(report.expected_latency.words)
    else:
        other = (
            ""
            if latency.target == report.target.name
            else f" (another target than {report.target.name})"
        )
        wrong = f", but {latency.problem}" if latency.problem else ""
        parts.append(
            f"latency {words.digits(latency.milliseconds)} ms: {latency.source}{other}{wrong}"
        )
    for score in report.scores:
        if score.variant == "ours":
            own = f"; the float model's {score.floor:.4g}" if score.score == "clip-score" else ""
            parts.append(f"{score.title} {score.value:.3g} ({score.samples:,} images{own})")
    return parts


def distances(report: ReadReport) -> list[str]:
    """Return each Frechet distance of a run, beside the float model's own."""
    return [
        f"{one.described}: {one.distance:.4g}"
        + (f", the float model {one.floor:.4g}" if one.against == "real" else "")
        for one in report.frechet
    ]


def sentences(pair: Pair) -> list[str]:
    """Describe a run against the first: bytes, quality or why it does not compare, and the plan."""
    parts = [f"Size: {more(pair.size_bytes, 'bytes')}."]
    if pair.obstacles:
        parts += [*pair.obstacles, "So their quality is not compared."]
    for name, difference, places, unit in (
        ("PSNR", pair.psnr_db, 2, " dB"),
        ("SSIM", pair.ssim, 5, ""),
    ):
        if difference is not None:
            parts.append(f"{name}: {_difference(difference, places, unit)}.")
    if pair.nmse_ratio is not None:
        parts.append(f"Output error (NMSE): {words.digits(pair.nmse_ratio)} times the first's.")
    parts += [_distance_sentence(change) for change in pair.distances]
    if pair.latency is not None:
        known = "Estimated latency" if pair.latency.estimated else "Latency"
        before, after = pair.latency.before_ms, pair.latency.after_ms
        parts.append(f"{known}: {words.digits(after)} ms, the first's {words.digits(before)} ms.")
    parts += pair.notes
    return [*parts, *_plan_sentences(pair.plan)]


def _distance_sentence(change: DistanceChange) -> str:
    text = f"{change.described}: {change.after:.4g}, the first's {change.before:.4g}"
    if change.overlap is None:
        return f"{text}."
    return f"{text}; their intervals {'overlap: no difference is shown' if change.overlap else 'lie apart'}."


def move_rows(plan: PlanChange) -> list[list[str]]:
    """Return the moves from scheme to scheme, the most bytes first."""
    return [
        [m.before, m.after, str(m.layers), f"{m.bytes_before:,}", f"{m.bytes_after:,}"]
        for m in plan.moves
    ]


def layer_rows(plan: PlanChange) -> list[list[str]]:
    """Return the largest layers that changed."""
    return [
        [one.name, one.before, one.after, f"{one.bytes_before:,}", f"{one.bytes_after:,}"]
        for one in plan.largest
    ]


def _plan_sentences(plan: PlanChange | None) -> list[str]:
    if plan is None:
        return ["Plan: not compared, because the models' layers differ."]
    parts = [f"Plan: {plan.changed} of {words.count(plan.common, 'common layer')} changed scheme."]
    for names, where in ((plan.only_first, "the first"), (plan.only_other, "this one")):
        if names:
            listed = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            parts.append(f"{words.count(len(names), 'layer')} only in {where}: {listed}.")
    return parts


def _plan_lines(plan: PlanChange | None) -> list[str]:
    """The moves and the largest layers as lines of the terminal."""
    if plan is None or not plan.moves:
        return []
    lines = ["", f"    {'layers':>6} {'bytes before':>14} {'after':>14}  scheme"]
    for move in plan.moves:
        bytes_ = f"{move.bytes_before:>14,} {move.bytes_after:>14,}"
        lines.append(
            f"    {move.layers:>6} {bytes_}  {_cut(f'{move.before} -> {move.after}', WIDTH - 42)}"
        )
    some = f" {len(plan.largest)} of {plan.changed}" if len(plan.largest) < plan.changed else ""
    lines.append(f"    the largest{some}, by bytes:")
    for one in plan.largest:
        moved = f"{one.before} -> {one.after}"
        lines.append(f"    {_cut(one.name, _NAME):<{_NAME}}  {_cut(moved, WIDTH - 6 - _NAME)}")
    return lines


def _rows(comparison: Comparison) -> list[list[str]]:
    return [
        [
            report.label,
            words.size(report.size_bytes),
            words.percent(report.size_ratio),
            words.psnr(report),
            words.NOT_MEASURED if report.ssim is None else f"{report.ssim:.4f}",
            words.error(report.measured_nmse),
            words.NOT_MEASURED if slowest(report) is None else _milliseconds(report),
        ]
        for report in comparison.reports
    ]


def _figures(report: ReadReport) -> tuple[str, str]:
    ssim = "-" if report.ssim is None else f"{report.ssim:.4f}"
    return ssim, "-" if report.measured_nmse is None else f"{report.measured_nmse:.2e}"


def _psnr(report: ReadReport) -> str:
    if report.psnr_db is None:
        return "identical" if report.identical else "-"
    interval = report.psnr_db_interval
    return f"{report.psnr_db:.1f}" + (
        "" if interval is None else f" ({interval.low:.1f} to {interval.high:.1f})"
    )


def _bytes(report: ReadReport) -> str:
    return words.size(report.size_bytes)


def _milliseconds(report: ReadReport) -> str:
    latency = slowest(report)
    return "-" if latency is None else f"{words.digits(latency.milliseconds)} ms"


def more(number: int, noun: str) -> str:
    """Say how many more or fewer ``noun`` a run has than the first."""
    if number == 0:
        return f"the same {noun}"
    return f"{abs(number):,} {noun} {'more' if number > 0 else 'less'}"


def _difference(difference: Difference, places: int, unit: str) -> str:
    text = f"{difference.value:+.{places}f}{unit}"
    if difference.interval is None:
        return text
    low, high = difference.interval
    text += f" (95 % interval {low:+.{places}f} to {high:+.{places}f}, paired by image)"
    return f"{text}: no difference is shown" if difference.within_noise else text


def _wrapped(text: str, lead: int = 0, indent: int = 0) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=" " * lead, subsequent_indent=" " * indent)


def _cut(text: str, width: int) -> str:
    """Return ``text`` with its middle left out where it is longer than ``width``."""
    if len(text) <= width:
        return text
    left = (width - 3) // 2
    return f"{text[:left]}...{text[len(text) - (width - 3 - left) :]}"


def page_title(reports: Sequence[ReadReport]) -> str:
    """Return the title of the page."""
    names = list(dict.fromkeys(report.model.name for report in reports))
    return f"{', '.join(names)}: {len(reports)} runs compared"
