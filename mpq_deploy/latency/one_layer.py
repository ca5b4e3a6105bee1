"""A graph of one layer under one scheme in a target's dialect, built for a latency table.

In: a layer of a model, its scheme, its shapes. Out: a folder with the deployed ONNX file. Weights
are random (seeded): times do not depend on them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from mpq_deploy.formats.branches.prescaled import TENTHS
from mpq_deploy.formats.candidates import (
    Choices,
    LayerCandidates,
    round_candidates,
    weight_matrix,
    with_promoted_rows,
)
from mpq_deploy.formats.interfaces import ActivationGrid
from mpq_deploy.formats.layer_rounding import InputMoments
from mpq_deploy.formats.scheme import FP16, Scheme
from mpq_deploy.formats.sizes import input_channels
from mpq_deploy.graph.constants import constant
from mpq_deploy.graph.dialects import Dialect
from mpq_deploy.graph.layers import Layer, LayerUse
from mpq_deploy.graph.writers.deployed_graphs import FloatGraph, write_quantized
from mpq_deploy.graph.writers.quantize_layers import LayerRewrite
from mpq_deploy.latency.latency_table import LayerShape
from mpq_deploy.models.spec import Array
from mpq_deploy.rounding.quantizers import Rounding

INPUT, OUTPUT = "x", "y"
FLOAT_MODEL = "float.onnx"
# Any scale does: it is what an activation of the size of one would have.
SCALE = 1 / 32
OPSET, IR_VERSION = 21, 10
SEED = 0


@dataclass(frozen=True)
class OneLayer:
    """A layer to write alone: the node in its model, its shapes with the batch in them, and its scheme."""

    layer: Layer
    node: ir.Node
    shape: LayerShape
    scheme: Scheme

    @property
    def alone(self) -> Layer:
        """The layer in its own graph."""
        return replace(self.layer, uses=(LayerUse(self.node.name or "layer", INPUT, OUTPUT),))


def write_one_layer(one: OneLayer, folder: Path, dialect: Dialect) -> int:
    """Write ``model.onnx`` of one layer into ``folder``; return the bytes of its constants."""
    rng = np.random.default_rng(SEED)
    weight = rng.standard_normal(one.layer.weight_shape).astype(np.float32)
    ir.save(_float_model(one, weight), folder / FLOAT_MODEL)
    matrix = None
    if one.scheme.quantized:
        matrix = _candidates(one, weight).forms[one.scheme.weight_form]
    form = one.scheme.timeless.activation_form
    # Any whole codes do, for channels that are shifted.
    codes = (place % 41 - 20 for place in range(input_channels(one.layer)))
    grid = ActivationGrid(SCALE, zeros=tuple(codes) if form in one.layer.shifted else ())
    rewrite = LayerRewrite(one.alone, one.scheme.timeless, matrix)
    source = FloatGraph(folder / FLOAT_MODEL, "", INPUT)
    return write_quantized(source, [rewrite], {INPUT + form: grid}, folder, dialect)


def _float_model(one: OneLayer, weight: Array) -> ir.Model:
    x = _value(INPUT, one.shape.input_shape)
    held = constant(one.layer.weight, weight)
    constants = [held]
    inputs: list[ir.Value | None] = [x, held]
    for number, given in enumerate(one.node.inputs[2:]):
        if given is None or given.const_value is None:
            inputs.append(None)
            continue
        constants.append(
            constant(f"bias{number}", np.zeros(given.const_value.shape.numpy(), np.float32))
        )
        inputs.append(constants[-1])
    node = ir.Node(
        "",
        one.layer.op,
        inputs,
        one.node.attributes.values(),
        num_outputs=1,
        name=one.alone.uses[0].node,
    )
    y = node.outputs[0]
    y.name, y.shape, y.type = (
        OUTPUT,
        ir.Shape(one.shape.output_shape),
        ir.TensorType(ir.DataType.FLOAT),
    )
    opsets = {"": OPSET}
    graph = ir.Graph(
        [x], [y], nodes=[node], initializers=constants, opset_imports=opsets, name="one_layer"
    )
    return ir.Model(graph, ir_version=IR_VERSION)


def _candidates(one: OneLayer, weight: Array) -> LayerCandidates:
    """Round to the nearest, with every choice of channels as it comes."""
    layer, channels = one.alone, input_channels(one.layer)
    found = round_candidates(
        layer,
        Choices((FP16, one.scheme), {}),
        weight_matrix(layer, weight),
        InputMoments(
            np.ones((layer.group * layer.reduction, 1, 1)),
            (1,) * layer.reduction,
            outliers=np.arange(channels, dtype=np.int32),
            factors=np.full((len(TENTHS), channels), 0.5, np.float16),
        ),
        Rounding(gptq=False, damping=0.05),
    )
    return with_promoted_rows(found, np.arange(layer.out_channels, dtype=np.int32))


def _value(name: str, shape: tuple[int, ...]) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))
