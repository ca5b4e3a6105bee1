"""The relative squared error of each layer's own output, per scheme and timestep, on float inputs.

e_{l,s,t} = ||layer(X; Q_s) - layer(X; W)||^2 / ||layer(X; W)||^2 over the measured calls, the
scheme's activation quantizer included. ONNX Runtime computes the layers' inputs, up to
``measure.batch_size`` calls at once; NumPy computes the errors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnxruntime as ort

from mpq_deploy.graph.layers import Layer
from mpq_deploy.models.spec import Array
from mpq_deploy.sensitivity.layer_numpy import UseErrors
from mpq_deploy.sensitivity.layer_weights import input_roundings, node_attributes, numpy_stacks
from mpq_deploy.sensitivity.measured_calls import MEMORY_BYTES, Calls
from mpq_deploy.sensitivity.ort_graph import run_session, tapped_graph
from mpq_deploy.sensitivity.subject import Subject, timestep_of
from mpq_deploy.sensitivity.table import Nested, SensitivityTable, table_from_losses

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class LocalErrors:
    """The local errors of all layers, and what their outputs look like.

    ``relative``: layer -> scheme -> float64 [K], the relative squared error over all uses.
    ``mean_square``: output name -> float64 [K], the mean of Y^2. ``shapes``: output name -> its
    shape for one call (or one fixed batch). ``batch_axes``: the axis that the number of calls
    lengthens; None where several calls share a value.
    """

    relative: Nested
    mean_square: dict[str, Array]
    shapes: dict[str, tuple[int, ...]]
    batch_axes: Mapping[str, int | None]

    def shape(self, output: str, batches: int) -> tuple[int, ...]:
        """Return the shape of ``output`` in a run of ``batches`` calls (or fixed batches)."""
        grown = self.batch_axes[output]
        sizes = enumerate(self.shapes[output])
        return tuple(size * batches if axis == grown else size for axis, size in sizes)


def measure_local_error(subject: Subject) -> SensitivityTable:
    """Return the table whose losses are local errors, without their propagation: a baseline."""
    calls = subject.calls()
    note = "losses are relative errors of the layers' own outputs, not of the denoiser's"
    return table_from_losses(
        "local_error", calls.timesteps, local_errors(subject, calls).relative, (note,)
    )


def local_errors(subject: Subject, calls: Calls) -> LocalErrors:
    """Compute the local error of every scheme of every layer on the float inputs of ``calls``."""
    layers, errors, steps = subject.layers, LayerErrors(subject), len(calls.timesteps)
    totals = {
        n.name: {s.name: np.zeros(steps) for s in subject.candidates[n.name].schemes}
        for n in layers
    }
    power: dict[str, Array] = {use.output: np.zeros(steps) for n in layers for use in n.uses}
    counts = dict.fromkeys(power, 0)
    names = tap_names(layers)
    with tapped_graph(subject.graph, names, subject.talk) as session:
        taps = Taps(session, names)
        shapes = taps.shapes(calls)
        batch_axes = _batch_axes(taps, shapes, calls)
        with subject.talk.bar("local errors", steps * calls.count) as advance:
            for step_index, chunk in calls.chunks(subject.batch_size(calls)):
                feeds = calls.feeds(step_index, chunk)
                values = taps.values(feeds)
                for layer in layers:
                    for _, scheme, error in errors.of(layer, values, feeds):
                        totals[layer.name][scheme][step_index] += _square_sum(error)
                    for use in layer.uses:
                        power[use.output][step_index] += _square_sum(values[use.output])
                        if step_index == 0:
                            counts[use.output] += values[use.output].size
                advance(chunk.stop - chunk.start)
    relative = {}
    for layer in layers:
        norm = np.sum([power[use.output] for use in layer.uses], axis=0)
        relative[layer.name] = {s: _ratio(total, norm) for s, total in totals[layer.name].items()}
    mean_square = {name: total / counts[name] for name, total in power.items()}
    return LocalErrors(relative, mean_square, {name: shapes[name] for name in power}, batch_axes)


class LayerErrors:
    """Computes local errors of any layer from the layer inputs of a float run."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._attributes = node_attributes(subject.graph)
        self._stacks = numpy_stacks(subject.graph, subject.candidates, MEMORY_BYTES)

    def of(
        self,
        layer: Layer,
        values: Mapping[str, Array],
        feeds: Mapping[str, Array],
        schemes: frozenset[str] | None = None,
    ) -> Iterator[tuple[str, str, Array]]:
        """Yield (output name, scheme, dY) for every use and scheme of ``layer``.

        ``values``: by name, from a float run with the graph inputs ``feeds``.
        """
        stack, timestep = self._stacks[layer], timestep_of(self._subject.spec, feeds)
        for use in layer.uses:
            roundings = input_roundings(
                self._subject.stats, use, self._subject.candidates[layer.name].schemes
            )
            now = {form: rounding.at(timestep) for form, rounding in roundings.items()}
            errors = UseErrors(layer, self._attributes[use.node], stack, now)
            for scheme, error in errors.errors(values[use.input], schemes):
                yield use.output, scheme, error


class Taps:
    """Reads values of the float graph by name from a session of ``tapped_graph``.

    Names of graph inputs are answered from the feeds.
    """

    def __init__(self, session: ort.InferenceSession, names: list[str]) -> None:
        available = {value.name for value in session.get_outputs()}
        self._session = session
        self._outputs = [name for name in names if name in available]
        self._names = names

    def values(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run once and return every tapped value."""
        outputs = dict(
            zip(self._outputs, run_session(self._session, self._outputs, feeds), strict=True)
        )
        return {name: outputs[name] if name in outputs else feeds[name] for name in self._names}

    def shapes(self, calls: Calls) -> dict[str, tuple[int, ...]]:
        """Return every value's shape for the first of ``calls`` (or the first fixed batch)."""
        return {
            name: value.shape for name, value in self.values(calls.feeds(0, calls.first)).items()
        }


def tap_names(layers: tuple[Layer, ...]) -> list[str]:
    """Return the names of all inputs and outputs of ``layers``."""
    return list(
        dict.fromkeys(name for n in layers for use in n.uses for name in (use.input, use.output))
    )


def _batch_axes(taps: Taps, shapes: Shapes, calls: Calls) -> dict[str, int | None]:
    """Return the axis that a second call lengthens; None for what calls share (a scalar timestep's embedding)."""
    if not calls.paired:
        return dict.fromkeys(shapes, 0)
    pair = taps.values(calls.feeds(0, slice(0, 2)))
    return {
        name: next(
            (i for i, sizes in enumerate(zip(shape, pair[name].shape)) if len({*sizes}) > 1), None
        )
        for name, shape in shapes.items()
    }


def _square_sum(values: Array) -> float:
    flat = values.reshape(-1)
    return float(np.dot(flat, flat))


def _ratio(error: Array, power: Array) -> Array:
    """Return error / power, 0 where both vanish (an output that is zero and stays so)."""
    safe = np.where(power > 0, power, 1.0)
    return np.where(power > 0, error / safe, np.where(error > 0, np.inf, 0.0))
