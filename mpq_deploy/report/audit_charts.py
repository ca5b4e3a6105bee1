"""Charts of an audit as inline SVG: rank correlations, predicted losses, quality over size."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib import resources

from markupsafe import Markup

from mpq_deploy.formats.scheme import SCHEMES
from mpq_deploy.report.svg import (
    BOTTOM,
    LABEL_WIDTH,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Axis,
    Series,
    chart,
    label,
    log_ticks,
    marker,
    nice_ticks,
    polyline,
    power_label,
    spread_out,
    x_axis,
    y_axis,
)
from mpq_deploy.report.words import decibels, error, percent
from mpq_deploy.studies.agreement import Correlation
from mpq_deploy.studies.audit_result import AuditResult, MetricResult, PlanPoint
from mpq_deploy.studies.compared_losses import TRUTH

ROW = 40
CORRELATION_WIDTH = 168
PANEL, PANEL_HEIGHT, COLUMNS = 200, 184, 3
QUALITY_HEIGHT = 400
NO_ORDER = "does not order layers"


def css_key(key: str) -> str:
    """Return a metric's key as a part of a CSS class."""
    return key.replace("+", "-")


def interval(correlation: Correlation) -> str:
    """Return a correlation with its interval: ``0.998 (0.997 to 0.999)``."""
    if correlation.rho is None:
        return NO_ORDER
    places = 3 if correlation.rho > 0.99 else 2
    parts = [
        f"{value:.{places}f}".replace("-", "−")
        for value in (correlation.rho, correlation.low, correlation.high)
    ]
    return f"{parts[0]} ({parts[1]} to {parts[2]})"


def correlation_chart(result: AuditResult) -> Markup | None:
    """Draw each metric's pooled rank correlation with its interval, and a dot per class of schemes."""
    rows = [(row, row.pooled) for row in result.metrics if row.pooled is not None]
    if not rows:
        return None
    low = min([0.0, *(c.low for _, c in rows if c.low is not None), *_class_values(result)])
    ticks = [t / 4 for t in range(-4, 5) if t / 4 >= low - 0.25]
    top, height = TOP + 16, TOP + 16 + ROW * len(rows) + BOTTOM
    x = Axis(ticks[0], 1.0, LABEL_WIDTH, WIDTH - CORRELATION_WIDTH)
    y = Axis(0, len(rows), top, height - BOTTOM)
    shown = [(t, f"{t:g}".replace("-", "−")) for t in ticks]
    parts = [
        x_axis(
            x, y, shown, "rank correlation with exhaustive measurement, within schemes", grid=True
        )
    ]
    parts.append(_legend(_families(result), LABEL_WIDTH))
    for number, (row, pooled) in enumerate(rows):
        level, key = y(number + 0.5), css_key(row.key)
        parts.append(label(x.start - 14, level + 4, row.title, "end", "label"))
        parts.append(label(x.end + 14, level + 4, interval(pooled), "start"))
        if pooled.rho is None or pooled.low is None or pooled.high is None:
            continue
        left, right = sorted((x(0.0), x(pooled.rho)))
        text = f"{row.title}: {interval(pooled)}"
        parts.append(
            Markup(
                '<path class="bar series-{}" d="M{:.1f} {:.1f}H{:.1f}v18H{:.1f}Z"><title>{}</title></path>'
            ).format(key, left, level - 9, right, left, text)
        )
        parts.append(_whisker_across(key, x(pooled.low), x(pooled.high), level))
        for family, found in (row.classes or {}).items():
            if found.rho is not None:
                parts.append(_dots(family, [(x(found.rho), level + 14)], large=True))
    text = "; ".join(f"{row.title} {interval(pooled)}" for row, pooled in rows)
    return chart("correlation", "Rank correlation with the truth", text, parts, height)


