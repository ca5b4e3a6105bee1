"""The ground truth: quantize one layer with one scheme, run the denoiser, compare its output with the float one.

NMSE = mean over timesteps of (sum of squared differences / sum of squared outputs) over the measured calls. With
torch, only what depends on the layer is run again; without, ONNX Runtime runs the float graph with the layer's error
added to its output, which is the same thing (its input is the float one), except for a layer with several uses one
of which feeds another: there later uses are taken on float inputs, and a note says so.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import networkx as nx
import numpy as np

from mpq_deploy.calibrate.stats import CalibrationStats
from mpq_deploy.formats.scheme import SCHEMES
from mpq_deploy.graph.layers import Layer, LayerGraph, dataflow
from mpq_deploy.models.spec import Array
from mpq_deploy.sensitivity.layer_weights import (
    FormStack,
    InputRounding,
    StackStore,
    input_roundings,
    numpy_stacks,
)
from mpq_deploy.sensitivity.local_error import LayerErrors, Taps, batch_for, tap_names
from mpq_deploy.sensitivity.measured_calls import Calls
from mpq_deploy.sensitivity.ort_graph import noisy_graph, tapped_graph
from mpq_deploy.sensitivity.subject import Subject
from mpq_deploy.sensitivity.table import SensitivityTable, table_from_losses

if TYPE_CHECKING:
    from mpq_deploy.onnx_torch.torch_graph import TorchGraph

Pairs = Collection[tuple[str, str]]
Losses = dict[str, dict[str, Array]]


def measure_exhaustive(
    subject: Subject,
    pairs: Pairs | None = None,
    use_torch: bool | None = None,
) -> SensitivityTable:
    """Measure every (layer, scheme), or those in ``pairs``, one at a time.

    ``use_torch`` None takes torch where it is installed and knows every operator of the graph.
    """
    wanted = {
        layer: frozenset(
            s.name for s in subject.candidates[layer.name].schemes if pairs is None or (layer.name, s.name) in pairs
        )
        for layer in subject.layers
    }
    wanted = {layer: schemes for layer, schemes in wanted.items() if schemes}
    errors, power, notes = _measured(subject, wanted, use_torch)
    safe = np.where(power > 0, power, 1.0)
    losses = {layer: {s: total / safe for s, total in row.items()} for layer, row in errors.items()}
    return table_from_losses("exhaustive", subject.calls().timesteps, losses, notes)


def _measured(
    subject: Subject, wanted: dict[Layer, frozenset[str]], use_torch: bool | None
) -> tuple[Losses, Array, tuple[str, ...]]:
    """Return the squared differences for each of ``wanted``, the outputs' power, and notes."""
    calls = subject.calls()
    torch_graph = _torch_graph(subject.graph) if use_torch is not False else None
    if torch_graph is not None:
        stacks = numpy_stacks(subject.graph, subject.candidates, subject.options.memory_bytes)
        return *_with_torch(torch_graph, wanted, stacks, calls, subject), ()
    layer_errors = LayerErrors(subject.graph, subject.candidates, subject.stats, subject.options.memory_bytes)
    found = _with_onnxruntime(wanted, layer_errors, calls, subject)
    return *found, _chained_uses(subject.graph, tuple(wanted))


def evaluates_in_torch(graph: LayerGraph) -> bool:
    """Whether torch is installed and knows every operator of the graph."""
    return _torch_graph(graph) is not None


def _torch_graph(graph: LayerGraph) -> TorchGraph | None:
    if importlib.util.find_spec("torch") is None:
        return None
    from mpq_deploy.onnx_torch.torch_graph import TorchGraph, UnsupportedOperator

    try:
        return TorchGraph(graph.model)
    except UnsupportedOperator:
        return None  # ONNX Runtime gives the same numbers, only slower


