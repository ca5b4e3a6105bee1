"""What shape each activation has when the denoiser is called once, and along which axis calls are batched.

Found by running the graph with one call and with two, because graphs in the wild declare shapes in part or not.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import onnx_ir as ir

from mpq_deploy.calibrate.feeds import feed_rows
from mpq_deploy.calibrate.sessions import open_session
from mpq_deploy.calibrate.stats import CalibrationSet
from mpq_deploy.denoisers.spec import Array, DenoiserSpec
from mpq_deploy.errors import ModelError
from mpq_deploy.graph.layers import LayerGraph
from mpq_deploy.talk import Talk


@dataclass(frozen=True)
class ActivationShape:
    """``shape`` of an activation for one call. ``batch_axis`` is None when it is the same for all calls."""

    shape: tuple[int, ...]
    batch_axis: int | None

    @property
    def elements(self) -> int:
        """Values per call."""
        return prod(self.shape)


def activation_shapes(
    graph: LayerGraph,
    recorded: CalibrationSet,
    conditions: dict[str, Array],
    spec: DenoiserSpec,
    talk: Talk,
    scratch: Path | None = None,
) -> dict[str, ActivationShape]:
    """Return the shapes of all activations that layers read, by tensor name.

    Raises ModelError when a shape depends on the number of calls in a way that is no batch axis.
    """
    model = graph.model.clone()
    values = tensors_of(model)
    names = list(graph.activations)
    model.graph.outputs.clear()
    for number, name in enumerate(names):
        node = ir.node("Shape", [values[name]])
        output = node.outputs[0]
        output.name = f"observed_shape.{number}"
        output.type = ir.TensorType(ir.DataType.INT64)
        model.graph.append(node)
        model.graph.outputs.append(output)
    counts = (1, 2) if all(condition.batched for condition in spec.conditions) else (1,)
    found = []
    with open_session(model, talk, scratch=scratch, optimize=False) as session:
        wanted = {entry.name for entry in session.get_inputs()}
        for count in counts:
            sample = np.repeat(recorded.samples[0, :1], count, axis=0)
            rows = np.repeat(recorded.rows[:1], count)
            feed = feed_rows(spec, sample, float(recorded.timesteps[0]), rows, conditions)
            found.append(session.run(None, {k: v for k, v in feed.items() if k in wanted}))
    one, two = found[0], found[-1]
    return {name: _shape(name, a.tolist(), b.tolist()) for name, a, b in zip(names, one, two, strict=True)}


def tensors_of(model: ir.Model) -> dict[str, ir.Value]:
    """Return the graph's inputs and every node's outputs by name."""
    values = {value.name or "": value for value in model.graph.inputs}
    values.update({value.name or "": value for node in model.graph for value in node.outputs})
    return values


def _shape(name: str, one: list[int], two: list[int]) -> ActivationShape:
    changed = [axis for axis, (a, b) in enumerate(zip(one, two)) if a != b]
    if len(one) != len(two) or len(changed) > 1 or any(two[axis] != 2 * one[axis] for axis in changed):
        raise ModelError(
            f"The activation '{name}' has shape {one} for one call and {two} for two.",
            "Export the model with a batch axis that every activation follows.",
        )
    return ActivationShape(tuple(one), changed[0] if changed else None)
