"""Gram matrices of layers' outputs, computed inside the graph, so that only they leave it.

In: a layer graph and N calls that run together. Out: for every layer the Gram matrix of its centred
outputs, (F - mean F)(F - mean F)^T, with F [N, d] one call's output per row. Centring changes
neither estimator of CKA. It happens in the graph, before the product, because float32 would lose
digits where outputs differ little between calls.

A layer with several uses has the sum of their Gram matrices, as if its outputs were concatenated
(our choice). An output without a batch axis (such as the embedding of a timestep that the whole
batch shares) is the same for all calls: it is not observed, and its Gram matrix is 0. The Gram
matrix is also set to 0 where the outputs of all calls agree to ``CONSTANT`` of their power: such
differences are rounding errors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from mpq_deploy.calibrate.activation_shapes import ActivationShape, tensors_of
from mpq_deploy.calibrate.observers import ObserverWriter
from mpq_deploy.errors import ModelError
from mpq_deploy.graph.layers import Layer, LayerGraph
from mpq_deploy.models.spec import Array

# Outputs that differ between calls by less than this share of their power (1e-5 of their rms) count
# as constant. Kernels may round the rows of a batch differently: about 1e-13 was seen. Our choice.
CONSTANT = 1e-10


@dataclass(frozen=True)
class GramGraph:
    """A copy of a graph with two outputs for every use of a layer whose output has a batch axis.

    They are the Gram matrix of the centred outputs, float32 [N, N], and the squared norm of their
    mean, float32 []. ``uses``: the layer index of each use. The copy shares its constants with the
    original graph.
    """

    model: ir.Model
    layers: tuple[Layer, ...]
    uses: tuple[int, ...]
    outputs: tuple[str, ...]

    @classmethod
    def of(
        cls, graph: LayerGraph, layers: tuple[Layer, ...], shapes: Mapping[str, ActivationShape]
    ) -> GramGraph:
        """Observe the outputs of ``layers``, whose shapes for one call are ``shapes``."""
        model = graph.model.clone()
        writer = ObserverWriter(model)
        values = tensors_of(model)
        model.graph.outputs.clear()
        uses = []
        for index, layer in enumerate(layers):
            for use in layer.uses:
                if shapes[use.output].batch_axis is not None:
                    uses.append(index)
                    _observe(writer, values[use.output], shapes[use.output])
        outputs = tuple(value.name or "" for value in model.graph.outputs)
        return cls(model, layers, tuple(uses), outputs)

    def grams(
        self, session: ort.InferenceSession, feeds: Mapping[str, Array], count: int, timestep: float
    ) -> Array:
        """Run ``count`` calls; return the layers' Gram matrices, float64 [L, N, N], 0 if constant.

        ``session`` is of this graph, ``feeds`` holds N = ``count`` calls of ``timestep``. Raises
        ModelError, naming the layer, for an output that is not finite.
        """
        inputs = {entry.name for entry in session.get_inputs()}
        results = (
            session.run(list(self.outputs), {k: v for k, v in feeds.items() if k in inputs})
            if self.uses
            else []
        )
        total = np.zeros((len(self.layers), count, count), np.float64)
        power = np.zeros(len(self.layers), np.float64)
        for use, (index, gram, mean) in enumerate(
            zip(self.uses, results[0::2], results[1::2], strict=True)
        ):
            if not (np.isfinite(gram).all() and np.isfinite(mean)):
                raise ModelError(
                    f"The output of layer '{self.layers[index].name}' (use {use}) is not finite at timestep "
                    f"{timestep:g}, or its square is not.",
                    "Check the weights up to there for NaN and Inf, and the scheduler's configuration.",
                )
            total[index] += gram
            power[index] += count * float(mean)
        differing = np.trace(total, axis1=1, axis2=2)
        total[differing <= CONSTANT * (differing + power)] = 0
        return total


def _observe(writer: ObserverWriter, tensor: ir.Value, shape: ActivationShape) -> None:
    """Add nodes that reshape ``tensor`` to a row per call, centre the columns, and multiply."""
    if tensor.dtype != ir.DataType.FLOAT:
        tensor = writer.op("Cast", tensor, to=ir.DataType.FLOAT)
    if shape.batch_axis:
        order = [shape.batch_axis, *(a for a in range(len(shape.shape)) if a != shape.batch_axis)]
        tensor = writer.op("Transpose", tensor, perm=order)
    rows = writer.op("Reshape", tensor, writer.constant([-1, shape.elements]))
    mean = writer.op("ReduceMean", rows, writer.constant([0]), keepdims=1)
    centred = writer.op("Sub", rows, mean)
    writer.output(writer.op("Gemm", centred, centred, transB=1))
    writer.output(writer.reduce("ReduceSumSquare", mean, [0, 1]))
    writer.place(tensor)
