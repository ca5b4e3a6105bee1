"""The range of a quantized activation: static (by calibration), by timestep, or by its values.

An activation's range changes by a factor of ten or more during denoising. One scale for all
timesteps wastes codes where the range is narrow. A range that moves divides the input by a ratio in
(0, 1] before the quantizer and multiplies the product by the same ratio. So the scale stays one
constant, as INT8 kernels need, the divided input never exceeds the widest range, and FP16 holds all
values. Source: Q-Diffusion (arXiv 2302.04304) and TFMQ-DM (arXiv 2311.16503) calibrate ranges by
timestep; a table in the graph, interpolated between recorded timesteps, is our choice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from mpq_deploy.formats.sizes import FP16_BYTES, INT64_BYTES

if TYPE_CHECKING:
    import onnx_ir as ir

    from mpq_deploy.calibrate.stats import ActivationStats
    from mpq_deploy.formats.interfaces import ActivationGrid, Branch
    from mpq_deploy.graph.layers import Layer
    from mpq_deploy.graph.writers.node_writer import NodeWriter
    from mpq_deploy.models.spec import Array

# Entries of a table: the default number of calibrated timesteps. With more timesteps each entry is
# the widest range of its neighbourhood; with fewer some entries are unused. So the bytes do not
# depend on calibration.
ENTRIES = 20
FLOAT32_BYTES = 4
# The smallest ratio: ranges narrower than this share of the widest use fewer codes. With smaller
# ratios the FP16 product of the divided input could overflow where the original would not (our
# choice).
SMALLEST_RATIO = 2.0**-7
# Name of the constants that all tables of a graph share: slope and offset of each entry's ramp and
# the ramps' limits 0 and 1, FP32.
RAMPS = "timestep_ranges"
RAMP_BYTES = FLOAT32_BYTES * (2 * ENTRIES + 2)
# Kernels that compute all ratios of a graph from its timestep (measured: docs/engine-forms.md).
TABLE_KERNELS = 2
# A dynamic range per sample (before a Conv) needs the maximum first: kernels in addition to the
# quantizer's, and how often they read or write the FP16 input. A dynamic range per row (before a
# product) is computed in the quantizer's kernel.
SAMPLE_KERNELS, SAMPLE_MOVES = 3, 2

# (array or tensor, axes) -> the largest magnitude over the axes, which stay as size 1.
Absmax = Callable[[Any, tuple[int, ...]], Any]


@dataclass(frozen=True)
class RangeTable:
    """The ratio of an activation's range at timestep t to its widest range, piecewise linear in t.

    The ratio is sum_k step_k clip(slope_k t + offset_k, 0, 1). ``slopes``, ``offsets``: float32
    values, ``ENTRIES`` each. ``steps``: FP16 values, the change of the ratio along each ramp. The
    first ramp is 1 everywhere, so its step is the ratio at the smallest timestep.
    """

    slopes: tuple[float, ...]
    offsets: tuple[float, ...]
    steps: tuple[float, ...]

    @classmethod
    def of(cls, timesteps: Array, ranges: Array) -> RangeTable:
        """Make the table from ``ranges`` float [K] > 0 at ``timesteps`` [K].

        Of equal timesteps the widest range counts.
        """
        knots, place = np.unique(np.asarray(timesteps, np.float64), return_inverse=True)
        widest = np.zeros(len(knots))
        np.maximum.at(widest, place.ravel(), np.asarray(ranges, np.float64))
        knots, widest = _thinned(knots, widest)
        ratios = np.maximum(widest / widest.max(), SMALLEST_RATIO)
        slopes, offsets, steps = (np.zeros(ENTRIES) for _ in range(3))
        gaps = np.diff(knots)
        slopes[1 : len(knots)] = 1 / gaps
        offsets[1 : len(knots)], offsets[0] = -knots[:-1] / gaps, 1.0
        # Each step corrects the FP16 rounding of the steps before.
        reached = 0.0
        for entry, ratio in enumerate(ratios):
            steps[entry] = np.float16(ratio - reached)
            reached += steps[entry]
        return cls(
            *(tuple(np.asarray(row, np.float32).tolist()) for row in (slopes, offsets, steps))
        )

    def at(self, timestep: float) -> float:
        """Return the ratio at ``timestep``, a value of the timestep input."""
        slopes, offsets, steps = (
            np.array(row, np.float32) for row in (self.slopes, self.offsets, self.steps)
        )
        return float(np.clip(slopes * np.float32(timestep) + offsets, 0, 1) @ steps)


def _thinned(knots: Array, ranges: Array) -> tuple[Array, Array]:
    """Return at most ``ENTRIES`` evenly indexed knots, each with the widest range near it."""
    if len(knots) <= ENTRIES:
        return knots, ranges
    places = np.linspace(0, len(knots) - 1, ENTRIES)
    chosen = np.rint(places).astype(int)
    half = (len(knots) - 1) / (ENTRIES - 1)
    spans = [(int(np.floor(p - half)), int(np.ceil(p + half))) for p in places]
    widest = [ranges[max(low, 0) : high + 1].max() for low, high in spans]
    return knots[chosen], np.array(widest)


@dataclass(frozen=True)
class ActivationRange:
    """A static range, chosen by calibration: the ratio is always 1. Base class of all ranges."""

    kind: ClassVar[str] = ""
    # For the report, appended to the meaning of the scheme's body.
    meaning: ClassVar[str] = ""
    # Whether the input is divided by a ratio, and the product multiplied by it.
    moves: ClassVar[bool] = False
    by_timestep: ClassVar[bool] = False

    @property
    def suffix(self) -> str:
        """The suffix of a body's name with this range."""
        return f"-{self.kind}" if self.kind else ""

    def suits(self, branch: Branch) -> bool:
        """Whether ``branch`` can be combined with a body whose input has this range."""
        return True

    def scale(self, branch: Branch, stats: ActivationStats) -> float:
        """Return the INT8 scale at the widest range."""
        return branch.input_scale(stats)

    def fitted(
        self, grid: ActivationGrid, branch: Branch, stats: ActivationStats
    ) -> ActivationGrid:
        """Return ``grid`` with the range's table, if it has one."""
        return grid

    def input_bytes(self, layer: Layer) -> int:
        """Return the bytes of each quantizer's constants in addition to its scale."""
        return 0

    def shared_bytes(self) -> dict[str, int]:
        """Return name -> bytes of the constants that all quantizers of a graph share."""
        return {}

    def shared_kernels(self) -> int:
        """Return the number of kernels that serve all quantizers of a graph."""
        return 0

    def quantizer_kernels(self, product: bool) -> int:
        """Return the kernels in addition to the quantizer's; ``product``: no Conv reads it."""
        return 0

    def moves_input(self, product: bool) -> int:
        """Return how often the FP16 input is moved for its range, in addition to quantizing."""
        return 0

    def at(self, grid: ActivationGrid, timestep: float | None) -> ActivationGrid:
        """Return the quantizer at a value of the timestep input, if the range depends on that."""
        return grid

    def ratios_at(self, grid: ActivationGrid, timesteps: Any) -> Any:
        """Return the ratio at each of ``timesteps`` (array or tensor); None if not by timestep."""
        return None

    def ratio(self, x: Any, grid: ActivationGrid, convolved: bool, absmax: Absmax) -> Any:
        """Return the ratio of the range of ``x`` (array or tensor), to broadcast; None for 1.

        ``convolved``: a Conv reads ``x``; ``absmax``: see ``Absmax``.
        """
        return None

    def write(
        self,
        to: NodeWriter,
        value: ir.Value,
        grid: ActivationGrid,
        names: RangeNames,
    ) -> tuple[list[ir.Node], ir.Value | None]:
        """Return nodes, not yet inserted, for the ratio of ``value``, and the ratio; None for 1."""
        return [], None


