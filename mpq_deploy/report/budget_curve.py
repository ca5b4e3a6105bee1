"""The curve of size against predicted error, with every budget's plan behind it, for the slider.

In: ``BudgetPlans`` and the measurements. Out: an inline SVG, the table of its points, and the
values that the page's script shows when the slider moves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from mpq_deploy.report.data import BudgetPlans, ReportData
from mpq_deploy.report.network import family, in_order
from mpq_deploy.report.svg import (
    BOTTOM,
    HEIGHT,
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
from mpq_deploy.report.words import count, error, percent, size, title_of

# Room for the names of points at the right end.
LABEL_ROOM = 150
# Decades drawn below the smallest measured error: a vanishing one would only stretch the axis.
DECADES_BELOW = 2


@dataclass(frozen=True)
class Mark:
    """A plan on the curve: measured (filled) and predicted (hollow). ``key`` picks the marker."""

    key: str
    title: str
    size_ratio: float
    measured: float | None = None
    predicted: float | None = None


@dataclass(frozen=True)
class Stop:
    """A position of the slider: a plan of the grid or this run's own (``BudgetPlan.schemes``)."""

    size_bytes: int
    size_ratio: float
    predicted: float | None
    schemes: tuple[int, ...]
    own: bool = False


@dataclass(frozen=True)
class BudgetView:
    """What the page shows: the curve, the stops as rows, the first stop, the script's values."""

    chart: Markup | None
    rows: list[list[str]]
    stops: tuple[Stop, ...]
    start: int
    values: dict[str, object]
    command: str
    simulated: bool
    unfinished: str
    families: list[str]

    @property
    def has_own(self) -> bool:
        """Whether one of the stops is the plan of the run that the page is about."""
        return any(stop.own for stop in self.stops)


def budget_view(data: ReportData) -> BudgetView | None:
    """Return the view of a run, its own plan among the stops; None without other plans."""
    if data.budgets is None or not data.budgets.plans:
        return None
    plans, own = _with_own(data.budgets, data)
    marks = [
        Mark(
            "ours", title_of("ours", data), data.size_ratio, data.measured_nmse, data.predicted_nmse
        )
    ]
    marks += [Mark(key, c.title, c.size_ratio, c.measured_nmse) for key, c in data.compared.items()]
    marks += [
        Mark("swept", "", p.size_ratio, p.measured_nmse, p.predicted_nmse)
        for p in data.curve
        if p.measured_nmse
    ]
    return view(plans, data.fp16_size_bytes, marks, own, data.simulated)


