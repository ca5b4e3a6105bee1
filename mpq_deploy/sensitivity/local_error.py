"""The relative squared error of each layer's own output, per scheme and timestep, on float inputs.

e_{l,s,t} = ||layer(X; Q_s) - layer(X; W)||^2 / ||layer(X; W)||^2 over the measured calls, the scheme's activation
quantizer included, bias and all. The layers' inputs come from ONNX Runtime, so many calls at once as a memory cap
allows; the errors are taken in NumPy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnxruntime as ort

from mpq_deploy.calibrate.stats import CalibrationStats
from mpq_deploy.graph.layers import Layer, LayerGraph
from mpq_deploy.models.spec import Array
from mpq_deploy.sensitivity.layer_numpy import UseErrors
from mpq_deploy.sensitivity.layer_weights import (
    CandidateWeights,
    input_roundings,
    measured_layers,
    node_attributes,
    numpy_stacks,
)
from mpq_deploy.sensitivity.measured_calls import Calls, MeasureOptions
from mpq_deploy.sensitivity.ort_graph import run_session, tapped_graph
from mpq_deploy.sensitivity.subject import Subject
from mpq_deploy.sensitivity.table import SensitivityTable, table_from_losses
from mpq_deploy.system.progress import Talk


@dataclass(frozen=True)
class LocalErrors:
    """What running the layers one by one found.

    ``relative``: layer -> scheme -> float64 [K], the relative squared error, a layer's uses together.
    ``mean_square``: layer output -> float64 [K], the mean of Y^2; ``shapes``: layer output -> its shape for one
    call (or one fixed batch). ``shared``: outputs whose shape does not depend on the number of calls.
    """

    relative: dict[str, dict[str, Array]]
    mean_square: dict[str, Array]
    shapes: dict[str, tuple[int, ...]]
    shared: frozenset[str]

    def shape(self, output: str, batches: int) -> tuple[int, ...]:
        """Return the shape of ``output`` in a run of ``batches`` calls (or fixed batches)."""
        shape = self.shapes[output]
        return shape if output in self.shared else (shape[0] * batches, *shape[1:])


def measure_local_error(subject: Subject) -> SensitivityTable:
    """Take the layer's own error as the loss. It ignores what the network makes of it: a baseline, not a default."""
    calls = subject.calls()
    found = local_errors(subject.graph, subject.candidates, subject.stats, calls, subject.options, subject.talk)
    note = "losses are relative errors of the layers' own outputs, not of the denoiser's"
    return table_from_losses("local_error", calls.timesteps, found.relative, (note,))


def local_errors(
    graph: LayerGraph,
    candidates: Mapping[str, CandidateWeights],
    stats: CalibrationStats,
    calls: Calls,
    options: MeasureOptions,
    talk: Talk,
) -> LocalErrors:
    """Run every layer's schemes on the float inputs of the measured calls."""
    layers = measured_layers(graph, candidates)
    errors = LayerErrors(graph, candidates, stats, options.memory_bytes)
    steps = len(calls.timesteps)
    totals = {n.name: {s.name: np.zeros(steps) for s in candidates[n.name].schemes} for n in layers}
    power: dict[str, Array] = {use.output: np.zeros(steps) for n in layers for use in n.uses}
    counts: dict[str, int] = {}
    with tapped_graph(graph, tap_names(layers), talk) as session:
        taps = Taps(session, tap_names(layers))
        shapes = {n: v.shape for n, v in taps.values(calls.feeds(0, calls.first)).items()}
        shared = shared_values(taps, shapes, calls)
        batch = batch_for(shapes, calls, options)
        with talk.bar("local errors", steps * calls.count) as advance:
            for step_index, chunk in calls.chunks(batch):
                values = taps.values(calls.feeds(step_index, chunk))
                for layer in layers:
                    for _, scheme, error in errors.of(layer, values):
                        totals[layer.name][scheme][step_index] += _square_sum(error)
                    for use in layer.uses:
                        power[use.output][step_index] += _square_sum(values[use.output])
                        if step_index == 0:
                            counts[use.output] = counts.get(use.output, 0) + values[use.output].size
                advance(chunk.stop - chunk.start)
    relative = {
        layer.name: {
            s: _ratio(total, np.sum([power[u.output] for u in layer.uses], axis=0)) for s, total in row.items()
        }
        for layer, row in zip(layers, totals.values(), strict=True)
    }
    mean_square = {name: total / counts[name] for name, total in power.items()}
    return LocalErrors(relative, mean_square, {name: shapes[name] for name in power}, shared)


class LayerErrors:
    """The local errors of all layers, given the values of a float run."""

    def __init__(
        self,
        graph: LayerGraph,
        candidates: Mapping[str, CandidateWeights],
        stats: CalibrationStats,
        memory_bytes: int,
    ) -> None:
        self._attributes = node_attributes(graph)
        self._stacks = numpy_stacks(graph, candidates, memory_bytes)
        self._stats = stats
        self._candidates = candidates

    def of(
        self, layer: Layer, values: Mapping[str, Array], schemes: frozenset[str] | None = None
    ) -> Iterator[tuple[str, str, Array]]:
        """Yield (output name, scheme, dY) for every use and scheme of ``layer``."""
        stack = self._stacks[layer]
        for use in layer.uses:
            roundings = input_roundings(self._stats, use, self._candidates[layer.name].schemes)
            errors = UseErrors(layer, self._attributes[use.node], stack, roundings)
            for scheme, error in errors.errors(values[use.input], schemes):
                yield use.output, scheme, error


class Taps:
    """Inner values of the float graph by name, from a session that returns them; graph inputs included."""

    def __init__(self, session: ort.InferenceSession, names: list[str]) -> None:
        given = {value.name for value in session.get_outputs()}
        self._session = session
        self._outputs = [name for name in names if name in given]
        self._names = names

    def values(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run once and return every tapped value."""
        found = dict(zip(self._outputs, run_session(self._session, self._outputs, feeds), strict=True))
        return {name: found[name] if name in found else feeds[name] for name in self._names}


def tap_names(layers: tuple[Layer, ...]) -> list[str]:
    """Return the names of all inputs and outputs of ``layers``."""
    return list(dict.fromkeys(name for n in layers for use in n.uses for name in (use.input, use.output)))


def shared_values(taps: Taps, shapes: Mapping[str, tuple[int, ...]], calls: Calls) -> frozenset[str]:
    """Return the tapped values that several calls share, such as the embedding of a scalar timestep."""
    if calls.fixed_batch or calls.count == 1:
        return frozenset()
    pair = taps.values(calls.feeds(0, slice(0, 2)))
    return frozenset(name for name, shape in shapes.items() if pair[name].shape == shape)


def batch_for(shapes: Mapping[str, tuple[int, ...]], calls: Calls, options: MeasureOptions) -> int:
    """Choose how many calls to run at once so that all tapped values of ``shapes`` (of one call) fit the cap."""
    if calls.fixed_batch:
        return calls.fixed_batch
    per_call = 4 * sum(int(np.prod(shape)) for shape in shapes.values())
    return options.batch_size or max(1, min(calls.count, options.memory_bytes // (4 * max(per_call, 1))))


def _square_sum(values: Array) -> float:
    flat = values.reshape(-1)
    return float(np.dot(flat, flat))


def _ratio(error: Array, power: Array) -> Array:
    """Return error / power, 0 where both vanish (an output that is zero and stays so)."""
    safe = np.where(power > 0, power, 1.0)
    return np.where(power > 0, error / safe, np.where(error > 0, np.inf, 0.0))