def scatter_chart(result: AuditResult) -> Markup | None:
    """Draw each metric's losses over the true ones, a panel per metric, both axes logarithmic."""
    rows = [row for row in result.metrics if row.pooled is not None]
    true = [
        loss[TRUTH]
        for loss in result.losses
        if loss[TRUTH] > 0 and SCHEMES[loss["scheme"]].quantized
    ]
    if not rows or not true:
        return None
    lines = -(-len(rows) // COLUMNS)
    top = TOP + 12
    parts = [_legend(_families(result), LEFT - 40)]
    for number, row in enumerate(rows):
        left = 40 + (number % COLUMNS) * PANEL
        upper = top + (number // COLUMNS) * PANEL_HEIGHT
        parts.append(_panel(result, row, true, left, upper))
    parts.append(
        label(
            WIDTH / 2,
            top + lines * PANEL_HEIGHT + 14,
            "true loss (exhaustive)",
            "middle",
            "axis-title",
        )
    )
    text = "; ".join(
        f"{row.title}: {interval(row.pooled)}" for row in rows if row.pooled is not None
    )
    height = top + lines * PANEL_HEIGHT + 26
    return chart(
        "scatter",
        "Losses of each metric over the true ones",
        f"Rank correlations: {text}",
        parts,
        height,
    )


def _panel(
    result: AuditResult, row: MetricResult, true: Sequence[float], left: float, upper: float
) -> Markup:
    points: dict[str, list[tuple[float, float]]] = {}
    for loss in result.losses:
        estimate = loss.get(row.key)
        if estimate and loss[TRUTH] > 0 and SCHEMES[loss["scheme"]].quantized:
            points.setdefault(SCHEMES[loss["scheme"]].family, []).append((loss[TRUTH], estimate))
    values = [estimate for family in points.values() for _, estimate in family] or [1.0]
    across = log_ticks(true)
    # Only the order of losses that predict no error counts: no ticks.
    up = log_ticks([*values, *true]) if row.calibration else [min(values) / 1.2, max(values) * 1.2]
    x = Axis(across[0], across[-1], left, left + PANEL - 36, log=True)
    y = Axis(up[0], up[-1], upper + PANEL_HEIGHT - 40, upper + 24, log=True)
    parts = [
        label(left, upper + 14, row.title, "start", "label"),
        Markup('<path class="axis" fill="none" d="M{:.1f} {:.1f}V{:.1f}H{:.1f}"/>').format(
            x.start, y.end, y.start, x.end
        ),
    ]
    for value, at in ((across[0], "start"), (across[-1], "end")):
        parts.append(label(x(value), y.start + 15, power_label(value), at, "tick small"))
    for value in (up[0], up[-1]) if row.calibration else ():
        parts.append(label(x.start - 4, y(value) + 4, power_label(value), "end", "tick small"))
    if row.calibration:
        low, high = max(across[0], up[0]), min(across[-1], up[-1])
        parts.append(
            Markup('<path class="diagonal" d="M{:.1f} {:.1f}L{:.1f} {:.1f}"/>').format(
                x(low), y(low), x(high), y(high)
            )
        )
    parts += [
        _dots(name, [(x(a), y(b)) for a, b in points[name]])
        for name in _families(result)
        if name in points
    ]
    return Markup("").join(parts)


def quality_chart(result: AuditResult, psnr: bool) -> Markup | None:
    """Draw each metric's plans over size: PSNR in dB, or the error with its standard error."""
    rows = [(row, [p for p in row.plans if _height(p, psnr) is not None]) for row in result.metrics]
    rows = [(row, points) for row, points in rows if points]
    if not rows:
        return None
    heights = [_height(p, psnr) or 0.0 for _, points in rows for p in points]
    sizes = [p.size_ratio or 0.0 for _, points in rows for p in points]
    x_ticks = nice_ticks(sizes, 5)
    x = Axis(x_ticks[0], x_ticks[-1], LEFT, WIDTH - LABEL_WIDTH - RIGHT)
    y_ticks = nice_ticks(heights, 6) if psnr else log_ticks(heights)
    y = Axis(y_ticks[0], y_ticks[-1], QUALITY_HEIGHT - BOTTOM, TOP, log=not psnr)
    named = [(t, f"{t:g}" if psnr else power_label(t)) for t in y_ticks]
    title = (
        "PSNR in dB: higher is closer to the original"
        if psnr
        else "relative squared error of the output"
    )
    parts = [
        y_axis(x, y, named, title),
        x_axis(x, y, [(t, f"{100 * t:.3g} %") for t in x_ticks], "size, relative to FP16"),
    ]
    places = spread_out([y(_height(points[-1], psnr) or 0.0) for _, points in rows], 16)
    for (row, points), place in zip(rows, places, strict=True):
        parts.append(_curve(x, y, row, points, psnr))
        parts.append(label(x.end + 12, place + 4, row.title, "start", "label"))
    text = "; ".join(
        f"{row.title}: {', '.join(_figure(p, psnr) for p in points)}" for row, points in rows
    )
    name = "quality-psnr" if psnr else "quality-nmse"
    return chart(name, "Quality of each metric's plans over size", text, parts, QUALITY_HEIGHT)


def _curve(x: Axis, y: Axis, row: MetricResult, points: Sequence[PlanPoint], psnr: bool) -> Markup:
    key = css_key(row.key)
    at = [(p.size_ratio or 0.0, _height(p, psnr) or 0.0) for p in points]
    parts = [polyline(x, y, Series(key, row.title, tuple(at)))]
    for point, (size, height) in zip(points, at, strict=True):
        if not psnr and point.nmse_error:
            low, high = (
                max(height - point.nmse_error, y.low),
                min(height + point.nmse_error, y.high),
            )
            parts.append(
                Markup('<path class="whisker series-{}" d="M{:.1f} {:.1f}V{:.1f}"/>').format(
                    key, x(size), y(low), y(high)
                )
            )
        text = f"{row.title}, {percent(size)}: {_figure(point, psnr)}"
        parts.append(marker(key, (x(size), y(height)), text, 4, hollow=row.key == "probe+cross"))
    return Markup("").join(parts)


def _height(point: PlanPoint, psnr: bool) -> float | None:
    return point.psnr_db if psnr else point.nmse or None


def _figure(point: PlanPoint, psnr: bool) -> str:
    return decibels(point.psnr_db, point.identical) if psnr else error(point.nmse)


def _families(result: AuditResult) -> list[str]:
    used = {
        SCHEMES[loss["scheme"]].family
        for loss in result.losses
        if SCHEMES[loss["scheme"]].quantized
    }
    return [
        family for family in dict.fromkeys(s.family for s in SCHEMES.values()) if family in used
    ]


def _class_values(result: AuditResult) -> list[float]:
    return [
        c.rho for row in result.metrics for c in (row.classes or {}).values() if c.rho is not None
    ]


def _legend(families: Sequence[str], left: float) -> Markup:
    parts = []
    for number, family in enumerate(families):
        parts.append(_dots(family, [(left + 82 * number + 6, 14)], large=True))
        parts.append(label(left + 82 * number + 16, 18, family, "start"))
    return Markup("").join(parts)


def _dots(family: str, places: Sequence[tuple[float, float]], large: bool = False) -> Markup:
    """Draw points of a family of schemes as one path: zero-length lines with round ends."""
    path = "".join(f"M{x:.1f} {y:.1f}h0" for x, y in places)
    kind = "dots large" if large else "dots"
    return Markup('<path class="{} scheme-{}" d="{}"/>').format(kind, family, path)


def _whisker_across(key: str, start: float, end: float, level: float) -> Markup:
    return Markup(
        '<path class="whisker series-{}" d="M{:.1f} {:.1f}v8M{:.1f} {:.1f}H{:.1f}M{:.1f} {:.1f}v8"/>'
    ).format(key, start, level - 4, start, level, end, end, level - 4)


def standalone(drawn: Markup) -> str:
    """Return a chart as an SVG file of its own, with the page's light colours and chart rules."""
    css = (resources.files("mpq_deploy.report") / "templates" / "style.css").read_text(
        encoding="utf-8"
    )
    light = css[: css.index("}") + 1]
    rules = [
        line for line in css.splitlines() if line.startswith((".chart ", "[class*=", ".scheme-"))
    ]
    width, height = re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', drawn)[0]
    style = "\n".join([light, ".chart { font-family: system-ui, sans-serif; }", *rules])
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
    body = str(drawn).replace("<svg ", head, 1)
    back = f'<style>{style}</style><rect width="{width}" height="{height}" fill="#ffffff"/>'
    end = body.index(">") + 1
    return body[:end] + back + body[end:] + "\n"
