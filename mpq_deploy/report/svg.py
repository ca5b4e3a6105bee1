"""What charts are drawn with: axes, ticks, lines, markers and frame, as inline SVG.

Coloured by the page's CSS variables, for light and dark. Series differ by marker, dash and label as
well as by colour; a description serves screen readers. ``Markup.format`` escapes text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from mpq_deploy.report.words import error

WIDTH, HEIGHT = 640, 320
LEFT, RIGHT, TOP, BOTTOM = 68, 24, 32, 52
# Room for series' names at the right end of their lines.
LABEL_WIDTH = 156
# A series is known by its marker and dash as well as by the colour that CSS gives to its class.
DASHES = {
    "int8": "7 4",
    "int8-static": "7 2 2 2",
    "int4": "2 4",
    "size-only": "9 3 2 3",
    "random": "1 3",
    "exhaustive": "2 3",
    "probe-cross": "7 3",
    "gain": "11 3",
    "kurtosis": "5 2 1 2",
}
CIRCLE, SQUARE, UP, DOWN, DIAMOND = "circle", "square", "triangle up", "triangle down", "diamond"
SHAPES = {
    "ours": CIRCLE,
    "int8": SQUARE,
    "int8-static": DIAMOND,
    "int4": UP,
    "random": DOWN,
    "probe": CIRCLE,
    "probe-cross": CIRCLE,
    "trajectory": DOWN,
    "gain": SQUARE,
    "local_error": UP,
    "exhaustive": SQUARE,
}


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
            (math.log10(v) for v in (self.low, self.high, value))
            if self.log
            else (self.low, self.high, value)
        )
        return self.start + (value - low) / (high - low) * (self.end - self.start)


@dataclass(frozen=True)
class Series:
    """A named row of points. ``key`` picks colour, marker and dash."""

    key: str
    title: str
    points: tuple[tuple[float, float], ...]


def nice_ticks(values: Sequence[float], count: int) -> list[float]:
    """Return evenly spaced round numbers that enclose ``values`` with room on both sides."""
    low, high = min(values), max(values)
    room = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
    low, high = low - room, high + room
    rough = (high - low) / count
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


def power_label(decade: float) -> str:
    """Return a power of ten as text: ``10⁻³``."""
    return error(decade).removeprefix("1.0 × ")


def label(x: float, y: float, text: str, anchor: str = "middle", kind: str = "tick") -> Markup:
    """Write ``text`` at a place; ``kind`` is its CSS class."""
    return Markup('<text class="{}" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(
        kind, x, y, anchor, text
    )


def x_axis(
    x: Axis, y: Axis, ticks: Sequence[tuple[float, str]], title: str, grid: bool = False
) -> Markup:
    """Draw the axis below, with its ticks and title, and with ``grid`` a line up from each tick."""
    bottom, top = max(y.start, y.end), min(y.start, y.end)
    parts = [
        Markup('<path class="axis" d="M{:.1f} {:.1f}H{:.1f}"/>').format(x.start, bottom, x.end)
    ]
    for value, name in ticks:
        if grid:
            parts.append(
                Markup('<path class="grid" d="M{:.1f} {:.1f}V{:.1f}"/>').format(
                    x(value), bottom, top
                )
            )
        parts.append(label(x(value), bottom + 18, name))
    parts.append(label((x.start + x.end) / 2, bottom + 42, title, "middle", "axis-title"))
    return Markup("").join(parts)


def y_axis(x: Axis, y: Axis, ticks: Sequence[tuple[float, str]], title: str) -> Markup:
    """Draw a line across at every tick, the ticks' labels on the left, and the title on top."""
    parts = []
    for value, name in ticks:
        parts.append(
            Markup('<path class="grid" d="M{:.1f} {:.1f}H{:.1f}"/>').format(
                x.start, y(value), x.end
            )
        )
        parts.append(label(x.start - 10, y(value) + 4, name, "end"))
    parts.append(label(8, 14, title, "start", "axis-title"))
    return Markup("").join(parts)


def polyline(x: Axis, y: Axis, series: Series) -> Markup:
    """Join the points of a series."""
    path = "M" + "L".join(f"{x(a):.1f} {y(b):.1f}" for a, b in series.points)
    return Markup('<path class="line series-{}" stroke-dasharray="{}" d="{}"/>').format(
        series.key, DASHES.get(series.key, "none"), path
    )


def segment(key: str, start: float, end: float, y: float) -> Markup:
    """Draw a level line in the colour of ``key``."""
    return Markup('<path class="line series-{}" d="M{:.1f} {:.1f}H{:.1f}"/>').format(
        key, start, y, end
    )


def marker(
    key: str, at: tuple[float, float], title: str, radius: float, hollow: bool = False
) -> Markup:
    """Draw a point whose shape (``SHAPES``, else a diamond) tells the series."""
    (x, y), r = at, radius
    shapes = {
        CIRCLE: f"M{x - r:.1f} {y:.1f}a{r} {r} 0 1 0 {2 * r} 0a{r} {r} 0 1 0 {-2 * r} 0Z",
        SQUARE: f"M{x - r:.1f} {y - r:.1f}h{2 * r}v{2 * r}h{-2 * r}Z",
        UP: f"M{x:.1f} {y - 1.2 * r:.1f}l{1.15 * r:.1f} {2 * r:.1f}h{-2.3 * r:.1f}Z",
        DOWN: f"M{x:.1f} {y + 1.2 * r:.1f}l{1.15 * r:.1f} {-2 * r:.1f}h{-2.3 * r:.1f}Z",
    }
    d = 1.3 * r
    shapes[DIAMOND] = f"M{x:.1f} {y - d:.1f}l{d:.1f} {d:.1f}l{-d:.1f} {d:.1f}l{-d:.1f} {-d:.1f}Z"
    kind = "marker hollow" if hollow else "marker"
    return Markup('<path class="{} series-{}" d="{}"><title>{}</title></path>').format(
        kind, key, shapes[SHAPES.get(key, DIAMOND)], title
    )


def chart(
    name: str, title: str, described: str, parts: Sequence[Markup], height: float = HEIGHT
) -> Markup:
    """Put the parts into the frame of a chart; ``described`` is its text for screen readers."""
    head = Markup(
        '<svg class="chart" viewBox="0 0 {} {:g}" role="img" aria-labelledby="{}-title {}-desc">'
        '<title id="{}-title">{}</title><desc id="{}-desc">{}</desc>'
    ).format(WIDTH, height, name, name, name, title, name, described)
    return head + Markup("").join(parts) + Markup("</svg>")
