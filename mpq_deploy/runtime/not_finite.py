"""Find where a graph first leaves the finite numbers, for the message when its output does.

In: an ONNX file and one set of inputs. Out: the node, in words, or None when every value is finite.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common_passes

from mpq_deploy.errors import ModelError
from mpq_deploy.graph.constants import add_constant
from mpq_deploy.graph.load import load_model
from mpq_deploy.models.spec import Array
from mpq_deploy.runtime.ort import OrtDenoiser, make_session, model_feeds

FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16)


def first_not_finite(path: Path, feeds: Mapping[str, Array]) -> str | None:
    """Name the first node of ``path`` whose output holds NaN or Inf for ``feeds``.

    Each node's output leaves the runtime as one number, the sum of its elements times zero: 0 where
    all are finite, NaN where one is not. So this needs no more memory than a run of the graph. An
    Inf on purpose (a mask before a softmax) is passed over: only values from which a graph output
    is reached through bad values alone count.
    """
    model = common_passes.ShapeInferencePass()(load_model(path)).model
    outputs = [value for node in model.graph for value in node.outputs if value.type is not None]
    watched = {value.name or "": value for value in outputs if value.dtype in FLOATS}
    zero = add_constant(model, "not_finite.zero", np.zeros((), np.float32))
    names = [_watch(model, value, zero, number) for number, value in enumerate(watched.values())]
    aside = path.with_name(f".{path.name}.watched")
    try:
        # Beside the model, because its weights lie there.
        aside.write_bytes(ir.serde.serialize_model(model).SerializeToString())
        sums = make_session(aside).run(names, dict(feeds))
    finally:
        aside.unlink(missing_ok=True)
    bad = {name for name, total in zip(watched, sums, strict=True) if not np.isfinite(total).all()}
    return _first(watched, bad)


def _first(watched: Mapping[str, ir.Value], bad: set[str]) -> str | None:
    """The first bad value from which a graph output is reached through bad values alone."""
    harmful: set[str] = set()
    for name, value in reversed(list(watched.items())):
        readers = {output.name for reader, _ in value.uses() for output in reader.outputs}
        if name in bad and (value.is_graph_output() or readers & harmful):
            harmful.add(name)
    for name, value in watched.items():
        node = value.producer()
        if name in harmful and node is not None:
            return f"'{name}', the output of the {node.op_type} '{node.name}'"
    return None


def _watch(model: ir.Model, value: ir.Value, zero: ir.Value, number: int) -> str:
    producer = value.producer()
    assert producer is not None
    nodes = [ir.node("Cast", [value], {"to": int(ir.DataType.FLOAT)})]
    nodes.append(ir.node("Mul", [nodes[-1].outputs[0], zero]))
    nodes.append(ir.node("ReduceSum", [nodes[-1].outputs[0]], {"keepdims": 0}))
    model.graph.insert_after(producer, nodes)
    total = nodes[-1].outputs[0]
    total.name = f"not_finite.{number}"
    total.type, total.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([])
    model.graph.outputs.append(total)
    return total.name


class CheckedDenoiser:
    """The float denoiser; its error names the node where an output that is not finite begins."""

    def __init__(self, model: Path, denoiser: OrtDenoiser) -> None:
        self._model, self._denoiser = model, denoiser

    def __call__(
        self, sample: Array, timestep: float | Array, conditions: dict[str, Array]
    ) -> Array:
        """Return the output; ModelError when it is not finite."""
        return self.run(model_feeds(self._denoiser.spec, sample, timestep, conditions))

    def run(self, feeds: dict[str, Array]) -> Array:
        """Return the output for every input by name; ModelError when it is not finite."""
        output = self._denoiser.run(feeds)
        if not np.isfinite(output).all():
            timestep = feeds.get(self._denoiser.spec.timestep_name, np.zeros(1))
            where = first_not_finite(self._model, feeds) or "its output"
            raise ModelError(
                f"The float model gives NaN or Inf at timestep {np.ravel(timestep)[0]:g}: first in {where}.",
                "Check the weights up to there, and that the scheduler is the one the model was trained with.",
            )
        return output