@dataclass(frozen=True)
class RangeNames:
    """What a range needs to be written.

    ``base``: prefix of the nodes' names; ``convolved``: a Conv reads the tensor of ``rank`` axes;
    ``timestep``: name of the timestep input.
    """

    base: str
    convolved: bool
    rank: int
    timestep: str = ""


@dataclass(frozen=True)
class MovingRange(ActivationRange):
    """A range whose ratio changes; the scale covers the largest magnitude of all calls."""

    moves = True

    def suits(self, branch: Branch) -> bool:
        return not branch or branch.rescales

    def scale(self, branch: Branch, stats: ActivationStats) -> float:
        from mpq_deploy.calibrate.scales import QUANT_MAX, round_scale

        return round_scale(float(branch.input_amax(stats).max()) / QUANT_MAX)


@dataclass(frozen=True)
class TimestepRange(MovingRange):
    """A table of ratios by the timestep input, interpolated between the calibrated timesteps.

    All samples of a call have one ratio: that of the call's largest timestep.
    """

    kind = "timestep"
    meaning = "with a range per timestep"
    by_timestep = True

    def fitted(
        self, grid: ActivationGrid, branch: Branch, stats: ActivationStats
    ) -> ActivationGrid:
        ranges = branch.input_amax(stats)
        if not ranges.any():
            ranges = np.ones_like(ranges)
        return replace(grid, table=RangeTable.of(stats.timesteps, ranges))

    def input_bytes(self, layer: Layer) -> int:
        """Return the bytes of the table's steps."""
        return FP16_BYTES * ENTRIES

    def shared_bytes(self) -> dict[str, int]:
        return {RAMPS: RAMP_BYTES}

    def shared_kernels(self) -> int:
        return TABLE_KERNELS

    def at(self, grid: ActivationGrid, timestep: float | None) -> ActivationGrid:
        assert grid.table is not None and timestep is not None
        return replace(grid, scale=grid.scale * grid.table.at(timestep), table=None)

    def ratios_at(self, grid: ActivationGrid, timesteps: Any) -> Any:
        assert grid.table is not None
        rows = zip(grid.table.slopes, grid.table.offsets, grid.table.steps, strict=True)
        return sum(step * (slope * timesteps + offset).clip(0, 1) for slope, offset, step in rows)

    def write(
        self,
        to: NodeWriter,
        value: ir.Value,
        grid: ActivationGrid,
        names: RangeNames,
    ) -> tuple[list[ir.Node], ir.Value | None]:
        assert grid.table is not None
        ramps = write_ramps(to, names.timestep, grid.table)
        steps = to.named_constant(f"{names.base}/steps", np.array(grid.table.steps, np.float32))
        weighed = to.make("Mul", [ramps, steps], {}, f"{names.base}/weigh")
        inputs = [weighed.outputs[0]]
        total = to.make("ReduceSum", inputs, {"keepdims": 0}, f"{names.base}/ratio")
        return [weighed, total], total.outputs[0]


