"""audit.html, audit.md and audit.json with their pictures, and the tables for the terminal."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from markupsafe import Markup

from mpq_deploy.evaluate.cache import write_aside
from mpq_deploy.report import words
from mpq_deploy.report.audit_charts import (
    NO_ORDER,
    correlation_chart,
    css_key,
    interval,
    quality_chart,
    scatter_chart,
    standalone,
)
from mpq_deploy.report.markdown import plain, table
from mpq_deploy.report.page import rendered
from mpq_deploy.studies.agreement import Calibration, Correlation
from mpq_deploy.studies.audit_result import AuditResult, MetricResult, PlanPoint
from mpq_deploy.studies.compared_losses import TRUTH

NAMES = ("audit.json", "audit.md", "audit.html")
# Budgets side by side in the terminal's table of plans: 80 columns hold no more.
BUDGETS_ACROSS = 5


def write_audit(result: AuditResult, folder: Path) -> tuple[Path, ...]:
    """Write audit.json, audit.md, audit.html and audit-NAME.svg; return the paths."""
    charts = {name: drawn for name, drawn in _charts(result).items() if drawn is not None}
    made = {f"audit-{name}.svg": standalone(drawn) for name, drawn in charts.items()}
    made["audit.json"] = (
        json.dumps(result.as_json(), indent=1, sort_keys=True, allow_nan=False) + "\n"
    )
    made["audit.md"] = audit_markdown(result, tuple(charts))
    made["audit.html"] = audit_page(result)
    for name, text in made.items():
        write_aside(folder / name, text.encode())
    return tuple(folder / name for name in made)


def _charts(result: AuditResult) -> dict[str, Markup | None]:
    return {
        "correlation": correlation_chart(result),
        "scatter": scatter_chart(result),
        "nmse": quality_chart(result, psnr=False),
        "psnr": quality_chart(result, psnr=True),
    }


def audit_page(result: AuditResult) -> str:
    """Return audit.html: one page that fetches nothing."""
    return rendered(
        "audit.html.j2",
        result=result,
        charts=_charts(result),
        findings=findings(result),
        agreement=agreement_rows(result),
        of_images=image_rows(result),
        about_images=_about_images(result),
        classes=class_names(result),
        errors=plan_rows(result, nmse_cell),
        quality=plan_rows(result, psnr_cell),
        about=(_about(result), _about_plans(result)),
        remarks=[*result.notes, *metric_notes(result)],
        key=css_key,
    )


def audit_markdown(result: AuditResult, pictures: Sequence[str] = ()) -> str:
    """Return audit.md; ``pictures`` are the names of the charts that lie beside it."""
    header = (
        "metric",
        "rank correlation (95 %)",
        *class_names(result),
        "predicted / true (10 to 90 %)",
        "CPU s",
    )
    budgets = [f"{budget:g}" for budget in result.budgets]
    parts = [
        f"# Which sensitivity to trust: {plain(result.model)}",
        f"```sh\n{result.command}\n```",
        *([f"> **Note:** {plain(result.synthetic)}"] if result.synthetic else []),
        " ".join(plain(line) for line in findings(result)),
        "## Agreement with exhaustive measurement",
        _about(result),
        table(header, agreement_rows(result)),
        *_picture("correlation", "Rank correlation of each metric with the truth", pictures),
        *_picture("scatter", "Losses of each metric over the true ones", pictures),
        *_images_markdown(result),
        "## Plans at the same budgets",
        _about_plans(result),
        table(("NMSE of the output", *budgets), plan_rows(result, nmse_cell)),
        table(("PSNR dB", *budgets), plan_rows(result, psnr_cell)),
        *_picture("nmse", "Error of each metric's plans over size", pictures),
        *_picture("psnr", "PSNR of each metric's plans over size", pictures),
        "## Notes",
        "\n".join(f"- {plain(note)}" for note in [*result.notes, *metric_notes(result)]),
        ", ".join(
            f"{plain(name)} {plain(version)}" for name, version in sorted(result.versions.items())
        ),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def findings(result: AuditResult) -> list[str]:
    """Summarize in sentences which metric ranks layers best, and what orthogonality is worth."""
    ordered = [
        (row, row.pooled)
        for row in result.metrics
        if row.pooled is not None and row.pooled.rho is not None
    ]
    parts = []
    if ordered:
        best, correlation = max(ordered, key=lambda pair: pair[1].rho or -1.0)
        parts.append(
            f"Best agreement with exhaustive measurement: {best.title}, rank correlation {interval(correlation)}."
        )
    of_images = [(row, row.images) for row in result.metrics if row.images and row.images.rho]
    if of_images:
        best, correlation = max(of_images, key=lambda pair: pair[1].rho or -1.0)
        parts.append(
            f"Best agreement with the error of final images: {best.title}, rank correlation {interval(correlation)}."
        )
    orm = result.metric("orm")
    if orm is not None and orm.pooled is not None and orm.pooled.rho is not None:
        parts.append(
            f"Does orthogonality capture quantization sensitivity? {_verdict(orm.pooled)}: its rank correlation is "
            f"{interval(orm.pooled)}."
        )
        parts += _orm_plans(result, orm)
    return parts


def _verdict(correlation: Correlation) -> str:
    """Put an interval into words. The bounds are our choice."""
    low, high = correlation.low or 0.0, correlation.high or 0.0
    if low > 0.7:
        return "Here it does"
    if low > 0:
        return "Here only in part"
    return "Here it does not" if high > 0 else "Here it ranks layers in reverse"


def _orm_plans(result: AuditResult, orm: MetricResult) -> list[str]:
    """Compare orm's plans with those of its controls and of the best metric, budget by budget."""
    others = [
        row
        for key in ("size-only", "random", "probe")
        if (row := result.metric(key)) is not None and row.plans
    ]
    parts = []
    for number, point in enumerate(orm.plans):
        beside = [
            (row.title, row.plans[number].nmse)
            for row in others
            if row.plans[number].nmse is not None
        ]
        if point.nmse is not None and beside:
            listed = ", ".join(f"{title} {words.error(found)}" for title, found in beside)
            parts.append(f"at {point.budget:g} {words.error(point.nmse)} ({listed})")
    return [f"The error of its plans: {'; '.join(parts)}."] if parts else []


