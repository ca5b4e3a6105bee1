"""Size against predicted error, with the plans behind it, for the sliders of budget and time.

In: ``BudgetPlans`` and the measurements. Out: an inline SVG, the table of its plans, and the values
that the page's script shows when a slider moves.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from mpq_deploy.allocate.front import least_so_far
from mpq_deploy.report.data import BudgetPlans, PlanTimes, ReportData
from mpq_deploy.report.network import family, in_order
from mpq_deploy.report.shown_errors import ShownErrors
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
from mpq_deploy.report.words import NOT_PREDICTED, count, digits, percent, size, title_of

# Room for the names of points at the right end.
LABEL_ROOM = 150
# Decades drawn below the smallest measured error: a vanishing one would only stretch the axis.
DECADES_BELOW = 2
# Positions of the slider of times, at most (our choice).
TIME_STEPS = 60

# Where a plan is in the chart, in pixels; no height where its error is below the axis.
Place = tuple[float, float | None]


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
    """A plan that the sliders can show: one of the front, or this run's ``own``."""

    size_bytes: int
    size_ratio: float
    predicted: float | None
    schemes: tuple[int, ...]
    latency_ms: float | None = None
    own: bool = False


@dataclass(frozen=True)
class Dots:
    """Plans of the chart whose dots look alike: ``said`` is what the legend says of them."""

    key: str
    said: str
    stops: tuple[Stop, ...]


@dataclass(frozen=True)
class BudgetView:
    """What the page shows: the chart, the plans as rows, the first positions, the script's values.

    ``start`` and ``start_time``: positions of the sliders among ``values["budgets"]`` and
    ``values["times"]``, behind whose last is no limit. ``times``: None where no time is known.
    """

    chart: Markup | None
    dots: tuple[Dots, ...]
    columns: list[str]
    rows: list[list[str]]
    stops: tuple[Stop, ...]
    start: int
    start_time: int
    values: dict[str, object]
    command: str
    simulated: bool
    families: list[str]
    times: PlanTimes | None
    shown: ShownErrors

    @property
    def has_own(self) -> bool:
        """Whether one of the stops is the plan of the run that the page is about."""
        return any(stop.own for stop in self.stops)

    @property
    def predicts(self) -> bool:
        """Whether plans have a predicted error; else the largest within the limits is shown."""
        return any(stop.predicted is not None for stop in self.stops)

    @property
    def fp16_time(self) -> str:
        """The time of everything FP16 in words; empty where no time is known."""
        return "" if self.times is None else milliseconds(self.times.fp16_ms)


def milliseconds(value: float | None) -> str:
    """Return a time in milliseconds with three digits: ``0.462 ms``."""
    return "unknown" if value is None else f"{digits(value)} ms"


def budget_view(data: ReportData) -> BudgetView | None:
    """Return the view of a run, its own plan among the stops; None without other plans."""
    if data.budgets is None or not data.budgets.plans:
        return None
    plans, own = _with_own(data.budgets, data)
    shown = shown_errors(plans)
    title, measured = title_of("ours", data), shown.measured
    marks = [Mark("ours", title, data.size_ratio, measured(data), own.predicted)]
    marks += [Mark(key, c.title, c.size_ratio, measured(c)) for key, c in data.compared.items()]
    marks += [
        Mark(
            "swept",
            "",
            p.size_ratio,
            measured(p),
            shown.predicted(p.predicted_nmse, p.predicted_psnr_db),
        )
        for p in data.curve
        if measured(p)
    ]
    return view(plans, data.fp16_size_bytes, marks, own, data.simulated)


def shown_errors(plans: BudgetPlans) -> ShownErrors:
    """Return the errors that plans are predicted in."""
    return ShownErrors.of(plan.predicted_psnr_db for plan in plans.plans)


def view(
    plans: BudgetPlans,
    fp16_size: int,
    marks: Sequence[Mark],
    own: Stop | None = None,
    simulated: bool = False,
) -> BudgetView:
    """Return the view of ``plans``. The sliders start at ``own``, else in the middle, no time limit."""
    shown = shown_errors(plans)
    front = _front(plans, fp16_size, shown)
    # The run's own plan may be one of the front: shown once.
    others = [stop for stop in front if own is None or stop.schemes != own.schemes]
    stops = sorted([*others, *([own] if own else [])], key=lambda stop: (stop.size_bytes, stop.own))
    times = plans.times if all(stop.latency_ms is not None for stop in stops) else None
    line = [front[number] for number in least_so_far([stop.predicted for stop in front])]
    dots = _dots(front) if times else ()
    drawn, places = curve_chart(line, dots, stops, marks, shown, simulated)
    families = in_order({family(scheme) for scheme in plans.schemes})
    shares = [_shares(stop, plans, families) for stop in stops]
    sizes = _size_limits(line, own)
    limits = _time_limits(stops, own, times) if times else []
    values = _plan_values(plans)
    values["stops"] = [
        {**_stop_values(stop, own, fp16_size, shown), "at": at, "shares": share}
        for stop, at, share in zip(stops, places, shares, strict=True)
    ]
    values["budgets"] = [[value, percent(value / fp16_size)] for value in sizes]
    values["predicted"] = shown.name
    values["times"] = [[value, milliseconds(value)] for value in limits]
    return BudgetView(
        chart=drawn,
        dots=dots,
        columns=["Of FP16", "Size", shown.name, *(["Time"] if times else []), *families],
        rows=[_row(stop, share, times, shown) for stop, share in zip(stops, shares, strict=True)],
        stops=tuple(stops),
        start=sizes.index(own.size_bytes) if own else len(sizes) // 2,
        start_time=limits.index(own.latency_ms)
        if own and own.latency_ms in limits
        else len(limits),
        values=values,
        command=plans.command,
        simulated=simulated,
        families=families,
        times=times,
        shown=shown,
    )


