"""Charts of the report as inline SVG: quality over size, error over timesteps, training."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from mpq_deploy.report.data import ReportData
from mpq_deploy.report.shown_errors import ShownErrors
from mpq_deploy.report.svg import (
    BOTTOM,
    HEIGHT,
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
    segment,
    spread_out,
    x_axis,
    y_axis,
)
from mpq_deploy.report.words import decibels, error, percent, title_of

# Points nearer than this stand in one column.
COLUMN = 12


def size_quality_chart(data: ReportData) -> Markup | None:
    """PSNR over size of this plan, the controls and a sweep; None when no PSNR is finite."""
    variants = [("ours", data.size_ratio, data.psnr_db)]
    variants += [
        (key, control.size_ratio, control.psnr_db) for key, control in data.compared.items()
    ]
    points = [
        (key, title_of(key, data), ratio, psnr) for key, ratio, psnr in variants if psnr is not None
    ]
    if not points:
        return None
    curve = tuple(sorted((p.size_ratio, p.psnr_db) for p in data.curve if p.psnr_db is not None))
    x_ticks = nice_ticks([p[2] for p in points] + [c[0] for c in curve] + [data.budget], 6)
    y_ticks = nice_ticks([p[3] for p in points] + [c[1] for c in curve], 5)
    x = Axis(x_ticks[0], x_ticks[-1], LEFT, WIDTH - RIGHT)
    y = Axis(y_ticks[0], y_ticks[-1], HEIGHT - BOTTOM, TOP)
    parts = [
        y_axis(
            x, y, [(t, f"{t:g}") for t in y_ticks], "PSNR in dB: higher is closer to the original"
        ),
        x_axis(x, y, [(t, f"{100 * t:.3g} %") for t in x_ticks], "size, relative to FP16"),
        _budget_line(x, y, data.budget),
    ]
    if len(curve) > 1:
        parts.append(polyline(x, y, Series("ours", "", curve)))
    heights = _beside_each_other([(x(ratio), y(psnr)) for _, _, ratio, psnr in points])
    for (key, title, ratio, psnr), height in zip(points, heights, strict=True):
        at = (x(ratio), y(psnr))
        parts.append(marker(key, at, f"{title}: {percent(ratio)}, {decibels(psnr)}", 7))
        left = at[0] > WIDTH - LABEL_WIDTH
        offset, anchor = (-13, "end") if left else (13, "start")
        parts.append(label(at[0] + offset, height + 4, title, anchor, "label"))
    text = "; ".join(
        f"{title} {percent(ratio)}, {decibels(psnr)}" for _, title, ratio, psnr in points
    )
    return chart("size-quality", "Image quality over size", text, parts)


def timestep_chart(data: ReportData) -> Markup | None:
    """Error of the output over timesteps, from noise (left) to image; None when not measured."""
    rows = [
        ("ours", data.nmse_by_timestep),
        *((k, c.nmse_by_timestep) for k, c in data.compared.items()),
    ]
    series = [
        Series(key, title_of(key, data), tuple((i, v) for i, v in enumerate(values) if v > 0))
        for key, values in rows
        if len(values) == len(data.timesteps) and any(v > 0 for v in values)
    ]
    if not series or len(data.timesteps) < 2:
        return None
    decades = log_ticks([value for one in series for _, value in one.points])
    x = Axis(0, len(data.timesteps) - 1, LEFT + 12, WIDTH - LABEL_WIDTH)
    y = Axis(decades[0], decades[-1], HEIGHT - BOTTOM, TOP, log=True)
    every = max(1, -(-len(data.timesteps) // 10))
    ticks = [(float(i), f"{t:g}") for i, t in enumerate(data.timesteps) if i % every == 0]
    parts = [
        y_axis(
            x, y, [(d, power_label(d)) for d in decades], "relative squared error of the output"
        ),
        x_axis(x, y, ticks, "timestep: from noise (left) to image (right)"),
    ]
    heights = spread_out([y(one.points[-1][1]) for one in series], 17)
    for one, height in zip(series, heights, strict=True):
        parts.append(polyline(x, y, one))
        for index, value in one.points:
            text = f"{one.title}, timestep {data.timesteps[int(index)]:g}: {error(value)}"
            parts.append(marker(one.key, (x(index), y(value)), text, 4))
        parts.append(label(x.end + 12, height + 4, one.title, "start", "label"))
    text = "; ".join(
        f"{s.title} from {error(s.points[0][1])} to {error(s.points[-1][1])}" for s in series
    )
    return chart("timesteps", "Error of the output over timesteps", text, parts)


def prediction_chart(data: ReportData) -> Markup | None:
    """Predicted and measured error of the plan and the controls, on one logarithmic axis."""
    images = data.predicted_images
    shown = ShownErrors(images is not None)
    measured, psnr = shown.measured(data), None if images is None else images.psnr_db
    predicted = shown.predicted(data.predicted_nmse, psnr)
    if not measured or not predicted:
        return None
    rows = [("ours", [("predicted", predicted), ("measured", measured)])]
    for key, compared in data.compared.items():
        value = shown.measured(compared)
        rows += [(key, [("measured", value)])] if value else []
    decades = log_ticks([value for _, values in rows for _, value in values])
    height = TOP + 44 * len(rows) + BOTTOM
    x = Axis(decades[0], decades[-1], LABEL_WIDTH, WIDTH - RIGHT, log=True)
    y = Axis(0, len(rows), TOP - 8, height - BOTTOM)
    parts = [
        x_axis(
            x,
            y,
            [(d, power_label(d)) for d in decades],
            shown.axis,
            grid=True,
        )
    ]
    for number, (key, values) in enumerate(rows):
        level = y(number + 0.5)
        parts.append(label(x.start - 14, level + 4, title_of(key, data), "end", "label"))
        if len(values) == 2:
            parts.append(segment(key, x(values[0][1]), x(values[1][1]), level))
        for what, value in values:
            text = f"{title_of(key, data)}, {what}: {shown.text(value)}"
            parts.append(marker(key, (x(value), level), text, 7, hollow=what == "predicted"))
        parts.append(_beside(x, values, level, shown))
    text = "; ".join(
        f"{title_of(key, data)}, {what} {shown.text(value)}"
        for key, values in rows
        for what, value in values
    )
    return chart("prediction", "Predicted and measured error", text, parts, height)


def recovery_chart(data: ReportData) -> Markup | None:
    """Held-out error during training, over updates; None without recovery or error."""
    if (
        data.recovery is None
        or len(data.recovery.curve) < 2
        or min(e for _, e in data.recovery.curve) <= 0
    ):
        return None
    points = tuple((float(step), value) for step, value in data.recovery.curve)
    ticks = nice_ticks([step for step, _ in points], 6)
    ticks = [t for t in ticks if 0 <= t <= points[-1][0]]
    decades = log_ticks([value for _, value in points])
    x = Axis(0, points[-1][0], LEFT + 12, WIDTH - RIGHT - 12)
    y = Axis(decades[0], decades[-1], HEIGHT - BOTTOM, TOP, log=True)
    parts = [
        y_axis(
            x, y, [(d, power_label(d)) for d in decades], "relative squared error of the output"
        ),
        x_axis(x, y, [(t, f"{t:g}") for t in ticks], "updates"),
        polyline(x, y, Series("ours", "", points)),
    ]
    for step, value in points:
        kept = step == data.recovery.best_step
        text = f"{'kept: ' if kept else ''}update {step:g}: {error(value)}"
        parts.append(marker("ours", (x(step), y(value)), text, 7 if kept else 4, hollow=not kept))
    text = f"from {error(points[0][1])} to {error(data.recovery.after)} at update {data.recovery.best_step}"
    return chart("recovery", "Error while training", text, parts)


def _beside(
    x: Axis, values: Sequence[tuple[str, float]], level: float, shown: ShownErrors
) -> Markup:
    """Write a row's values on the side of its markers where there is more room."""
    text = ", ".join(f"{what} {shown.text(value)}" for what, value in values)
    places = [x(value) for _, value in values]
    if x.end - max(places) > min(places) - x.start:
        return label(max(places) + 14, level + 4, text, "start")
    return label(min(places) - 14, level + 4, text, "end")


def _beside_each_other(places: Sequence[tuple[float, float]]) -> list[float]:
    """Return label heights, moved apart for points in one column (plans of one size)."""
    heights = [y for _, y in places]
    columns: dict[int, list[int]] = {}
    for index, (x, _) in enumerate(places):
        first = next((i for i in columns if abs(places[i][0] - x) < COLUMN), index)
        columns.setdefault(first, []).append(index)
    for column in columns.values():
        for index, height in zip(column, spread_out([heights[i] for i in column], 16), strict=True):
            heights[index] = height
    return heights


def _budget_line(x: Axis, y: Axis, budget: float) -> Markup:
    drawn = Markup('<path class="budget" d="M{:.1f} {:.1f}V{:.1f}"/>').format(
        x(budget), y.start, y.end
    )
    return drawn + label(x(budget) + 6, y.start - 8, f"budget {percent(budget)}", "start", "tick")