def class_names(result: AuditResult) -> list[str]:
    """Return the classes of schemes that any metric was compared on, in their order."""
    return list(dict.fromkeys(name for row in result.metrics for name in (row.classes or {})))


def agreement_rows(result: AuditResult) -> list[list[str]]:
    """Return a row per metric: title, pooled correlation, one per class, calibration, seconds."""
    rows = []
    for row in result.metrics:
        if row.refused:
            rows.append([row.title, "not measured", *[""] * len(class_names(result)), "", ""])
        elif row.pooled is not None:
            classes = [_rho((row.classes or {}).get(name)) for name in class_names(result)]
            rows.append(
                [
                    row.title,
                    interval(row.pooled),
                    *classes,
                    _calibration(row),
                    _seconds(row.seconds),
                ]
            )
    truth = result.metric(TRUTH)
    blank = [""] * (len(class_names(result)) + 1)
    rows.append(
        [truth.title if truth else TRUTH, "the truth", *blank, _seconds(result.truth.seconds)]
    )
    return rows


def image_rows(result: AuditResult) -> list[list[str]]:
    """Return a row per metric that was compared with the errors of final images; empty without them."""
    return [
        [row.title, interval(row.images), _spread(row.images_calibration)]
        for row in result.metrics
        if row.images is not None
    ]


def _images_markdown(result: AuditResult) -> list[str]:
    if result.image_seconds is None:
        return []
    titles = ("metric", "rank correlation (95 %)", "predicted / true (10 to 90 %)")
    return [
        "## Agreement with the error of final images",
        _about_images(result),
        table(titles, image_rows(result)),
    ]


def _about_images(result: AuditResult) -> str:
    used, seconds = result.evaluation, _seconds(result.image_seconds)
    return (
        f"The same pairs, one layer quantized at a time, by the mean squared error of {used['images']} images of "
        f"{used['steps']} steps, from noise that nothing was fitted on ({seconds} CPU seconds). Only trajectory probes "
        "predict this error; other metrics can order layers by theirs."
    )