def _front(plans: BudgetPlans, fp16_size: int, shown: ShownErrors) -> list[Stop]:
    return [
        Stop(
            p.size_bytes,
            p.size_bytes / fp16_size,
            shown.predicted(p.predicted_nmse, p.predicted_psnr_db),
            p.schemes,
            p.latency_ms,
        )
        for p in plans.plans
    ]


def _plan_values(plans: BudgetPlans) -> dict[str, object]:
    return {
        "schemes": list(plans.schemes),
        "families": [family(scheme) for scheme in plans.schemes],
        "layers": list(plans.layers),
        "bytes": [{str(k): v for k, v in row.items()} for row in plans.layer_bytes],
    }


def _row(
    stop: Stop, share: list[list[object]], times: PlanTimes | None, shown: ShownErrors
) -> list[str]:
    return [
        f"{percent(stop.size_ratio)}{' (this run)' if stop.own else ''}",
        size(stop.size_bytes),
        NOT_PREDICTED if stop.predicted is None else shown.text(stop.predicted),
        *([milliseconds(stop.latency_ms)] if times else []),
        *(str(layers) for layers, _ in share),
    ]


def _size_limits(line: Sequence[Stop], own: Stop | None) -> list[int]:
    """Return the slider's limits in bytes: the line's sizes, the largest of those that read alike."""
    alike = {percent(stop.size_ratio): stop.size_bytes for stop in line}
    return sorted({*alike.values(), *([own.size_bytes] if own else [])})


def _time_limits(stops: Sequence[Stop], own: Stop | None, times: PlanTimes) -> list[float]:
    """Return the slider's limits in milliseconds: the fastest plan's, this run's, FP16's, others.

    Not the slowest plan's: that is not a limit.
    """
    known = sorted({stop.latency_ms for stop in stops if stop.latency_ms is not None})
    evenly = np.linspace(known[0], known[-1], TIME_STEPS)[:-1]
    limits = {known[bisect_left(known, float(at))] for at in evenly} - {known[-1]}
    limits |= {known[0], *([own.latency_ms] if own and own.latency_ms is not None else [])}
    if known[0] < times.fp16_ms < known[-1]:
        limits.add(times.fp16_ms)
    return sorted(limits)


def _stop_values(
    stop: Stop, own: Stop | None, fp16_size: int, shown: ShownErrors
) -> dict[str, object]:
    """Return what the script chooses and shows a plan by.

    ``plan``: a character per layer, A for the first scheme.
    """
    return {
        "bytes": stop.size_bytes,
        "error": stop.predicted,
        "ms": stop.latency_ms,
        "ratio": percent(stop.size_ratio),
        "size": size(stop.size_bytes),
        "loss": shown.text(stop.predicted) if stop.predicted is not None else "",
        "time": "" if stop.latency_ms is None else milliseconds(stop.latency_ms),
        "options": options(stop, fp16_size),
        "own": stop.own,
        "changed": _changed(stop, own),
        "plan": "".join(chr(ord("A") + scheme) for scheme in stop.schemes),
    }


