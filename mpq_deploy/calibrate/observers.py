"""Observe activations by reductions added to a copy of the graph: only these leave ONNX Runtime.

In: a layer graph and the recorded calls. Out: an ``Observation``: per tensor and channel the
absolute maximum, the sums of x^2 and x^4 and the range at each timestep, and per tensor a uniform
random sample of its values (the reservoir). Observations of parts of the calls merge in any order,
by sum, maximum and priority. Their size does not depend on the number of calls.

All but the reservoir covers every value. ONNX Runtime sums in float32 within one call; sums over
calls are float64. So two ways of splitting the calls agree to about 1e-12 relative, provided that
kernels round a call the same in any batch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from mpq_deploy.calibrate.activation_shapes import ActivationShape, activation_shapes, tensors_of
from mpq_deploy.calls.recorded import Batch, RecordedCalls
from mpq_deploy.errors import ModelError
from mpq_deploy.graph.constants import add_constant
from mpq_deploy.graph.layers import LayerGraph
from mpq_deploy.models.spec import Array
from mpq_deploy.recipe import CalibrateSettings
from mpq_deploy.system.lanes import in_lanes, lanes_for
from mpq_deploy.system.progress import Talk
from mpq_deploy.system.sessions import constants_of, open_session, within_gpu_memory

# Values that one call offers to a reservoir of R values: R / 16, at least 64. From 16 calls on the
# reservoir is full. More would cost time; fewer would limit the sample to few positions.
CANDIDATE_SHARE = 16
LEAST_CANDIDATES = 64
# From this opset on all reductions take their axes as an input.
LEAST_OPSET = 18


@dataclass(frozen=True)
class Observation:
    """What was observed of T activations, whose channels C_1 .. C_T are concatenated.

    ``offsets`` int64 [T + 1]: where each activation's channels begin. Per channel, float64
    [sum C_i]: ``amax``, ``square_sum`` (of x^2), ``fourth_sum`` (of x^4). ``counts`` float64 [T]:
    values per channel. ``high_by_timestep`` and ``low_by_timestep`` float32 [K, sum C_i]: the ends
    of each channel's range, which includes 0. The reservoir of at most ``reservoir`` values:
    ``priorities`` uint64 [R'], ascending, common to all activations; ``values`` float32 [T, R'] and
    their ``channels`` int32 [T, R'].
    """

    names: tuple[str, ...]
    offsets: Array
    amax: Array
    square_sum: Array
    fourth_sum: Array
    counts: Array
    high_by_timestep: Array
    low_by_timestep: Array
    priorities: Array
    values: Array
    channels: Array
    reservoir: int

    @property
    def amax_by_timestep(self) -> Array:
        """The largest magnitude of each channel at each timestep, float32 [K, sum C_i]."""
        return np.maximum(self.high_by_timestep, -self.low_by_timestep)


def merge(a: Observation, b: Observation) -> Observation:
    """Return the observation of the calls of ``a`` and ``b``. Associative up to rounding.

    Raises ValueError when tensors, channels, timesteps or reservoir sizes differ.
    """
    if (a.names, a.reservoir, a.high_by_timestep.shape) != (
        b.names,
        b.reservoir,
        b.high_by_timestep.shape,
    ):
        raise ValueError("The observations are of different graphs, timesteps or reservoir sizes.")
    if not np.array_equal(a.offsets, b.offsets):
        raise ValueError("The observations are of tensors with different channels.")
    priorities, values, channels = _smallest(
        np.concatenate([a.priorities, b.priorities]),
        np.concatenate([a.values, b.values], axis=1),
        np.concatenate([a.channels, b.channels], axis=1),
        a.reservoir,
    )
    return replace(
        a,
        amax=np.maximum(a.amax, b.amax),
        square_sum=a.square_sum + b.square_sum,
        fourth_sum=a.fourth_sum + b.fourth_sum,
        counts=a.counts + b.counts,
        high_by_timestep=np.maximum(a.high_by_timestep, b.high_by_timestep),
        low_by_timestep=np.minimum(a.low_by_timestep, b.low_by_timestep),
        priorities=priorities,
        values=values,
        channels=channels,
    )


def observe(
    graph: LayerGraph,
    calls: RecordedCalls,
    settings: CalibrateSettings,
    talk: Talk,
    *,
    scratch: Path | None = None,
    chosen: Iterable[Batch] | Array | None = None,
) -> Observation:
    """Run the recorded calls, or only ``chosen`` (int array of calls, or batches), with observers.

    Calls of several image sizes are observed size by size. Raises ModelError, naming tensor, layer
    and timestep, when an activation is not finite.
    """
    if calls.spec.sizes and not isinstance(chosen, list):
        parts = list(calls.batches(settings.batch_size, calls=chosen))  # type: ignore[arg-type]
        by_size = [[p for p in parts if p.size == k] for k in range(len(calls.spec.sizes))]
        seen = (
            observe(graph, calls, settings, talk, scratch=scratch, chosen=some)
            for some in by_size
            if some
        )
        return reduce(merge, seen)
    number = chosen[0].size if calls.spec.sizes and isinstance(chosen, list) else None
    shapes = activation_shapes(graph, calls, talk, scratch, size=number)
    which = chosen if isinstance(chosen, np.ndarray) else None
    batches = list(chosen) if chosen is not None and which is None else None

    def observed_in(size: int) -> Observation:
        observed = ObservedGraph.of(graph, shapes)
        parts = list(calls.batches(size, calls=which)) if batches is None else batches
        total = Totals(graph, observed, len(calls.recorded.timesteps), settings)
        lanes = lanes_for(sum(tensor.nbytes for tensor in constants_of(observed.model)))
        with (
            open_session(observed.model, talk, scratch=scratch, threads=lanes.threads) as session,
            talk.bar("observe activations", sum(len(batch.calls) for batch in parts)) as advance,
        ):

            def run(batch: Batch) -> list[Array]:
                return observed.run(session, batch.feed, draws_of(settings, batch)[1])

            made = in_lanes(run, parts, lanes.count)
            for batch, results in zip(parts, made, strict=True):
                total.add(batch, results, *draws_of(settings, batch))
                advance(len(batch.calls))
        return total.finish()

    size = settings.batch_size if batches is None else 1
    return within_gpu_memory(observed_in, size, "calls observed", talk)


@dataclass(frozen=True)
class ObservedGraph:
    """A copy of a graph that returns five outputs for each activation, ordered like ``shapes``.

    The outputs are the maximum, the minimum, the sum of x^2, and the sum of (x^2 / max x^2)^2, each
    [calls or 1, ..., C], and a gathered sample [calls, candidates]. The copy shares its constants
    with the original graph. ``channels``: how many each activation has.
    """

    model: ir.Model
    shapes: dict[str, ActivationShape]
    channels: tuple[int, ...]
    outputs: tuple[str, ...]

    @classmethod
    def of(cls, graph: LayerGraph, shapes: dict[str, ActivationShape]) -> ObservedGraph:
        """Add the reductions to a copy of ``graph``, right after the nodes that they observe."""
        model = graph.model.clone()
        writer = ObserverWriter(model)
        convolved = {
            use.input for layer in graph.layers if layer.op == "Conv" for use in layer.uses
        }
        values = tensors_of(model)
        model.graph.outputs.clear()
        channels = []
        for tensor, shape in shapes.items():
            channels.append(shape.shape[1 if tensor in convolved else -1])
            writer.observe(values[tensor], shape, tensor in convolved)
        outputs = tuple(value.name or "" for value in model.graph.outputs)
        return cls(model, shapes, tuple(channels), outputs)

    def run(
        self, session: ort.InferenceSession, feed: dict[str, Array], draws: Array
    ) -> list[Array]:
        """Run a batch's ``feed`` in ``session``, opened on the graph; return its outputs."""
        feed = {**feed, **self.positions(draws)}
        inputs = {entry.name for entry in session.get_inputs()}
        return list(session.run(self.outputs, {k: v for k, v in feed.items() if k in inputs}))

    def positions(self, draws: Array) -> dict[str, Array]:
        """Turn random ``draws`` int64 [M, candidates] into feeds with the positions to gather."""
        rows = np.arange(len(draws), dtype=np.int64)[:, None]
        feed = {}
        for shape in self.shapes.values():
            start = rows * shape.elements if shape.batch_axis is not None else 0
            feed[_positions_name(shape)] = start + draws % shape.elements
        return feed


def _positions_name(shape: ActivationShape) -> str:
    return f"observer.positions.{shape.elements}{'' if shape.batch_axis is not None else '.shared'}"


class ObserverWriter:
    """Adds observer nodes to a model."""

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        opset = model.opset_imports.get("", 0)
        if opset < LEAST_OPSET:
            raise ModelError(
                f"The model is of opset {opset}.",
                f"Export it again with opset {LEAST_OPSET} or later, or normalise it.",
            )
        self.pending: list[ir.Node] = []
        self.inputs: dict[str, ir.Value] = {}
        self.constants: dict[tuple[int, ...] | str, ir.Value] = {}

    def observe(self, tensor: ir.Value, shape: ActivationShape, convolved: bool) -> None:
        """Add the five outputs of ``tensor``; ``convolved``: a Conv reads it (channel axis 1)."""
        if tensor.dtype != ir.DataType.FLOAT:
            tensor = self.op("Cast", tensor, to=ir.DataType.FLOAT)
        if shape.batch_axis:
            order = [
                shape.batch_axis,
                *(a for a in range(len(shape.shape)) if a != shape.batch_axis),
            ]
            tensor = self.op("Transpose", tensor, perm=order)
        sizes = list(shape.shape)
        if convolved:
            frames, channels = sizes[0], sizes[1]
            rest = shape.elements // (frames * channels)
            target, axes = ([-1, channels, rest], [2])
            if frames > 1 or shape.batch_axis is None:
                target, axes = ([-1, frames, channels, rest], [1, 3])
        else:
            target, axes = ([-1, shape.elements // sizes[-1], sizes[-1]], [1])
        viewed = self.op("Reshape", tensor, self.constant(target))
        square = self.op("Mul", viewed, viewed)
        ends = [
            self.op(kind, viewed, self.constant(axes), keepdims=1)
            for kind in ("ReduceMax", "ReduceMin")
        ]
        greatest = self.op("Max", *(self.op("Mul", end, end) for end in ends))
        # Relative to the largest square: in float32 the fourth power of values over 1e9 overflows.
        share = self.op("Div", square, self.op("Max", greatest, self.smallest()))
        for end in ends:
            self.output(self.op("Squeeze", end, self.constant(axes)))
        self.output(self.reduce("ReduceSum", square, axes))
        self.output(self.reduce("ReduceSum", self.op("Mul", share, share), axes))
        flat = self.op("Reshape", tensor, self.constant([-1]))
        self.output(self.op("Gather", flat, self.input(_positions_name(shape)), axis=0))
        self.place(tensor)

    def op(self, kind: str, *inputs: ir.Value, **attributes: int | list[int]) -> ir.Value:
        """Add a node; return its first output."""
        node = ir.node(kind, inputs, attributes=attributes)
        self.pending.append(node)
        return node.outputs[0]

    def reduce(self, kind: str, value: ir.Value, axes: list[int]) -> ir.Value:
        """Add a reduction over ``axes``, which are dropped."""
        return self.op(kind, value, self.constant(axes), keepdims=0)

    def constant(self, numbers: list[int]) -> ir.Value:
        """Return an INT64 constant [n]; equal ``numbers`` share one."""
        key = tuple(numbers)
        if key not in self.constants:
            name = f"observer.constant.{len(self.constants)}"
            self.constants[key] = add_constant(self.model, name, np.asarray(numbers, np.int64))
        return self.constants[key]

    def smallest(self) -> ir.Value:
        """Return a constant, the smallest normal float32: a divisor in place of 0."""
        if "smallest" not in self.constants:
            tiny = np.asarray(np.finfo(np.float32).tiny)
            self.constants["smallest"] = add_constant(self.model, "observer.smallest", tiny)
        return self.constants["smallest"]

    def input(self, name: str) -> ir.Value:
        """Return the graph input ``name`` for positions; add it on the first call."""
        if name not in self.inputs:
            kind = ir.TensorType(ir.DataType.INT64)
            value = ir.Value(name=name, type=kind, shape=ir.Shape(["observed_calls", "candidates"]))
            self.model.graph.inputs.append(value)
            self.inputs[name] = value
        return self.inputs[name]

    def output(self, value: ir.Value) -> None:
        """Make ``value`` an output of the graph, float32."""
        value.name = f"observer.output.{len(self.model.graph.outputs)}"
        value.type = ir.TensorType(ir.DataType.FLOAT)
        self.model.graph.outputs.append(value)

    def place(self, tensor: ir.Value) -> None:
        """Insert the pending nodes after the node whose output they read, or first in the graph."""
        producer = tensor.producer()
        if producer in self.pending:
            producer = self.pending[0].inputs[0].producer()  # type: ignore[union-attr]
        if producer is not None:
            self.model.graph.insert_after(producer, self.pending)
        else:
            self.model.graph.insert_before(self.model.graph[0], self.pending)
        self.pending = []


def draws_of(settings: CalibrateSettings, batch: Batch) -> tuple[Array, Array]:
    """Return random priorities uint64 and draws int64, [M, candidates], for the M calls of a batch.

    They depend on seed, timestep and call alone.
    """
    candidates = max(LEAST_CANDIDATES, settings.reservoir // CANDIDATE_SHARE)
    priorities = np.empty((len(batch.calls), candidates), np.uint64)
    draws = np.empty((len(batch.calls), candidates), np.int64)
    for row, call in enumerate(batch.calls):
        generator = np.random.default_rng((settings.seed, batch.step, int(call)))
        priorities[row] = generator.integers(0, 2**64, candidates, np.uint64)
        draws[row] = generator.integers(0, 2**62, candidates, np.int64)
    return priorities, draws


def _smallest(
    priorities: Array, values: Array, channels: Array, count: int
) -> tuple[Array, Array, Array]:
    """Keep the columns [T, n] with the ``count`` smallest priorities, in ascending order."""
    # Equal priorities are ordered by value, so that the result does not depend on merging order.
    order = (
        np.lexsort((values[0], priorities))[:count]
        if len(values)
        else np.argsort(priorities)[:count]
    )
    return priorities[order], values[:, order], channels[:, order]


def _channel_of(draws: Array, shape: ActivationShape, convolved: bool) -> Array:
    """Return each gathered value's channel, int32 [draws], by the graph's flattening."""
    axes = list(range(len(shape.shape)))
    if shape.batch_axis:
        axes.insert(0, axes.pop(shape.batch_axis))
    place = np.unravel_index(draws.ravel() % shape.elements, [shape.shape[axis] for axis in axes])
    return place[axes.index(1 if convolved else len(axes) - 1)].astype(np.int32)


class Totals:
    """Accumulates the outputs of each batch into one Observation."""

    def __init__(
        self,
        graph: LayerGraph,
        observed: ObservedGraph,
        timesteps: int,
        settings: CalibrateSettings,
    ) -> None:
        self.graph, self.shapes, self.reservoir = (
            graph,
            list(observed.shapes.items()),
            settings.reservoir,
        )
        self.offsets = np.concatenate([[0], np.cumsum(observed.channels, dtype=np.int64)]).astype(
            np.int64
        )
        size = int(self.offsets[-1])
        self.amax, self.square_sum, self.fourth_sum = (np.zeros(size, np.float64) for _ in range(3))
        self.counts = np.zeros(len(self.shapes), np.float64)
        self.high, self.low = (np.zeros((timesteps, size), np.float32) for _ in range(2))
        self.priorities = np.empty(0, np.uint64)
        self.values = np.empty((len(self.shapes), 0), np.float32)
        self.channels = np.empty((len(self.shapes), 0), np.int32)
        self.convolved = {
            use.input for layer in graph.layers if layer.op == "Conv" for use in layer.uses
        }

    def add(self, batch: Batch, results: list[Array], priorities: Array, draws: Array) -> None:
        """Add the outputs of one run, ``results``. Raises ModelError where one is not finite."""
        calls = len(batch.calls)
        for number, (name, shape) in enumerate(self.shapes):
            channels = int(self.offsets[number + 1] - self.offsets[number])
            high, low, squares, shares = (
                r.reshape(-1, channels).astype(np.float64)
                for r in results[5 * number : 5 * number + 4]
            )
            greatest = np.maximum(high, -low)
            if len(squares) != (calls if shape.batch_axis is not None else 1):
                raise ModelError(
                    f"The activation '{name}' is not of the shape {shape.shape} per call that the model declares.",
                    "Export the model again, or remove its value_info.",
                )
            place = slice(self.offsets[number], self.offsets[number + 1])
            # A tensor that all calls share was reduced once and counts once per call.
            repeats = 1 if shape.batch_axis is not None else calls
            square_sum = repeats * squares.sum(axis=0)
            fourth_sum = repeats * (greatest**4 * shares).sum(axis=0)
            if not np.isfinite(square_sum).all():
                raise self._not_finite(name, square_sum, batch)
            amax = greatest.max(axis=0)
            self.amax[place] = np.maximum(self.amax[place], amax)
            self.square_sum[place] += square_sum
            self.fourth_sum[place] += fourth_sum
            self.counts[number] += calls * (shape.elements // channels)
            for seen, ends, widest in (
                (self.high, high.max(axis=0), np.maximum),
                (self.low, low.min(axis=0), np.minimum),
            ):
                own = seen[batch.step, place]
                widest(own, ends, out=own, casting="same_kind")
        values = np.stack([r.ravel() for r in results[4::5]]) if results else self.values[:, :0]
        places = [_channel_of(draws, shape, name in self.convolved) for name, shape in self.shapes]
        self.priorities, self.values, self.channels = _smallest(
            np.concatenate([self.priorities, priorities.ravel()]),
            np.concatenate([self.values, values], axis=1),
            np.concatenate([self.channels, *([np.stack(places)] if places else [])], axis=1),
            self.reservoir,
        )

    def _not_finite(self, name: str, square_sum: Array, batch: Batch) -> ModelError:
        reader = next((f"layer '{one}'" for one in self.graph.activations[name]), "an attention")
        channel = int(np.argmin(np.isfinite(square_sum)))
        return ModelError(
            f"The activation '{name}', read by {reader}, is not finite (or its square is not) in "
            f"channel {channel} at timestep {batch.timestep:g}.",
            "Check the weights before this layer for NaN and Inf, and the scheduler's configuration.",
        )

    def finish(self) -> Observation:
        """Return the observation of all batches."""
        names = tuple(name for name, _ in self.shapes)
        return Observation(
            names,
            self.offsets,
            self.amax,
            self.square_sum,
            self.fourth_sum,
            self.counts,
            self.high,
            self.low,
            self.priorities,
            self.values,
            self.channels,
            self.reservoir,
        )