def view(
    plans: BudgetPlans,
    fp16_size: int,
    marks: Sequence[Mark],
    own: Stop | None = None,
    simulated: bool = False,
) -> BudgetView:
    """Return the view of ``plans``; the slider starts at ``own``, else in the middle."""
    grid = [
        Stop(p.size_bytes, p.size_bytes / fp16_size, p.predicted_nmse, p.schemes)
        for p in plans.plans
    ]
    stops = sorted([*grid, *([own] if own else [])], key=lambda stop: (stop.size_bytes, stop.own))
    start = next((i for i, stop in enumerate(stops) if stop.own), len(stops) // 2)
    families = in_order({family(scheme) for scheme in plans.schemes})
    drawn, places = curve_chart(grid, stops, marks, simulated)
    shares = [_shares(stop, plans, families) for stop in stops]
    values = {
        "schemes": list(plans.schemes),
        "families": [family(scheme) for scheme in plans.schemes],
        "layers": list(plans.layers),
        "bytes": [{str(k): v for k, v in row.items()} for row in plans.layer_bytes],
        "stops": [
            {**_stop_values(stop, own), "at": at, "shares": share}
            for stop, at, share in zip(stops, places, shares, strict=True)
        ],
    }
    rows = [
        [
            f"{percent(stop.size_ratio)}{' (this run)' if stop.own else ''}",
            size(stop.size_bytes),
            error(stop.predicted) if stop.predicted is not None else "not predicted",
            *(str(layers) for layers, _ in share),
        ]
        for stop, share in zip(stops, shares, strict=True)
    ]
    missing = (
        f"Only {len(plans.plans)} of {plans.wanted} budgets were solved before the time was up."
    )
    return BudgetView(
        drawn,
        rows,
        tuple(stops),
        start,
        values,
        plans.command,
        simulated,
        missing if len(plans.plans) < plans.wanted else "",
        families,
    )


def _stop_values(stop: Stop, own: Stop | None) -> dict[str, object]:
    """Return what the script shows of a stop of the slider."""
    return {
        "ratio": percent(stop.size_ratio),
        "size": size(stop.size_bytes),
        "loss": error(stop.predicted) if stop.predicted is not None else "",
        "budget": f"{stop.size_ratio:.4f}"
        if stop.own
        else f"{_budget(stop.size_ratio):.4f}".rstrip("0"),
        "own": stop.own,
        "changed": _changed(stop, own),
        "plan": list(stop.schemes),
    }


def curve_chart(
    grid: Sequence[Stop], stops: Sequence[Stop], marks: Sequence[Mark], simulated: bool = False
) -> tuple[Markup | None, list[list[float] | None]]:
    """Draw the predicted error of the ``grid`` over size with ``marks``; also return stops' places.

    The chart is None where no error is positive, a place where its error is 0.
    """
    line = [(stop.size_ratio, stop.predicted) for stop in grid if stop.predicted]
    known = [m for m in marks if m.measured or m.predicted]
    measured = [m.measured for m in known if m.measured]
    floor = min(measured, default=0.0) / 10**DECADES_BELOW
    line = [(ratio, loss) for ratio, loss in line if loss >= floor]
    heights = [loss for _, loss in line] + measured + [m.predicted for m in known if m.predicted]
    if not heights:
        return None, [None] * len(stops)
    ratios = [ratio for ratio, _ in line] + [mark.size_ratio for mark in known]
    ticks = [tick for tick in nice_ticks(ratios, 6) if tick >= 0]
    decades = log_ticks(heights)
    x = Axis(ticks[0], ticks[-1], LEFT, WIDTH - RIGHT)
    y = Axis(decades[0], decades[-1], HEIGHT - BOTTOM, TOP, log=True)
    nominal = f"{'nominal bytes (simulated)' if simulated else 'size'}, relative to FP16"
    title = "relative squared error of the output: lower is better"
    parts = [
        y_axis(x, y, [(d, power_label(d)) for d in decades], title),
        x_axis(x, y, [(t, f"{100 * t:.3g} %") for t in ticks], nominal),
    ]
    if len(line) > 1:
        parts.append(polyline(x, y, Series("curve", "", tuple(line))))
    parts += _marks(x, y, known)
    parts.append(
        Markup('<g class="cursor" id="budget-cursor" hidden><path d="M0 {:.1f}V{:.1f}"/>').format(
            y.end, y.start
        )
    )
    parts.append(Markup('<circle r="6"/></g>'))
    places: list[list[float] | None] = [
        [round(x(s.size_ratio), 1), round(y(s.predicted), 1)]
        if s.predicted and s.predicted >= decades[0]
        else None
        for s in stops
    ]
    return chart(
        "curve", "Predicted and measured error over size", _description(line, known), parts
    ), places


def _marks(x: Axis, y: Axis, marks: Sequence[Mark]) -> list[Markup]:
    """Draw predicted points hollow and measured ones filled, then their names, moved apart."""
    parts, named = [], []
    for mark in marks:
        for what, value in (("predicted", mark.predicted), ("measured", mark.measured)):
            if not value or (mark.key == "swept" and what == "predicted"):
                continue
            title = mark.title or f"{percent(mark.size_ratio)} of FP16"
            radius = 4 if mark.key == "swept" else 7
            at = (x(mark.size_ratio), y(value))
            parts.append(
                marker(
                    mark.key,
                    at,
                    f"{title}, {what}: {error(value)}",
                    radius,
                    hollow=what == "predicted",
                )
            )
        if mark.title:
            named.append(
                (mark.title, x(mark.size_ratio), y(mark.measured or mark.predicted or 1.0))
            )
    heights = spread_out([height for _, _, height in named], 16)
    for (title, at_x, _), height in zip(named, heights, strict=True):
        left = at_x > x.end - LABEL_ROOM
        offset, anchor = (-13, "end") if left else (13, "start")
        parts.append(label(at_x + offset, height - 6, title, anchor, "label"))
    return parts


def _description(line: Sequence[tuple[float, float]], marks: Sequence[Mark]) -> str:
    ends = [
        f"predicted {error(loss)} at {percent(ratio)}" for ratio, loss in [*line[:1], *line[-1:]]
    ]
    points = [
        f"{mark.title or 'a swept budget'} {percent(mark.size_ratio)}: measured {error(mark.measured)}"
        for mark in marks
        if mark.measured
    ]
    return "; ".join([*ends, *points])


def _shares(stop: Stop, plans: BudgetPlans, families: Sequence[str]) -> list[list[object]]:
    """Return, by family, the number of layers and their share of the layers' bytes in words."""
    layers: dict[str, int] = dict.fromkeys(families, 0)
    sizes: dict[str, int] = dict.fromkeys(families, 0)
    for chosen, row in zip(stop.schemes, plans.layer_bytes, strict=True):
        name = family(plans.schemes[chosen])
        layers[name] += 1
        sizes[name] += row[chosen]
    total = sum(sizes.values()) or 1
    return [[layers[name], percent(sizes[name] / total)] for name in families]


def _changed(stop: Stop, own: Stop | None) -> str:
    if own is None or stop.own:
        return ""
    moved = sum(a != b for a, b in zip(stop.schemes, own.schemes, strict=True))
    return f"{count(moved, 'layer')} of {len(own.schemes)} {'differs' if moved == 1 else 'differ'} from this run's plan"


def _budget(ratio: float) -> float:
    """Return the minimum budget of four digits that the plan fits."""
    return -(-round(ratio * 1e6) // 100) / 1e4


def _with_own(plans: BudgetPlans, data: ReportData) -> tuple[BudgetPlans, Stop]:
    """Number this run's schemes among those of the grid, with their bytes."""
    by_name = {layer.name: layer for layer in data.layers}
    chosen = [by_name[name] for name in plans.layers]
    added = sorted({layer.scheme for layer in chosen} - set(plans.schemes))
    schemes = (*plans.schemes, *added)
    number: Mapping[str, int] = {scheme: i for i, scheme in enumerate(schemes)}
    sizes = tuple(
        {**row, number[layer.scheme]: layer.bytes}
        for row, layer in zip(plans.layer_bytes, chosen, strict=True)
    )
    own = tuple(number[layer.scheme] for layer in chosen)
    stop = Stop(data.size_bytes, data.size_ratio, data.predicted_nmse, own, own=True)
    return plans.model_copy(update={"schemes": schemes, "layer_bytes": sizes}), stop
