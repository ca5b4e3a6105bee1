"""INT8: weights with one scale per output channel, activations with one per tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mpq_deploy.formats.integers import IntegerWeight
from mpq_deploy.formats.interfaces import INT8, ActivationFormat, ActivationGrid, Scheme
from mpq_deploy.formats.sizes import FP16_BYTES
from mpq_deploy.rounding.quantizers import QuantizedMatrix, choose_scale, position_first

if TYPE_CHECKING:
    import onnx_ir as ir

    from mpq_deploy.calibrate.stats import ActivationStats
    from mpq_deploy.engine.expected import ExpectedLayer
    from mpq_deploy.graph.layers import Layer
    from mpq_deploy.graph.writers.node_writer import LayerWriter, NodeWriter
    from mpq_deploy.latency.roofline import Rates
    from mpq_deploy.models.spec import Array

# TensorRT keeps three FP32 factors per output channel of a convolution (three constants [1, O, 1,
# 1] of type Float in its log), two FP16 ones of a product, where the file has one FP16 scale. A
# product has two FP32 factors of one element beside them, each alone in its 128 bytes (seen in
# every build).
CHANNEL_BYTES = {"Conv": 3 * 4, "Gemm": 2 * 2, "MatMul": 2 * 2}
FACTOR_BYTES = {"Conv": 0, "Gemm": 2 * 128, "MatMul": 2 * 128}
# onnx.TensorProto.INT8
ONNX_INT8 = 3


@dataclass(frozen=True)
class Int8Weight(IntegerWeight):
    """Codes -> DequantizeLinear with one scale per output channel."""

    bits = 8
    precision = INT8
    engine_types = ("Int8",)

    def bytes_of(self, layer: Layer) -> int:
        return layer.weights + FP16_BYTES * layer.out_channels

    def unpacked_bytes(self, layer: Layer, alone: bool) -> int:
        """Weights alone of a Conv become FP16 at every call; those of products are fused."""
        whole = alone and layer.op == "Conv" and not self.multiplies(layer, alone)
        return FP16_BYTES * layer.weights if whole else 0

    def scales(self, layer: Layer, weight: Array, importance: Array) -> tuple[Array, Array | None]:
        return choose_scale(weight, importance, 1, self.precision), None

    def write(self, to: LayerWriter, matrix: QuantizedMatrix) -> ir.Value:
        layer = to.layer
        if self.multiplies(layer, to.scheme.activation is None):
            axis, shape = 1, (layer.reduction, layer.out_channels)
            codes = to.codes(lambda: position_first(matrix.codes, layer.taps).T, "INT8", shape)
        else:
            axis = layer.out_axis
            codes = to.codes(lambda: to.folded(matrix.codes), "INT8", layer.weight_shape)
        scale = to.constant("scale", matrix.scale[:, 0].astype(np.float32))
        attributes = {"axis": axis}
        return to.insert("DequantizeLinear", [codes, scale], attributes, "weight_dequantize")


@dataclass(frozen=True)
class Int8Activation(ActivationFormat):
    """One QuantizeLinear/DequantizeLinear pair per tensor, rank-0 scale, shared by all its readers."""

    bits = 8
    operand = "Int8"
    value_bytes = 1

    def grid(self, stats: ActivationStats, scale: float) -> ActivationGrid:
        return ActivationGrid(scale)

    def engine_bytes(self, layer: ExpectedLayer) -> int:
        return CHANNEL_BYTES[layer.op] * layer.out_channels + FACTOR_BYTES[layer.op]

    def operations_per_s(self, rates: Rates) -> float:
        return rates.int8

    def write(
        self, to: NodeWriter, value: ir.Value, grid: ActivationGrid, key: tuple[str, str]
    ) -> list[ir.Node]:
        tensor, form = key
        # Rank 0: with shape [1] TensorRT silently runs the convolution in FP16.
        scale = to.named_constant(f"{tensor}//scale{form}", np.asarray(grid.scale, np.float32))
        inputs, to_int8 = [value, scale], {"output_dtype": ONNX_INT8}
        quantize = to.make(
            "QuantizeLinear", inputs, to_int8, f"{tensor}/quantize{form}", like=value, dtype="INT8"
        )
        inputs = [quantize.outputs[0], scale]
        return [
            quantize,
            to.make("DequantizeLinear", inputs, {}, f"{tensor}/dequantize{form}", like=value),
        ]


INT8_WEIGHT, INT8_INPUT = Int8Weight(), Int8Activation()
W8A8 = Scheme(
    "w8a8", INT8_WEIGHT, INT8_INPUT, meaning="8-bit weights and activations, INT8 arithmetic"
)
W8A16 = Scheme("w8a16", INT8_WEIGHT, meaning="8-bit weights, FP16 arithmetic")
