"""The shape of each activation for one call of the denoiser, and its batch axis.

The shapes are those that the graph declares, where it declares all of them; else ONNX infers them
for one call and for two. Where inference fails, the graph runs with one call and with two.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import onnx_ir as ir

from mpq_deploy.calls.recorded import RecordedCalls
from mpq_deploy.errors import ModelError
from mpq_deploy.graph.layers import LayerGraph
from mpq_deploy.graph.shapes import inferred_shapes
from mpq_deploy.models.spec import DenoiserSpec
from mpq_deploy.system.progress import Talk
from mpq_deploy.system.sessions import open_session


@dataclass(frozen=True)
class ActivationShape:
    """``shape`` of an activation for one call; no ``batch_axis`` if all calls share it."""

    shape: tuple[int, ...]
    batch_axis: int | None

    @property
    def elements(self) -> int:
        """Values per call."""
        return prod(self.shape)


def activation_shapes(
    graph: LayerGraph,
    calls: RecordedCalls,
    talk: Talk,
    scratch: Path | None = None,
    names: tuple[str, ...] | None = None,
    size: int | None = None,
) -> dict[str, ActivationShape]:
    """Return the shapes of all activations that layers read (or of ``names``), by tensor name.

    ``size``: index of the image size, of a model of several; None: the shapes that hold every size,
    or those of the largest size where the graph must run. Raises ModelError when a shape is empty,
    or depends on the number of calls other than by one batch axis.
    """
    spec = calls.spec if size is None else calls.spec.at_size(size)
    names = tuple(graph.activations) if names is None else names
    declared = _declared(graph, spec, names)
    if declared is not None:
        return declared
    counts = (1, 2) if calls.together else (1,)
    inferred = _inferred(graph, spec, names, counts)
    if inferred is not None:
        return inferred
    model = graph.model.clone()
    values = tensors_of(model)
    model.graph.outputs.clear()
    for number, name in enumerate(names):
        node = ir.node("Shape", [values[name]])
        output = node.outputs[0]
        output.name = f"observed_shape.{number}"
        output.type = ir.TensorType(ir.DataType.INT64)
        model.graph.append(node)
        model.graph.outputs.append(output)
    shapes = []
    with open_session(model, talk, scratch=scratch, optimize=False) as session:
        names_fed = {entry.name for entry in session.get_inputs()}
        for count in counts:
            feed = calls.feed(0, np.full(count, _call_of(calls, size), np.int64))
            shapes.append(session.run(None, {k: v for k, v in feed.items() if k in names_fed}))
    one, two = shapes[0], shapes[-1]
    return {
        name: _shape(name, a.tolist(), b.tolist())
        for name, a, b in zip(names, one, two, strict=True)
    }


def _call_of(calls: RecordedCalls, size: int | None) -> int:
    """Return the index of the first call of ``size``; None: of the largest size."""
    sizes = calls.recorded.sizes
    wanted = calls.recorded.largest(calls.spec) if size is None else size
    return 0 if sizes is None else int(np.argmax(sizes[0] == wanted))


def _declared(
    graph: LayerGraph, spec: DenoiserSpec, names: tuple[str, ...]
) -> dict[str, ActivationShape] | None:
    """Return the shapes that the graph declares; None unless only batch axes are symbolic."""
    values = tensors_of(graph.model)
    sample = values.get(spec.sample.name)
    if sample is None or sample.shape is None or tuple(sample.shape)[1:] != spec.sample.shape:
        return None
    batch = sample.shape[0]
    if not isinstance(batch, ir.SymbolicDim) or batch.value is None:
        return None
    shapes = {}
    for name in names:
        dims = values[name].shape
        if dims is None or any(not isinstance(dim, int) and dim != batch for dim in dims):
            return None
        batched = [axis for axis, dim in enumerate(dims) if not isinstance(dim, int)]
        if len(batched) > 1:
            return None
        sizes = tuple(dim if isinstance(dim, int) else 1 for dim in dims)
        shapes[name] = ActivationShape(sizes, batched[0] if batched else None)
    return shapes


def _inferred(
    graph: LayerGraph, spec: DenoiserSpec, names: tuple[str, ...], counts: tuple[int, ...]
) -> dict[str, ActivationShape] | None:
    """Return the shapes that ONNX infers for ``counts`` calls; None unless all are known."""
    inferred = []
    for count in counts:
        inferred.append(inferred_shapes(ir.to_proto(graph.model), spec.input_shapes(count)))
    if any(name not in known for known in inferred for name in names):
        return None
    return {name: _shape(name, list(inferred[0][name]), list(inferred[-1][name])) for name in names}


def tensors_of(model: ir.Model) -> dict[str, ir.Value]:
    """Return the graph's inputs and every node's outputs by name."""
    values = {value.name or "": value for value in model.graph.inputs}
    values.update({value.name or "": value for node in model.graph for value in node.outputs})
    return values


def _shape(name: str, one: list[int], two: list[int]) -> ActivationShape:
    if 0 in one:
        raise ModelError(
            f"The activation '{name}', which a layer reads, has the shape {one} for one call: it is empty.",
            "Check the inputs' shapes, or export the model without that layer.",
        )
    changed = [axis for axis, (a, b) in enumerate(zip(one, two)) if a != b]
    if (
        len(one) != len(two)
        or len(changed) > 1
        or any(two[axis] != 2 * one[axis] for axis in changed)
    ):
        raise ModelError(
            f"The activation '{name}' has shape {one} for one call and {two} for two.",
            "Export the model so that every activation has a batch axis or none of the batch in it.",
        )
    return ActivationShape(tuple(one), changed[0] if changed else None)
