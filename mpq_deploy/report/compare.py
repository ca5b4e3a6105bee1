"""What differs between runs: size, quality, latency, and the plan, layer by layer.

In: reports (``report.read``). Out: a ``Comparison`` of the first with each other one. Quality is
subtracted only for one float model and one noise; image by image where both reports keep it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from mpq_deploy.errors import UsageError
from mpq_deploy.evaluate.interval import paired_interval
from mpq_deploy.report.read import ReadReport, slowest

# How many layers a comparison names (our choice): the largest of those that changed.
LARGEST = 8
_CONDITIONS = {
    "sampler": "samplers",
    "steps": "numbers of steps",
    "seed": "seeds of the noise",
    "samples": "numbers of images",
    "image_kind": "kinds of image",
}


@dataclass(frozen=True)
class Difference:
    """The other's figure minus the first's, with a 95 % interval where both keep it per image."""

    value: float
    interval: tuple[float, float] | None = None

    @property
    def within_noise(self) -> bool:
        """Whether 0 lies inside the interval: the images show no difference."""
        return self.interval is not None and self.interval[0] <= 0.0 <= self.interval[1]


@dataclass(frozen=True)
class Move:
    """Layers that went from one scheme to another, and their bytes before and after."""

    before: str
    after: str
    layers: int
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class ChangedLayer:
    """One layer whose scheme differs."""

    name: str
    before: str
    after: str
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class PlanChange:
    """How two plans differ: moves by bytes, the largest layers, layers of only one of them."""

    changed: int
    common: int
    moves: tuple[Move, ...]
    largest: tuple[ChangedLayer, ...]
    only_first: tuple[str, ...]
    only_other: tuple[str, ...]


@dataclass(frozen=True)
class DistanceChange:
    """A Frechet distance of both; ``overlap`` of their 95 % intervals, None without one."""

    described: str
    before: float
    after: float
    overlap: bool | None


@dataclass(frozen=True)
class LatencyChange:
    """Milliseconds per call, measured on devices of one target or estimated on one basis."""

    before_ms: float
    after_ms: float
    estimated: bool


@dataclass(frozen=True)
class Pair:
    """The first report against another. ``obstacles``: sentences on why quality is not compared.

    ``psnr_db`` and ``ssim`` are None where they cannot be subtracted; ``nmse_ratio`` is the other's
    error over the first's; ``plan`` is None for models without common layers; ``latency`` is None
    unless both are known in the same way.
    """

    label: str
    obstacles: tuple[str, ...]
    size_bytes: int
    psnr_db: Difference | None
    ssim: Difference | None
    nmse_ratio: float | None
    plan: PlanChange | None
    notes: tuple[str, ...] = ()
    distances: tuple[DistanceChange, ...] = ()
    latency: LatencyChange | None = None


@dataclass(frozen=True)
class Comparison:
    """The reports in the order given, and the first against each other."""

    reports: tuple[ReadReport, ...]
    pairs: tuple[Pair, ...]

    def as_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "runs": [_run_json(report) for report in self.reports],
            "against_first": list(map(asdict, self.pairs)),
        }


def compare_reports(reports: Sequence[ReadReport]) -> Comparison:
    """Compare the first report with each other one; UsageError below two."""
    if len(reports) < 2:
        raise UsageError(
            f"Only {len(reports)} run was given to compare.",
            "Give two or more run folders or report.json files.",
        )
    first = reports[0]
    return Comparison(tuple(reports), tuple(_pair(first, other) for other in reports[1:]))


def model_obstacle(first: ReadReport, other: ReadReport) -> str:
    """Say why two reports are not about the same float model; empty when they are."""
    a, b = first.model, other.model
    if a.digest and b.digest:
        if a.digest == b.digest:
            return ""
        if a.name == b.name and _shapes(first) == _shapes(other):
            digests = f"SHA-256 {a.digest[:8]} and {b.digest[:8]}"
            return f"The float models differ ({digests}): other weights, or another export."
        return f"The models differ: {a.name} and {b.name}."
    if a.name != b.name:
        return f"The models differ: {a.name} and {b.name}."
    return (
        ""
        if _shapes(first) == _shapes(other)
        else f"The models differ: both are named {a.name}, but their layers differ."
    )


def obstacles(first: ReadReport, other: ReadReport) -> tuple[str, ...]:
    """Say why the quality figures of two reports cannot be subtracted; empty when they can."""
    reasons = [model_obstacle(first, other)]
    a, b = first.evaluation, other.evaluation
    if a is None or b is None:
        missing = [report.label for report in (first, other) if report.evaluation is None]
        reasons.append(f"Not evaluated: {' and '.join(missing)}.")
    else:
        for field, words in _CONDITIONS.items():
            if getattr(a, field) != getattr(b, field):
                reasons.append(f"The {words} differ: {getattr(a, field)} and {getattr(b, field)}.")
    return tuple(obstacle for obstacle in reasons if obstacle)


def figure_difference(
    first: ReadReport, other: ReadReport, name: Literal["psnr_db", "ssim"]
) -> Difference | None:
    """Return ``other`` minus ``first``, paired by image where both keep a figure of each.

    None where one was not measured, or is infinite (images identical to the float model's).
    """
    before, after = getattr(first, name), getattr(other, name)
    if before is None or after is None:
        return None
    each = getattr(first, f"{name}_each"), getattr(other, f"{name}_each")
    interval = (
        paired_interval(each[1], each[0]) if all(each) and len(each[0]) == len(each[1]) else None
    )
    return Difference(after - before, interval)


def plan_change(first: ReadReport, other: ReadReport) -> PlanChange | None:
    """Compare two plans by layer name and weight shape; None where no layer is in both."""
    before = {(layer.name, layer.weight_shape): layer for layer in first.layers}
    after = {(layer.name, layer.weight_shape): layer for layer in other.layers}
    if first.model.name != other.model.name and set(before) != set(after):
        return None
    common = [key for key in before if key in after]
    if not common:
        return None
    changed = [
        ChangedLayer(
            key[0], before[key].scheme, after[key].scheme, before[key].bytes, after[key].bytes
        )
        for key in common
        if before[key].scheme != after[key].scheme
    ]
    by_size = sorted(
        changed, key=lambda layer: (-max(layer.bytes_before, layer.bytes_after), layer.name)
    )
    return PlanChange(
        changed=len(changed),
        common=len(common),
        moves=_moves(changed),
        largest=tuple(by_size[:LARGEST]),
        only_first=tuple(key[0] for key in before if key not in after),
        only_other=tuple(key[0] for key in after if key not in before),
    )


def _moves(changed: list[ChangedLayer]) -> tuple[Move, ...]:
    groups: dict[tuple[str, str], list[ChangedLayer]] = defaultdict(list)
    for layer in changed:
        groups[layer.before, layer.after].append(layer)
    moves = [
        Move(
            before,
            after,
            len(rows),
            sum(row.bytes_before for row in rows),
            sum(row.bytes_after for row in rows),
        )
        for (before, after), rows in groups.items()
    ]
    return tuple(
        sorted(moves, key=lambda m: (-max(m.bytes_before, m.bytes_after), m.before, m.after))
    )


def distance_changes(first: ReadReport, other: ReadReport) -> tuple[DistanceChange, ...]:
    """Return the distances that both have, of one network, number of images, sampler and seed."""
    if model_obstacle(first, other):
        return ()
    before = {one.kind: one for one in first.frechet}
    changes = []
    for one in other.frechet:
        own = before.get(one.kind)
        if own is not None:
            ends = one.interval, own.interval
            overlap = None
            if ends[0] is not None and ends[1] is not None:
                overlap = ends[0].low <= ends[1].high and ends[1].low <= ends[0].high
            changes.append(DistanceChange(one.described, own.distance, one.distance, overlap))
    return tuple(changes)


def latency_change(first: ReadReport, other: ReadReport) -> LatencyChange | None:
    """Return both latencies if measured on one target or estimated on one basis; else None."""
    a, b = slowest(first), slowest(other)
    if a is not None and b is not None:
        same = a.target == b.target and not a.problem and not b.problem
        return LatencyChange(a.milliseconds, b.milliseconds, False) if same else None
    before, after = first.expected_latency, other.expected_latency
    if a is not None or b is not None or before is None or after is None:
        return None
    if any(getattr(before, name) != getattr(after, name) for name in ("source", "basis", "batch")):
        return None
    return LatencyChange(before.ours_ms, after.ours_ms, True)


def _pair(first: ReadReport, other: ReadReport) -> Pair:
    reasons = obstacles(first, other)
    comparable = not reasons
    ratio = None
    if comparable and first.measured_nmse and other.measured_nmse is not None:
        ratio = other.measured_nmse / first.measured_nmse
    return Pair(
        label=other.label,
        obstacles=reasons,
        size_bytes=other.size_bytes - first.size_bytes,
        psnr_db=figure_difference(first, other, "psnr_db") if comparable else None,
        ssim=figure_difference(first, other, "ssim") if comparable else None,
        nmse_ratio=ratio,
        plan=plan_change(first, other),
        notes=tuple(_notes(first, other, comparable)),
        distances=distance_changes(first, other),
        latency=latency_change(first, other),
    )


def _notes(first: ReadReport, other: ReadReport, comparable: bool) -> list[str]:
    parts = []
    if first.target.name != other.target.name:
        parts.append(f"The targets differ: {first.target.name} and {other.target.name}.")
    if first.simulated != other.simulated:
        parts.append("One of the plans is simulated: its bytes are nominal.")
    if comparable and not (first.model.digest and other.model.digest):
        parts.append(
            "A report lacks the float model's digest; the models were matched by name and layers."
        )
    if comparable and not (first.psnr_db_each and other.psnr_db_each):
        parts.append(
            "At least one report lacks the PSNR of each image, so the difference has no interval."
        )
    if (
        first.frechet
        and other.frechet
        and not distance_changes(first, other)
        and not model_obstacle(first, other)
    ):
        parts.append(
            "Their Frechet distances differ in network, images, sampler or seed, and are not compared."
        )
    if bool(first.frechet) != bool(other.frechet):
        lacking = other if first.frechet else first
        parts.append(
            f"{lacking.label} has no Frechet distance to compare: measure it with 'mpq-deploy metrics'."
        )
    if comparable and first.identical != other.identical:
        same = first if first.identical else other
        parts.append(
            f"The images of {same.label} are identical to the float model's: no difference in dB."
        )
    return parts


def _shapes(report: ReadReport) -> list[tuple[str, tuple[int, ...]]]:
    return [(layer.name, layer.weight_shape) for layer in report.layers]


def _run_json(report: ReadReport) -> dict[str, Any]:
    latency = slowest(report)
    names = (
        "label",
        "schema_version",
        "budget",
        "size_bytes",
        "fp16_size_bytes",
        "measured_nmse",
        "psnr_db",
    )
    kept = (
        "pooled_psnr_db",
        "ssim",
        "psnr_db_interval",
        "ssim_interval",
        "nmse_interval",
        "predicted_nmse",
        "predicted_interval",
        "identical",
        "evaluation",
        "simulated",
    )
    plain = report.model_dump(mode="json", include={*names, *kept, "frechet", "scores"})
    return {
        **plain,
        "size_ratio": report.size_ratio,
        "model": report.model.name,
        "target": report.target.name,
        "latency": None if latency is None else asdict(latency),
    }