def options(stop: Stop, fp16_size: int) -> str:
    """Return the options of ``build`` whose plan is at least as small, as fast and, summed over layers, as exact.

    Both limits are rounded up to four digits.
    """
    share = -(-10_000 * stop.size_bytes // fp16_size)
    share += int(share / 10_000 * fp16_size) < stop.size_bytes  # as ``Budget.bytes`` rounds
    budget = f"--budget {min(share, 10_000) / 10_000:g}"
    if not stop.latency_ms:
        return budget
    places = 3 - math.floor(math.log10(stop.latency_ms))
    limit = math.ceil(stop.latency_ms * 10**places) / 10**places
    return f"{budget} --max-latency {limit:.{max(places, 0)}f}ms --objective quality"


def _dots(front: Sequence[Stop]) -> tuple[Dots, ...]:
    """Return the plans in three parts by their time, each a third of the range, the slowest first."""
    known = [stop.latency_ms for stop in front if stop.latency_ms is not None]
    low, high = min(known), max(known)
    bounds = low + (high - low) / 3, low + 2 * (high - low) / 3
    first, second = (milliseconds(bound) for bound in bounds)
    said = f"up to {first}", f"{first} to {second}", f"over {second}"
    parts: list[list[Stop]] = [[], [], []]
    for stop in front:
        parts[bisect_left(bounds, stop.latency_ms or 0.0)].append(stop)
    keys = "fast", "medium", "slow"
    return tuple(
        Dots(key, text, tuple(part)) for key, text, part in zip(keys, said, parts) if part
    )[::-1]


def curve_chart(
    line: Sequence[Stop],
    dots: Sequence[Dots],
    stops: Sequence[Stop],
    marks: Sequence[Mark],
    shown: ShownErrors,
    simulated: bool = False,
) -> tuple[Markup | None, list[Place | None]]:
    """Draw the predicted error over size: a line, dots, ``marks``; also return the stops' places.

    The chart is None where no error is positive.
    """
    known = [m for m in marks if m.measured or m.predicted]
    measured = [m.measured for m in known if m.measured]
    floor = min(measured, default=0.0) / 10**DECADES_BELOW
    heights = [s.predicted for s in line if s.predicted and s.predicted >= floor]
    heights += measured + [m.predicted for m in known if m.predicted]
    if not heights:
        return None, [None] * len(stops)
    decades = log_ticks(heights)
    seen = [s for s in line if s.predicted and s.predicted >= decades[0]]
    ratios = [s.size_ratio for s in stops] + [m.size_ratio for m in known]
    ticks = [tick for tick in nice_ticks(ratios, 6) if 0 <= tick <= max(1.0, *ratios)]
    joined = [(s.size_ratio, s.predicted or 0.0) for s in seen]
    x = Axis(ticks[0], ticks[-1], LEFT, WIDTH - RIGHT)
    y = Axis(decades[0], decades[-1], HEIGHT - BOTTOM, TOP, log=True)
    nominal = f"{'nominal bytes (simulated)' if simulated else 'size'}, relative to FP16"
    title = f"{shown.axis}: lower is better"
    parts = [
        y_axis(x, y, [(d, power_label(d)) for d in decades], title),
        x_axis(x, y, [(t, f"{100 * t:.3g} %") for t in ticks], nominal),
    ]
    parts += [_drawn(one, x, y) for one in dots]
    if len(joined) > 1:
        parts.append(polyline(x, y, Series("curve", "", tuple(joined))))
    parts += [*_marks(x, y, known, shown), _cursor(y)]
    described = _description(joined, dots, known, shown)
    drawn = chart("curve", "Predicted and measured error over size", described, parts)
    return drawn, [_place(stop, x, y) for stop in stops]


def _cursor(y: Axis) -> Markup:
    """Draw what the script moves to the plan that is shown."""
    return Markup(
        '<g class="cursor" id="budget-cursor" hidden><path d="M0 {:.1f}V{:.1f}"/><circle r="6"/></g>'
    ).format(y.end, y.start)


def _place(stop: Stop, x: Axis, y: Axis) -> Place:
    inside = stop.predicted and y.low <= stop.predicted <= y.high
    height = round(y(stop.predicted), 1) if inside and stop.predicted else None
    return round(x(stop.size_ratio), 1), height


def _drawn(dots: Dots, x: Axis, y: Axis) -> Markup:
    """Draw the plans of a part as round dots; the legend says what they are."""
    places = [_place(stop, x, y) for stop in dots.stops]
    path = "".join(f"M{at_x:g} {at_y:g}h0" for at_x, at_y in places if at_y is not None)
    drawn = Markup('<path class="plans {}" d="{}"/>').format(dots.key, path)
    # Rings: the same again, smaller, in the colour of the ground.
    return (
        drawn + Markup('<path class="plans hole" d="{}"/>').format(path)
        if dots.key == "slow"
        else drawn
    )


def _marks(x: Axis, y: Axis, marks: Sequence[Mark], shown: ShownErrors) -> list[Markup]:
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
                    f"{title}, {what}: {shown.text(value)}",
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


def _description(
    line: Sequence[tuple[float, float]],
    dots: Sequence[Dots],
    marks: Sequence[Mark],
    shown: ShownErrors,
) -> str:
    ends = [
        f"predicted {shown.text(loss)} at {percent(ratio)}"
        for ratio, loss in [*line[:1], *line[-1:]]
    ]
    times = [f"{count(len(part.stops), 'plan')} that take {part.said}" for part in dots]
    points = [
        f"{mark.title or 'a swept budget'} {percent(mark.size_ratio)}: measured {shown.text(mark.measured)}"
        for mark in marks
        if mark.measured
    ]
    return "; ".join([*ends, *times, *points])


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


def _with_own(plans: BudgetPlans, data: ReportData) -> tuple[BudgetPlans, Stop]:
    """Number this run's schemes among those of the other plans, with their bytes."""
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
    expected = data.expected_latency.ours_ms if data.expected_latency else None
    images = data.predicted_images
    psnr = images.psnr_db if images is not None else None
    predicted = shown_errors(plans).predicted(data.predicted_nmse, psnr)
    stop = Stop(data.size_bytes, data.size_ratio, predicted, own, expected, own=True)
    return plans.model_copy(update={"schemes": schemes, "layer_bytes": sizes}), stop
