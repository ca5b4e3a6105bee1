"""Pass: give each layer the Q/DQ nodes of its scheme, in the forms that TensorRT builds and keeps packed.

1. ``fp16``: nothing.
2. INT8 activations (w8a8, w4a8): one QuantizeLinear/DequantizeLinear pair per activation tensor, rank-0 scale, shared
   by all its INT8 readers, directly on their inputs.
3. INT8 weights (w8a8, w8a16): codes -> DequantizeLinear with one scale per output channel.
4. INT4 weights (w4a16): codes -> DequantizeLinear in blocks along the reduction; a Conv's weight is the matrix
   [O, I*kh*kw], brought back to four dimensions by a Reshape.
5. w4a8: as 4, then QuantizeLinear to INT8 per output channel and DequantizeLinear: 4-bit storage, INT8 compute.
6. A branch beside an INT4 body: see ``branches``. Factors of the input's channels: see ``prescale``.
7. Simulated schemes, for ONNX Runtime alone: see ``simulated``.
8. A weight used by several nodes: each node gets its own copy of the codes, which the file holds once. (One blocked
   INT4 initializer that feeds products of different shapes crashes TensorRT's builder.)

Everything is written in FP32 here; the FP16 passes turn scales into what is deployed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from mpq_deploy.calibrate.scales import ActivationGrid
from mpq_deploy.errors import ModelError
from mpq_deploy.formats.branch_matrices import ColsMatrix, LowRankMatrix, RowsMatrix, ScaledMatrix
from mpq_deploy.formats.candidates import DeployedMatrix
from mpq_deploy.formats.scheme import INT8, Scheme
from mpq_deploy.formats.simulated import SimulatedMatrix
from mpq_deploy.formats.sizes import branch_parts
from mpq_deploy.graph.layers import Layer, LayerGraph
from mpq_deploy.graph.writers.branches import write_columns, write_low_rank, write_rows
from mpq_deploy.graph.writers.prescale import fold_factors, foldable_inputs, multiply_channels
from mpq_deploy.graph.writers.simulated_nodes import SimulatedWriter, write_activation
from mpq_deploy.models.spec import Array
from mpq_deploy.rounding.quantizers import QuantizedMatrix


@dataclass(frozen=True)
class LayerRewrite:
    """What a layer becomes: its scheme and its codes (None for FP16)."""

    layer: Layer
    scheme: Scheme
    matrix: DeployedMatrix | None


def quantize_layers(
    model: ir.Model, rewrites: list[LayerRewrite], activation_scales: Mapping[str, float | ActivationGrid]
) -> tuple[ir.Model, bool]:
    """Rewrite ``model`` in place; return it and whether anything changed.

    ``activation_scales``: activation tensor (followed by the scheme's ``activation_form``) -> INT8 scale, or the grid
    of a simulated quantizer, for every input of a layer with quantized activations.
    """
    nodes = {node.name: node for node in model.graph}
    pairs: dict[str, ir.Value] = {}
    changed = False
    folded = _fold_factors(model, rewrites)
    for rewrite in rewrites:
        if rewrite.matrix is None:
            continue
        write = _weight_writing(model, rewrite)
        for number, use in enumerate(rewrite.layer.uses):
            node = nodes[use.node]
            x = node.inputs[0]
            assert x is not None and x.name is not None
            if rewrite.scheme.activation is not None:
                key = use.input + rewrite.scheme.activation_form
                if key not in pairs:
                    form = rewrite.scheme.activation_form
                    value = x
                    if isinstance(rewrite.matrix, ScaledMatrix) and use.input not in folded:
                        value = multiply_channels(model, x, rewrite.layer, rewrite.matrix.factors, form)
                    pairs[key] = _quantized_activation(model, value, activation_scales[key], x.name, form)
                node.replace_input_with(0, pairs[key])
            write(node, number, x)
        _drop_if_unused(model, rewrite.layer.weight)
        changed = True
    return model, changed


def folded_activations(model: ir.Model, rewrites: list[LayerRewrite]) -> dict[str, LayerRewrite]:
    """Return the activations that can take their factors and whose readers all want them, each with one of these."""
    scaled = {r.layer.name: r for r in rewrites if isinstance(r.matrix, ScaledMatrix)}
    if not scaled:
        return {}
    folded = {}
    for tensor, readers in foldable_inputs(LayerGraph(model, tuple(r.layer for r in rewrites), ())).items():
        wanted = [scaled[name] for name in sorted(readers) if name in scaled]
        if len(wanted) == len(readers) and len({r.scheme.activation_form for r in wanted}) == 1:
            folded[tensor] = wanted[0]
    return folded


def _fold_factors(model: ir.Model, rewrites: list[LayerRewrite]) -> set[str]:
    """Fold the factors of all ``folded_activations``; return these tensors."""
    values = {value.name: value for node in model.graph for value in node.outputs}
    folded = folded_activations(model, rewrites)
    for tensor, rewrite in folded.items():
        assert isinstance(rewrite.matrix, ScaledMatrix)
        fold_factors(values[tensor], rewrite.layer, rewrite.matrix.factors)
    return set(folded)


def _weight_writing(model: ir.Model, rewrite: LayerRewrite) -> Callable[[ir.Node, int, ir.Value], None]:
    """Return what gives a node (its use's number, its float input) the quantized weight, with the branch if any."""
    layer, scheme, matrix = rewrite.layer, rewrite.scheme, rewrite.matrix
    if isinstance(matrix, RowsMatrix):
        (body_layer, body_scheme), (promoted_layer, promoted_scheme) = branch_parts(layer, scheme)
        body = _WeightWriter(model, body_layer, body_scheme, matrix.body)
        promoted = _WeightWriter(model, promoted_layer, promoted_scheme, matrix.promoted)
        return lambda node, number, x: write_rows(model, node, layer, matrix, body.write, promoted.write)
    if isinstance(matrix, ColsMatrix):
        rest = _WeightWriter(model, layer, scheme.body, matrix.body)
        return lambda node, number, x: write_columns(model, node, layer, matrix, x, rest.write)
    if isinstance(matrix, LowRankMatrix):
        writer = _WeightWriter(model, layer, scheme.body, matrix.body)
        return lambda node, number, x: write_low_rank(model, node, layer, matrix, x, writer.write)
    if isinstance(matrix, SimulatedMatrix):
        simulated = SimulatedWriter(model, layer, scheme, matrix)
        return lambda node, number, x: node.replace_input_with(1, simulated.write(node, number))
    assert matrix is not None
    held = matrix.body if isinstance(matrix, ScaledMatrix) else matrix
    plain = _WeightWriter(model, layer, scheme.body, held)
    return lambda node, number, x: node.replace_input_with(1, plain.write(node, number))


class _WeightWriter:
    """Writes the constants and nodes of one quantized weight; tensors are shared by all its uses."""

    def __init__(self, model: ir.Model, layer: Layer, scheme: Scheme, matrix: QuantizedMatrix) -> None:
        self.model, self.layer, self.scheme = model, layer, scheme
        first = layer.out_axis == 0
        int8 = scheme.weight is INT8
        codes, scale = matrix.codes if first else matrix.codes.T, matrix.scale.astype(np.float32)
        if int8:
            codes, scale = (codes.reshape(layer.weight_shape) if first else codes), scale[:, 0]
        elif not first:
            scale = scale.T

        def stored() -> ir.Tensor[Any]:
            found = codes if int8 else codes.astype(ml_dtypes.int4)
            return ir.Tensor(np.asarray(found, order="C"), name=layer.weight)

        # Brought to what is stored when it is written: two graphs share the codes, which are the bulk of all memory.
        dtype = ir.DataType.INT8 if int8 else ir.DataType.INT4
        self.codes = ir.LazyTensor(stored, dtype=dtype, shape=ir.Shape(codes.shape), name=layer.weight)
        self.scale = ir.Tensor(np.asarray(scale, np.float32, order="C"))
        self.block = None if int8 else layer.reduction // matrix.scale.shape[1]
        self.channel = None
        if matrix.channel_scale is not None:
            self.channel = ir.Tensor(matrix.channel_scale.astype(np.float32))
        self.shape = ir.Tensor(np.array(layer.weight_shape, np.int64))

    def write(self, node: ir.Node, number: int = 0) -> ir.Value:
        """Insert the nodes in front of ``node``; return the dequantized weight."""
        suffix = f"//use{number}" if number else ""
        base = self.layer.name
        codes = self._constant(f"{self.layer.weight}//codes{suffix}", self.codes)
        scale = self._constant(f"{self.layer.weight}//scale{suffix}", self.scale)
        axis = self.layer.out_axis if self.block is None else 1 - self.layer.out_axis
        attributes: dict[str, int] = {"axis": axis}
        if self.block is not None:
            attributes["block_size"] = self.block
        weight = self._insert(node, "DequantizeLinear", [codes, scale], attributes, f"{base}/weight_dequantize{suffix}")
        if self.block is not None and self.layer.op == "Conv":
            shape = self._constant(f"{self.layer.weight}//shape", self.shape)
            weight = self._insert(node, "Reshape", [weight, shape], {}, f"{base}/weight_reshape{suffix}")
        if self.channel is not None:
            channel = self._constant(f"{self.layer.weight}//channel_scale{suffix}", self.channel)
            by_channel = {"axis": self.layer.out_axis}
            name = f"{base}/weight_requantize{suffix}"
            to_int8 = {**by_channel, "output_dtype": int(ir.DataType.INT8)}
            weight = self._insert(node, "QuantizeLinear", [weight, channel], to_int8, name)
            weight = self._insert(node, "DequantizeLinear", [weight, channel], by_channel, f"{name}_back")
        return weight

    def _constant(self, name: str, tensor: ir.Tensor[Any] | ir.LazyTensor) -> ir.Value:
        found = self.model.graph.initializers.get(name)
        if found is not None:
            return found
        value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.model.graph.register_initializer(value)
        return value

    def _insert(
        self, before: ir.Node, op: str, inputs: list[ir.Value], attributes: dict[str, int], name: str
    ) -> ir.Value:
        node = ir.node(op, inputs, attributes, name=name, num_outputs=1)
        output = node.outputs[0]
        output.name = f"{name}_output"
        output.type = ir.TensorType(ir.DataType.INT8 if op == "QuantizeLinear" else ir.DataType.FLOAT)
        self.model.graph.insert_before(before, node)
        return output


def _quantized_activation(
    model: ir.Model, value: ir.Value, found: float | ActivationGrid, tensor: str, form: str
) -> ir.Value:
    """Insert the Q/DQ pair of ``value``, the activation ``tensor`` in a scheme's ``form``, right after its producer."""
    scale = found.scale if isinstance(found, ActivationGrid) else found
    if not np.isfinite(scale) or scale <= 0:
        raise ModelError(f"The scale of the activation '{tensor}' is {scale}.", "Calibrate again.")
    if isinstance(found, ActivationGrid):
        return _after_producer(model, value, write_activation(model, value, found, form))
    constant = ir.Value(
        name=f"{tensor}//scale{form}",
        shape=ir.Shape(()),
        type=ir.TensorType(ir.DataType.FLOAT),
        # Rank 0: with shape [1] TensorRT silently runs the convolution in FP16.
        const_value=ir.Tensor(np.asarray(scale, np.float32), name=f"{tensor}//scale{form}"),
    )
    model.graph.register_initializer(constant)
    to_int8 = {"output_dtype": int(ir.DataType.INT8)}
    names = (f"{tensor}/quantize{form}", f"{tensor}/dequantize{form}")
    quantize = ir.node("QuantizeLinear", [value, constant], to_int8, name=names[0], num_outputs=1)
    dequantize = ir.node("DequantizeLinear", [quantize.outputs[0], constant], name=names[1], num_outputs=1)
    for node, dtype in ((quantize, ir.DataType.INT8), (dequantize, ir.DataType.FLOAT)):
        node.outputs[0].name = f"{node.name}_output"
        node.outputs[0].shape = value.shape
        node.outputs[0].type = ir.TensorType(dtype)
    return _after_producer(model, value, [quantize, dequantize])


def _after_producer(model: ir.Model, value: ir.Value, nodes: list[ir.Node]) -> ir.Value:
    """Insert ``nodes`` where ``value`` comes from; return what the last of them gives."""
    producer = value.producer()
    if producer is None:
        model.graph.insert_before(model.graph[0], nodes)
    else:
        model.graph.insert_after(producer, nodes)
    return nodes[-1].outputs[0]


def _drop_if_unused(model: ir.Model, name: str) -> None:
    value = model.graph.initializers[name]
    if not value.uses():
        del model.graph.initializers[name]


def weight_array(model: ir.Model, layer: Layer) -> Array:
    """Return a layer's weight as it stands in ``model`` (a view of the mapped file where possible)."""
    tensor = model.graph.initializers[layer.weight].const_value
    assert tensor is not None
    return tensor.numpy()
