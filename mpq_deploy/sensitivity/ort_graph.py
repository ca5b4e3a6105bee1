"""The float graph in ONNX Runtime with chosen inner values as outputs, or noise added at layers.

For every layer output Y the graph gets a new input of Y's type and rank, which is added to Y. A
zero of shape [1, ..., 1] is fed to the inputs of the layers that are not measured, so that one
session serves all layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from mpq_deploy.errors import ModelError
from mpq_deploy.graph.layers import Layer, LayerGraph
from mpq_deploy.models.spec import Array
from mpq_deploy.runtime.ort import ORT_ERRORS
from mpq_deploy.system.progress import Talk
from mpq_deploy.system.sessions import open_session


class NoisyGraph:
    """A session whose runs can add noise to layer outputs."""

    def __init__(
        self, session: ort.InferenceSession, noise: dict[str, tuple[str, int]], output: str
    ) -> None:
        self._session = session
        self._noise = noise
        self._output = output
        self._zero = {name: np.zeros((1,) * rank, np.float32) for name, rank in noise.values()}

    def run(self, feeds: Mapping[str, Array], noise: Mapping[str, Array] | None = None) -> Array:
        """Return the denoiser's output with ``noise`` (layer output's name -> array) added."""
        added = {self._noise[output][0]: values for output, values in (noise or {}).items()}
        return run_session(self._session, [self._output], {**feeds, **self._zero, **added})[0]


def run_session(
    session: ort.InferenceSession, outputs: list[str], feeds: Mapping[str, Array]
) -> list[Array]:
    """Run a session, turning its errors into ModelError."""
    try:
        found: list[Array] = session.run(outputs, dict(feeds))
    except ORT_ERRORS as error:
        raise ModelError(
            f"ONNX Runtime failed on the float graph: {error}", "Check the calibration inputs."
        ) from error
    return found


@contextmanager
def noisy_graph(
    graph: LayerGraph, layers: Iterable[Layer], output: str, ranks: Mapping[str, int], talk: Talk
) -> Iterator[NoisyGraph]:
    """Open a session with a noise input at every use of ``layers``.

    ``ranks``: output name of a use -> number of its axes.
    """
    model = graph.model.clone()
    outputs = {use.output for layer in layers for use in layer.uses}
    names: dict[str, tuple[str, int]] = {}
    for node in list(model.graph):
        name = node.outputs[0].name
        if name in outputs:
            names[name] = (_add_noise(model, node, ranks[name]), ranks[name])
    with open_session(model, talk) as session:
        yield NoisyGraph(session, names, output)


def _add_noise(model: ir.Model, node: ir.Node, rank: int) -> str:
    value = node.outputs[0]
    kind = ir.TensorType(value.dtype or ir.DataType.FLOAT)
    noise = ir.Value(name=f"{value.name}.noise", type=kind, shape=ir.Shape([None] * rank))
    add = ir.node("Add", [value, noise], name=f"{node.name}.noise")
    noisy = add.outputs[0]
    noisy.name = f"{value.name}.noisy"
    noisy.type = kind
    for user, index in tuple(value.uses()):
        if user is not add:
            user.replace_input_with(index, noisy)
    for number, result in enumerate(model.graph.outputs):
        if result is value:
            # The graph's output must keep its name, so the layer's own value is renamed.
            value.name, noisy.name = f"{value.name}.clean", value.name
            noisy.shape = value.shape
            model.graph.outputs[number] = noisy
    model.graph.insert_after(node, add)
    model.graph.inputs.append(noise)
    return noise.name or ""


@contextmanager
def tapped_graph(
    graph: LayerGraph, taps: Iterable[str], talk: Talk
) -> Iterator[ort.InferenceSession]:
    """Open a session that also returns the inner values ``taps``."""
    model = graph.model.clone()
    present = {value.name for value in model.graph.outputs} | {
        value.name for value in model.graph.inputs
    }
    wanted = set(taps) - present
    for node in model.graph:
        model.graph.outputs.extend(v for v in node.outputs if v.name in wanted)
    with open_session(model, talk) as session:
        yield session


__all__ = ["NoisyGraph", "noisy_graph", "run_session", "tapped_graph"]