def plan_rows(result: AuditResult, cell: Callable[[PlanPoint], str]) -> list[list[str]]:
    """Return a row for each metric that has plans: title and a cell per budget."""
    return [[row.title, *map(cell, row.plans)] for row in result.metrics if row.plans]


def nmse_cell(point: PlanPoint) -> str:
    """Return an error with its relative standard error, or the size that would be feasible."""
    if point.nmse is None:
        return _needs(point)
    if not point.nmse:
        return "0"
    return f"{point.nmse:.1e} ± {(point.nmse_error or 0.0) / point.nmse:.0%}"


def psnr_cell(point: PlanPoint) -> str:
    """Return a PSNR, or the size that would be feasible."""
    if point.identical:
        return "same"
    return _needs(point) if point.psnr_db is None else f"{point.psnr_db:.1f}"


def metric_notes(result: AuditResult) -> list[str]:
    """Return the metrics' notes, why some were not measured, and the budgets that no plan fits."""
    parts = []
    for row in result.metrics:
        refused = [point.refused for point in row.plans if point.refused]
        parts += [f"{row.title}: {note}" for note in (*row.notes, row.refused, *refused) if note]
    return parts


def audit_table(result: AuditResult) -> str:
    """Return the tables for the terminal, at most 80 columns wide."""
    lines = [
        f"{'metric':<20} {'rank correlation (95 %)':<26} {'predicted / true':>16} {'CPU s':>8}"
    ]
    for row in agreement_rows(result):
        calibration = row[-2].split(" (")[0]
        lines.append(f"{row[0]:<20} {row[1]:<26} {calibration:>16} {row[-1]:>8}")
    if result.image_seconds is not None:
        lines += ["", f"{'error of final images':<47} {'predicted / true':>16}"]
        for title, found, spread in image_rows(result):
            lines.append(f"{title:<20} {found:<26} {spread.split(' (')[0]:>16}")
    for start in range(0, len(result.budgets), BUDGETS_ACROSS):
        chosen = slice(start, start + BUDGETS_ACROSS)
        lines += [
            "",
            f"{'NMSE of the plan at':<20}" + "".join(f" {b:>10g}" for b in result.budgets[chosen]),
        ]
        for metric in result.metrics:
            if metric.plans:
                lines.append(
                    f"{metric.title:<20}"
                    + "".join(f" {_short(p):>10}" for p in metric.plans[chosen])
                )
    return "\n".join(lines)


def _short(point: PlanPoint) -> str:
    return _needs(point) if point.nmse is None else f"{point.nmse:.2e}"


def _needs(point: PlanPoint) -> str:
    # The floor in bytes is in audit.json and in the notes.
    return "no plan"


def _rho(correlation: Correlation | None) -> str:
    if correlation is None or correlation.rho is None:
        return "–"
    return f"{correlation.rho:.3f}".replace("-", "−")


def _calibration(row: MetricResult) -> str:
    return _spread(row.calibration)


def _spread(calibration: Calibration | None) -> str:
    return (
        "–"
        if calibration is None
        else f"{calibration.median:.2f} ({calibration.low:.2f} to {calibration.high:.2f})"
    )


def _seconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds:.1f}"


def _about(result: AuditResult) -> str:
    truth = result.truth
    which = "every" if truth.complete else f"{truth.pairs} of {truth.of}"
    return (
        f"The truth is measured exhaustively: one layer quantized at a time, the denoiser run, its output "
        f"compared. {which.capitalize()} "
        f"(layer, scheme) {'pair' if truth.complete else 'pairs'} of {result.layers} layers"
        f"{f' ({truth.pairs})' if truth.complete else ''}, {result.calls} calls at each of {result.timesteps} "
        f"timesteps. {NO_ORDER.capitalize()}: the metric gives all layers the same value. Seconds are CPU seconds."
    )


def _about_plans(result: AuditResult) -> str:
    used = result.evaluation
    return (
        f"Measured on {used['images']} images of {used['steps']} steps, from noise that nothing was fitted on: "
        "the error of "
        "the denoiser's output with its standard error over images, and the PSNR of the images from the same noise."
    )


def _picture(name: str, alt: str, pictures: Sequence[str]) -> list[str]:
    return [f"![{alt}](audit-{name}.svg)"] if name in pictures else []
