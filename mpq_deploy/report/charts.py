"""Charts as inline SVG: small, crisp, coloured by the page's CSS variables, so that they follow light and dark.

Every chart tells series apart by marker, dash and label as well as by colour, and has a description for screen
readers. Text goes through ``Markup.format``, which escapes it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from mpq_deploy.report.data import ReportData
from mpq_deploy.report.words import decibels, error, percent, title_of

WIDTH, HEIGHT = 640, 320
LEFT, RIGHT, TOP, BOTTOM = 68, 24, 32, 52
# Room for series' names at the right end of their lines.
LABEL_WIDTH = 156
# Points nearer than this stand in one column.
COLUMN = 12
# A series is known by its marker and dash as well as by the colour that CSS gives to its class.
DASHES = {"int8": "7 4", "int4": "2 4", "size-only": "9 3 2 3", "random": "1 3"}


@dataclass(frozen=True)
class Axis:
    """Maps values from ``low`` to ``high`` to pixels from ``start`` to ``end``."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Return the pixel of ``value``."""
        low, high, value = (
            (math.log10(v) for v in (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        )
        return self.start + (value - low) / (high - low) * (self.end - self.start)


@dataclass(frozen=True)
class Series:
    """A named row of points. ``key`` picks colour, marker and dash."""

    key: str
    title: str
    points: tuple[tuple[float, float], ...]


def size_quality_chart(data: ReportData) -> Markup | None:
    """PSNR over size: this plan, the controls, measured budgets of a sweep, and the budget as a line.

    None when no PSNR is finite.
    """
    found = [("ours", data.size_ratio, data.psnr_db)]
    found += [(key, control.size_ratio, control.psnr_db) for key, control in data.compared.items()]
    points = [(key, title_of(key, data), ratio, psnr) for key, ratio, psnr in found if psnr is not None]
    if not points:
        return None
    curve = tuple(sorted((p.size_ratio, p.psnr_db) for p in data.curve if p.psnr_db is not None))
    x_ticks = nice_ticks([p[2] for p in points] + [c[0] for c in curve] + [data.budget], 6)
    y_ticks = nice_ticks([p[3] for p in points] + [c[1] for c in curve], 5)
    x = Axis(x_ticks[0], x_ticks[-1], LEFT, WIDTH - RIGHT)
    y = Axis(y_ticks[0], y_ticks[-1], HEIGHT - BOTTOM, TOP)
    parts = [
        _y_axis(x, y, [(t, f"{t:g}") for t in y_ticks], "PSNR in dB: higher is closer to the original"),
        _x_axis(x, y, [(t, f"{100 * t:.3g} %") for t in x_ticks], "size, relative to FP16"),
        _budget_line(x, y, data.budget),
    ]
    if len(curve) > 1:
        parts.append(_line(x, y, Series("ours", "", curve)))
    heights = _beside_each_other([(x(ratio), y(psnr)) for _, _, ratio, psnr in points])
    for (key, title, ratio, psnr), height in zip(points, heights, strict=True):
        at = (x(ratio), y(psnr))
        parts.append(_marker(key, at, f"{title}: {percent(ratio)}, {decibels(psnr)}", 7))
        left = at[0] > WIDTH - LABEL_WIDTH
        offset, anchor = (-13, "end") if left else (13, "start")
        parts.append(_text(at[0] + offset, height + 4, title, anchor, "label"))
    said = "; ".join(f"{title} {percent(ratio)}, {decibels(psnr)}" for _, title, ratio, psnr in points)
    return _svg("size-quality", "Image quality over size", said, parts)


def timestep_chart(data: ReportData) -> Markup | None:
    """Error of the denoiser's output over timesteps, from noise (left) to image; None when it was not measured."""
    rows = [("ours", data.nmse_by_timestep), *((k, c.nmse_by_timestep) for k, c in data.compared.items())]
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
        _y_axis(x, y, [(d, _power(d)) for d in decades], "relative squared error of the output"),
        _x_axis(x, y, ticks, "timestep: from noise (left) to image (right)"),
    ]
    heights = spread_out([y(one.points[-1][1]) for one in series], 17)
    for one, height in zip(series, heights, strict=True):
        parts.append(_line(x, y, one))
        for index, value in one.points:
            said = f"{one.title}, timestep {data.timesteps[int(index)]:g}: {error(value)}"
            parts.append(_marker(one.key, (x(index), y(value)), said, 4))
        parts.append(_text(x.end + 12, height + 4, one.title, "start", "label"))
    said = "; ".join(f"{s.title} from {error(s.points[0][1])} to {error(s.points[-1][1])}" for s in series)
    return _svg("timesteps", "Error of the output over timesteps", said, parts)


def prediction_chart(data: ReportData) -> Markup | None:
    """Predicted and measured error of the plan, and the controls' measured ones, on one logarithmic axis."""
    if not data.measured_nmse or not data.predicted_nmse:
        return None
    rows = [("ours", [("predicted", data.predicted_nmse), ("measured", data.measured_nmse)])]
    rows += [(key, [("measured", c.measured_nmse)]) for key, c in data.compared.items() if c.measured_nmse]
    decades = log_ticks([value for _, values in rows for _, value in values])
    height = TOP + 44 * len(rows) + BOTTOM
    x = Axis(decades[0], decades[-1], LABEL_WIDTH, WIDTH - RIGHT, log=True)
    y = Axis(0, len(rows), TOP - 8, height - BOTTOM)
    parts = [_x_axis(x, y, [(d, _power(d)) for d in decades], "relative squared error of the output", grid=True)]
    for number, (key, values) in enumerate(rows):
        level = y(number + 0.5)
        parts.append(_text(x.start - 14, level + 4, title_of(key, data), "end", "label"))
        if len(values) == 2:
            parts.append(_segment(key, x(values[0][1]), x(values[1][1]), level))
        for what, value in values:
            said = f"{title_of(key, data)}, {what}: {error(value)}"
            parts.append(_marker(key, (x(value), level), said, 7, hollow=what == "predicted"))
        parts.append(_beside(x, values, level))
    said = "; ".join(f"{title_of(key, data)}, {what} {error(value)}" for key, values in rows for what, value in values)
    return _svg("prediction", "Predicted and measured error", said, parts, height)


def _beside(x: Axis, values: Sequence[tuple[str, float]], level: float) -> Markup:
    """Write a row's values on the side of its markers where there is more room."""
    text = ", ".join(f"{what} {error(value)}" for what, value in values)
    places = [x(value) for _, value in values]
    if x.end - max(places) > min(places) - x.start:
        return _text(max(places) + 14, level + 4, text, "start")
    return _text(min(places) - 14, level + 4, text, "end")


def nice_ticks(values: Sequence[float], wanted: int) -> list[float]:
    """Return evenly spaced round numbers that enclose ``values``, with room to spare on both sides."""
    low, high = min(values), max(values)
    room = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
    low, high = low - room, high + room
    rough = (high - low) / wanted
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * magnitude for factor in (1, 2, 2.5, 5, 10) if factor * magnitude >= rough)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(number * step, 12) for number in range(first, last + 1)]


