"""The ground truth: run the denoiser with one layer quantized, compare with the float output.

NMSE = mean over timesteps of (sum of squared differences / sum of squared outputs), both sums over
the measured calls. With torch, only the nodes downstream of the layer are run again. Without torch,
ONNX Runtime runs the float graph and adds the layer's local error to the layer's output. The result
is the same because the layer's input is float. The exception is a layer of which one use feeds
another: its later uses are then evaluated on float inputs, and a note in the table says so.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

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
from mpq_deploy.sensitivity.local_error import LayerErrors, Taps, tap_names
from mpq_deploy.sensitivity.measured_calls import MEMORY_BYTES, Calls
from mpq_deploy.sensitivity.ort_graph import noisy_graph, tapped_graph
from mpq_deploy.sensitivity.subject import Subject, timestep_of
from mpq_deploy.sensitivity.table import SensitivityTable, table_from_losses
from mpq_deploy.system.gpu_memory import Shrinking

# Which schemes of each layer are measured.
Chosen = Mapping[Layer, frozenset[str]]
# Feeds -> the sum of ||output||^2, and (layer, scheme, sum of squared differences) of every pair.
Evaluate = Callable[[dict[str, Array]], tuple[float, Iterator[tuple[str, str, float]]]]


def measure_exhaustive(
    subject: Subject,
    pairs: Collection[tuple[str, str]] | None = None,
    use_torch: bool | None = None,
) -> SensitivityTable:
    """Measure every (layer, scheme) pair, or only ``pairs``, one at a time.

    ``use_torch`` False: ONNX Runtime. Otherwise torch, where it is installed and knows every
    operator of the graph. Where an operator fails in torch, True raises FailedOperator, and None
    falls back to ONNX Runtime with a warning.
    """
    chosen = {
        layer: frozenset(
            s.name
            for s in subject.candidates[layer.name].schemes
            if pairs is None or (layer.name, s.name) in pairs
        )
        for layer in subject.layers
    }
    chosen = {layer: schemes for layer, schemes in chosen.items() if schemes}
    if use_torch is not False and evaluates_in_torch(subject.graph):
        from mpq_deploy.onnx_torch.torch_graph import FailedOperator

        try:
            return _table(subject, chosen, partial(_in_torch, subject, chosen), ())
        except FailedOperator as error:
            if use_torch:
                raise
            # ONNX Runtime gives the same numbers, only slower.
            subject.talk.warn(f"ONNX Runtime measures single layers: {error.message}")
    notes = _chained_uses(subject.graph, chosen)
    with _in_onnxruntime(subject, subject.calls(), chosen) as evaluate:
        return _table(subject, chosen, lambda: evaluate, notes)


def _table(
    subject: Subject,
    chosen: Chosen,
    open_evaluate: Callable[[], Evaluate],
    notes: tuple[str, ...],
) -> SensitivityTable:
    """Evaluate all calls with the function that ``open_evaluate`` returns; make the table."""
    calls = subject.calls()
    steps = len(calls.timesteps)
    errors = {
        layer.name: {s: np.zeros(steps) for s in sorted(schemes)}
        for layer, schemes in chosen.items()
    }
    power = np.zeros(steps)
    total = steps * calls.count * sum(map(len, chosen.values()))
    work, smaller = Shrinking(open_evaluate, "single layers", subject.talk), calls.halves
    with subject.talk.bar("single layers", total) as advance:

        def evaluated(evaluate: Evaluate, piece: slice) -> tuple[float, list[Any]]:
            squares, changes = evaluate(calls.feeds(step_index, piece))
            found = []
            for change in changes:
                found.append(change)
                advance(piece.stop - piece.start)
            return squares, found

        for step_index, chunk in calls.chunks(subject.batch_size(calls)):
            for squares, found in work.run(chunk, smaller, evaluated):
                power[step_index] += squares
                for layer, scheme, squared_error in found:
                    errors[layer][scheme][step_index] += squared_error
    safe = np.where(power > 0, power, 1.0)
    losses = {layer: {s: total / safe for s, total in row.items()} for layer, row in errors.items()}
    return table_from_losses("exhaustive", calls.timesteps, losses, notes)


def evaluates_in_torch(graph: LayerGraph) -> bool:
    """Whether torch is installed and knows every operator of the graph."""
    if importlib.util.find_spec("torch") is None:
        return False
    from mpq_deploy.onnx_torch.torch_graph import TorchGraph, UnsupportedOperator

    try:
        TorchGraph(graph.model)
    except UnsupportedOperator:
        return False  # ONNX Runtime gives the same numbers, only slower
    return True


def _in_torch(subject: Subject, chosen: Chosen) -> Evaluate:
    """Return a function that evaluates the feeds of some calls in torch (see ``Evaluate``)."""
    import torch

    from mpq_deploy.onnx_torch.torch_graph import TorchGraph

    graph = TorchGraph(subject.graph.model)
    stacks = numpy_stacks(subject.graph, subject.candidates, MEMORY_BYTES)
    output = subject.spec.output
    downstream = {layer: graph.affected_by(use.node for use in layer.uses) for layer in chosen}

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def evaluate(arrays: dict[str, Array]) -> tuple[float, Iterator[tuple[str, str, float]]]:
        feeds, timestep = graph.feed(arrays), timestep_of(subject.spec, arrays)
        values = graph.run(feeds, keep=graph.values)
        reference = values[output].double()

        @torch.no_grad()  # type: ignore[untyped-decorator]
        def squares(layer: Layer, schemes: list[str]) -> list[float]:
            known = {name: v for name, v in values.items() if name not in downstream[layer]}
            found = []
            for scheme in schemes:
                rewire = _rewire(layer, scheme, stacks, subject.stats, graph.float_type, timestep)
                changed = graph.run(feeds, rewire=rewire, known=known)[output]
                found.append((changed.double() - reference).square().sum())
            # One transfer for all schemes: each transfer from a GPU waits for its queue.
            return list(torch.stack(found).cpu().tolist())

        def changes() -> Iterator[tuple[str, str, float]]:
            for layer, schemes in chosen.items():
                ordered = sorted(schemes)
                for scheme, square in zip(ordered, squares(layer, ordered), strict=True):
                    yield layer.name, scheme, square

        return float(reference.square().sum().cpu()), changes()

    return evaluate  # type: ignore[no-any-return]


def _rewire(
    layer: Layer,
    scheme: str,
    stacks: StackStore[FormStack],
    stats: CalibrationStats,
    float_type: Any,
    timestep: float | None,
) -> dict[str, Any]:
    """Return node name -> function that replaces the node's inputs with those under ``scheme``.

    The new inputs are the fake-quantized activation and the dequantized weight.
    """
    from mpq_deploy.onnx_torch.torch_graph import torch_from_constant
    from mpq_deploy.sensitivity.torch_projection import lost_by_rounding

    stack = stacks[layer]
    matrix = stack.weight + stack.difference(scheme)
    weight = (matrix if layer.out_axis == 0 else np.ascontiguousarray(matrix.T)).reshape(
        layer.weight_shape
    )
    tensor = torch_from_constant(weight, float_type)

    def replace_inputs(roundings: dict[str, InputRounding]) -> Any:
        def change(inputs: list[Any]) -> list[Any]:
            # A branch computes the channels that stay in float, with their float columns; here
            # they are part of the same product.
            rounded = [
                inputs[0] - lost_by_rounding(inputs[0], rounding.at(timestep), layer)
                for rounding in roundings.values()
            ]
            here = tensor.to(inputs[0].device, non_blocking=True)
            return [*(rounded or inputs[:1]), here, *inputs[2:]]

        return change

    return {
        use.node: replace_inputs(input_roundings(stats, use, [SCHEMES[scheme]]))
        for use in layer.uses
    }


@contextmanager
def _in_onnxruntime(subject: Subject, calls: Calls, chosen: Chosen) -> Iterator[Evaluate]:
    """Yield a function that evaluates the feeds of some calls in ONNX Runtime."""
    layers, layer_errors = tuple(chosen), LayerErrors(subject)
    names = tap_names(layers)
    with tapped_graph(subject.graph, names, subject.talk) as session:
        taps = Taps(session, names)
        shapes = taps.shapes(calls)
        ranks = {name: len(shape) for name, shape in shapes.items()}
        with noisy_graph(subject.graph, layers, subject.spec.output, ranks, subject.talk) as noisy:

            def evaluate(feeds: dict[str, Array]) -> tuple[float, Iterator[tuple[str, str, float]]]:
                values = taps.values(feeds)
                reference = noisy.run(feeds).astype(np.float64)

                def changes() -> Iterator[tuple[str, str, float]]:
                    for layer, schemes in chosen.items():
                        by_scheme: dict[str, dict[str, Array]] = {}
                        for output, scheme, error in layer_errors.of(layer, values, feeds, schemes):
                            by_scheme.setdefault(scheme, {})[output] = error
                        for scheme, added in by_scheme.items():
                            change = noisy.run(feeds, added) - reference
                            yield layer.name, scheme, float(np.sum(np.square(change)))

                return float(np.sum(np.square(reference))), changes()

            yield evaluate


def _chained_uses(graph: LayerGraph, layers: Collection[Layer]) -> tuple[str, ...]:
    """Return a note for each layer of which one use feeds another: its losses are not exact."""
    import networkx as nx

    flow = dataflow(graph.model)
    chained = [
        layer.name
        for layer in layers
        if any(
            a is not b and nx.has_path(flow, a.node, b.node) for a in layer.uses for b in layer.uses
        )
    ]
    return tuple(
        f"uses of '{name}' feed one another: later ones were taken on float inputs"
        for name in chained
    )