@dataclass(frozen=True)
class DynamicRange(MovingRange):
    """The input's own absolute maximum: per sample before a Conv, per row before a product."""

    kind = "dynamic"
    meaning = "with ranges taken from the values"

    def input_bytes(self, layer: Layer) -> int:
        """Return the bytes of the reduced axes, the inverse widest range and the smallest ratio."""
        return INT64_BYTES * len(_axes(layer.op == "Conv", 2 + len(layer.kernel))) + 2 * FP16_BYTES

    def quantizer_kernels(self, product: bool) -> int:
        return 0 if product else SAMPLE_KERNELS

    def moves_input(self, product: bool) -> int:
        return 0 if product else SAMPLE_MOVES

    def ratio(self, x: Any, grid: ActivationGrid, convolved: bool, absmax: Absmax) -> Any:
        return (absmax(x, _axes(convolved, x.ndim)) * _inverse(grid)).clip(SMALLEST_RATIO)

    def write(
        self,
        to: NodeWriter,
        value: ir.Value,
        grid: ActivationGrid,
        names: RangeNames,
    ) -> tuple[list[ir.Node], ir.Value | None]:
        base = names.base
        axes = np.array(_axes(names.convolved, names.rank), np.int64)
        constants = [
            to.named_constant(f"{base}/{what}", array)
            for what, array in (
                ("axes", axes),
                ("inverse", np.asarray(_inverse(grid), np.float32)),
                ("smallest", np.asarray(SMALLEST_RATIO, np.float32)),
            )
        ]
        nodes = [to.make("Abs", [value], {}, f"{base}/magnitude", like=value)]
        for op, second, label in zip(
            ("ReduceMax", "Mul", "Max"), constants, ("largest", "relative", "ratio"), strict=True
        ):
            nodes.append(to.make(op, [nodes[-1].outputs[0], second], {}, f"{base}/{label}"))
        return nodes, nodes[-1].outputs[0]


def _axes(convolved: bool, rank: int) -> tuple[int, ...]:
    """Return the axes to reduce: all but the samples' before a Conv, the last before a product."""
    return tuple(range(1, rank)) if convolved else (-1,)


def _inverse(grid: ActivationGrid) -> float:
    """Return the inverse of the widest magnitude, rounded to FP16."""
    return float(np.float16(1.0 / (grid.scale * grid.quant_max * grid.reach)))


def write_ramps(to: NodeWriter, timestep: str, table: RangeTable) -> ir.Value:
    """Return the ramps [ENTRIES] that all tables of a graph share; write them on the first call."""
    known = {node.name: node for node in to.graph}
    if f"{RAMPS}/ramps" in known:
        return known[f"{RAMPS}/ramps"].outputs[0]
    value = next(value for value in to.graph.inputs if value.name == timestep)
    nodes = [to.make("Cast", [value], {"to": 1}, f"{RAMPS}/float")]
    if value.shape is None or len(value.shape):
        inputs = [nodes[-1].outputs[0]]
        nodes.append(to.make("ReduceMax", inputs, {"keepdims": 0}, f"{RAMPS}/timestep"))
    slopes, offsets, low, high = (
        to.named_constant(f"{RAMPS}/{what}", np.asarray(array, np.float32))
        for what, array in (
            ("slopes", table.slopes),
            ("offsets", table.offsets),
            ("low", 0.0),
            ("high", 1.0),
        )
    )
    for op, others, label in (
        ("Mul", [slopes], "scaled"),
        ("Add", [offsets], "moved"),
        ("Clip", [low, high], "ramps"),
    ):
        nodes.append(to.make(op, [nodes[-1].outputs[0], *others], {}, f"{RAMPS}/{label}"))
    to.graph.insert_before(to.graph[0], nodes)
    return nodes[-1].outputs[0]


def ramp_nodes() -> frozenset[str]:
    """Return the names of the nodes that compute the ramps: they need FP32 for the timestep."""
    labels = ("float", "timestep", "scaled", "moved", "ramps")
    return frozenset(f"{RAMPS}/{label}" for label in labels)


STATIC, BY_TIMESTEP, DYNAMIC = ActivationRange(), TimestepRange(), DynamicRange()
RANGES: tuple[ActivationRange, ...] = (STATIC, BY_TIMESTEP, DYNAMIC)
RANGE_KINDS = tuple(one.kind for one in RANGES if one.kind)