def log_ticks(values: Sequence[float]) -> list[float]:
    """Return the powers of ten that enclose positive ``values``: at least two."""
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    return [10.0**power for power in range(low, max(high, low + 1) + 1)]


def spread_out(heights: Sequence[float], distance: float) -> list[float]:
    """Move labels apart so that any two are ``distance`` from each other, keeping their order."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    moved = [float(height) for height in heights]
    for _ in range(10 * len(moved)):
        for below, above in zip(order[1:], order, strict=False):
            overlap = distance - (moved[below] - moved[above])
            if overlap > 1e-6:
                moved[below] += overlap / 2
                moved[above] -= overlap / 2
    return moved


def _beside_each_other(places: Sequence[tuple[float, float]]) -> list[float]:
    """Return heights for labels beside points: those of points in one column (plans of one size) are moved apart."""
    heights = [y for _, y in places]
    columns: dict[int, list[int]] = {}
    for index, (x, _) in enumerate(places):
        first = next((i for i in columns if abs(places[i][0] - x) < COLUMN), index)
        columns.setdefault(first, []).append(index)
    for column in columns.values():
        for index, height in zip(column, spread_out([heights[i] for i in column], 16), strict=True):
            heights[index] = height
    return heights


def _power(decade: float) -> str:
    return error(decade).removeprefix("1.0 × ")


def _text(x: float, y: float, text: str, anchor: str = "middle", kind: str = "tick") -> Markup:
    return Markup('<text class="{}" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(kind, x, y, anchor, text)


def _x_axis(x: Axis, y: Axis, ticks: Sequence[tuple[float, str]], title: str, grid: bool = False) -> Markup:
    bottom, top = max(y.start, y.end), min(y.start, y.end)
    parts = [Markup('<path class="axis" d="M{:.1f} {:.1f}H{:.1f}"/>').format(x.start, bottom, x.end)]
    for value, label in ticks:
        if grid:
            parts.append(Markup('<path class="grid" d="M{:.1f} {:.1f}V{:.1f}"/>').format(x(value), bottom, top))
        parts.append(_text(x(value), bottom + 18, label))
    parts.append(_text((x.start + x.end) / 2, bottom + 42, title, "middle", "axis-title"))
    return Markup("").join(parts)


def _y_axis(x: Axis, y: Axis, ticks: Sequence[tuple[float, str]], title: str) -> Markup:
    parts = []
    for value, label in ticks:
        parts.append(Markup('<path class="grid" d="M{:.1f} {:.1f}H{:.1f}"/>').format(x.start, y(value), x.end))
        parts.append(_text(x.start - 10, y(value) + 4, label, "end"))
    parts.append(_text(8, 14, title, "start", "axis-title"))
    return Markup("").join(parts)


def _budget_line(x: Axis, y: Axis, budget: float) -> Markup:
    line = Markup('<path class="budget" d="M{:.1f} {:.1f}V{:.1f}"/>').format(x(budget), y.start, y.end)
    return line + _text(x(budget) + 6, y.start - 8, f"budget {percent(budget)}", "start", "tick")


def _line(x: Axis, y: Axis, series: Series) -> Markup:
    path = "M" + "L".join(f"{x(a):.1f} {y(b):.1f}" for a, b in series.points)
    return Markup('<path class="line series-{}" stroke-dasharray="{}" d="{}"/>').format(
        series.key, DASHES.get(series.key, "none"), path
    )


def _segment(key: str, start: float, end: float, y: float) -> Markup:
    return Markup('<path class="line series-{}" d="M{:.1f} {:.1f}H{:.1f}"/>').format(key, start, y, end)


def _marker(key: str, at: tuple[float, float], said: str, radius: float, hollow: bool = False) -> Markup:
    """Draw a point whose shape tells the series: circle ours, square INT8, triangles INT4 and random, else diamond."""
    (x, y), r = at, radius
    shapes = {
        "ours": f"M{x - r:.1f} {y:.1f}a{r} {r} 0 1 0 {2 * r} 0a{r} {r} 0 1 0 {-2 * r} 0Z",
        "int8": f"M{x - r:.1f} {y - r:.1f}h{2 * r}v{2 * r}h{-2 * r}Z",
        "int4": f"M{x:.1f} {y - 1.2 * r:.1f}l{1.15 * r:.1f} {2 * r:.1f}h{-2.3 * r:.1f}Z",
        "random": f"M{x:.1f} {y + 1.2 * r:.1f}l{1.15 * r:.1f} {-2 * r:.1f}h{-2.3 * r:.1f}Z",
    }
    d = 1.3 * r
    diamond = f"M{x:.1f} {y - d:.1f}l{d:.1f} {d:.1f}l{-d:.1f} {d:.1f}l{-d:.1f} {-d:.1f}Z"
    kind = "marker hollow" if hollow else "marker"
    return Markup('<path class="{} series-{}" d="{}"><title>{}</title></path>').format(
        kind, key, shapes.get(key, diamond), said
    )


def _svg(name: str, title: str, said: str, parts: Sequence[Markup], height: float = HEIGHT) -> Markup:
    head = Markup(
        '<svg class="chart" viewBox="0 0 {} {:g}" role="img" aria-labelledby="{}-title {}-desc">'
        '<title id="{}-title">{}</title><desc id="{}-desc">{}</desc>'
    ).format(WIDTH, height, name, name, name, title, name, said)
    return head + Markup("").join(parts) + Markup("</svg>")