def _with_torch(
    torch_graph: TorchGraph,
    wanted: dict[Layer, frozenset[str]],
    stacks: StackStore[FormStack],
    calls: Calls,
    subject: Subject,
) -> tuple[Losses, Array]:
    import torch

    spec = subject.spec

    errors, power = _empty(wanted, calls)
    downstream = {layer: torch_graph.affected_by(use.node for use in layer.uses) for layer in wanted}
    pairs = sum(map(len, wanted.values()))
    with torch.no_grad(), subject.talk.bar("single layers", len(calls.timesteps) * calls.count * pairs) as advance:
        first = torch_graph.run(torch_graph.feed(calls.feeds(0, calls.first)), keep=torch_graph.values)
        batch = batch_for({name: tuple(v.shape) for name, v in first.items()}, calls, subject.options)
        for step_index, chunk in calls.chunks(batch):
            feeds = torch_graph.feed(calls.feeds(step_index, chunk))
            values = torch_graph.run(feeds, keep=torch_graph.values)
            reference = values[spec.output].double()
            power[step_index] += float(reference.square().sum())
            for layer, schemes in wanted.items():
                known = {name: v for name, v in values.items() if name not in downstream[layer]}
                for scheme in sorted(schemes):
                    rewire = _rewire(layer, scheme, stacks, subject.stats, torch_graph.float_type)
                    output = torch_graph.run(feeds, rewire=rewire, known=known)[spec.output]
                    found = float((output.double() - reference).square().sum())
                    errors[layer.name][scheme][step_index] += found
                    advance(chunk.stop - chunk.start)
    return errors, power


def _rewire(
    layer: Layer, scheme: str, stacks: StackStore[FormStack], stats: CalibrationStats, float_type: Any
) -> dict[str, Any]:
    """Return the inputs of the layer's nodes under ``scheme``: the rounded activation, the dequantized weight."""
    from mpq_deploy.onnx_torch.torch_graph import torch_from_constant
    from mpq_deploy.sensitivity.torch_projection import fake_quantize

    stack = stacks[layer]
    matrix = stack.weight + stack.difference(scheme)
    weight = (matrix if layer.out_axis == 0 else np.ascontiguousarray(matrix.T)).reshape(layer.weight_shape)
    tensor = torch_from_constant(weight, float_type)

    def replace_inputs(roundings: dict[str, InputRounding]) -> Any:
        def change(inputs: list[Any]) -> list[Any]:
            # Channels kept in float, with their float columns, are what a branch computes beside the body.
            found = [fake_quantize(inputs[0], rounding, layer) for rounding in roundings.values()]
            return [*(found or inputs[:1]), tensor, *inputs[2:]]

        return change

    return {use.node: replace_inputs(input_roundings(stats, use, [SCHEMES[scheme]])) for use in layer.uses}


def _with_onnxruntime(
    wanted: dict[Layer, frozenset[str]],
    layer_errors: LayerErrors,
    calls: Calls,
    subject: Subject,
) -> tuple[Losses, Array]:
    graph, talk = subject.graph, subject.talk
    errors, power = _empty(wanted, calls)
    layers = tuple(wanted)
    names = tap_names(layers)
    pairs = sum(map(len, wanted.values()))
    with tapped_graph(graph, names, talk) as tapping:
        taps = Taps(tapping, names)
        shapes = {name: value.shape for name, value in taps.values(calls.feeds(0, calls.first)).items()}
        batch = batch_for(shapes, calls, subject.options)
        ranks = {name: len(shape) for name, shape in shapes.items()}
        with (
            noisy_graph(graph, layers, subject.spec.output, ranks, talk) as noisy,
            talk.bar("single layers", len(calls.timesteps) * calls.count * pairs) as advance,
        ):
            for step_index, chunk in calls.chunks(batch):
                feeds = calls.feeds(step_index, chunk)
                values = taps.values(feeds)
                reference = noisy.run(feeds).astype(np.float64)
                power[step_index] += float(np.sum(np.square(reference)))
                for layer, schemes in wanted.items():
                    by_scheme: dict[str, dict[str, Array]] = {}
                    for output, scheme, error in layer_errors.of(layer, values, schemes):
                        by_scheme.setdefault(scheme, {})[output] = error
                    for scheme, added in by_scheme.items():
                        changed = noisy.run(feeds, added)
                        found = float(np.sum(np.square(changed - reference)))
                        errors[layer.name][scheme][step_index] += found
                        advance(chunk.stop - chunk.start)
    return errors, power


def _empty(wanted: dict[Layer, frozenset[str]], calls: Calls) -> tuple[Losses, Array]:
    steps = len(calls.timesteps)
    return {n.name: {s: np.zeros(steps) for s in sorted(schemes)} for n, schemes in wanted.items()}, np.zeros(steps)


def _chained_uses(graph: LayerGraph, layers: tuple[Layer, ...]) -> tuple[str, ...]:
    """Name the layers of which one use feeds another: injecting float-input errors is not exact for those."""
    flow = dataflow(graph.model)
    chained = [
        layer.name
        for layer in layers
        if any(a is not b and nx.has_path(flow, a.node, b.node) for a in layer.uses for b in layer.uses)
    ]
    return tuple(f"uses of '{name}' feed one another: later ones were taken on float inputs" for name in chained)
