"""INT8: weights with one scale per output channel, activations with one per tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mpq_deploy.formats.integers import IntegerWeight
from mpq_deploy.formats.interfaces import INT8, ActivationFormat, ActivationGrid, Scheme
from mpq_deploy.formats.sizes import FP16_BYTES
from mpq_deploy.rounding.quantizers import QuantizedMatrix, position_first

if TYPE_CHECKING:
    from collections.abc import Callable

    import onnx_ir as ir

    from mpq_deploy.calibrate.stats import ActivationStats
    from mpq_deploy.engine.expected import ExpectedLayer
    from mpq_deploy.graph.layers import Layer
    from mpq_deploy.graph.writers.node_writer import LayerWriter, NodeWriter
    from mpq_deploy.latency.roofline import Rates
    from mpq_deploy.models.spec import Array

# Per output channel, where the file has one FP16 scale, TensorRT keeps three FP32 factors for a
# convolution (three constants [1, O, 1, 1] of type Float in its log) and two FP16 factors for a
# product. A product has two more FP32 scalars, each in 128 bytes of its own (seen in every build).
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
        """A weight-only Conv dequantizes its weight at every call; a product fuses that."""
        whole = alone and layer.op == "Conv" and not self.multiplies(layer, alone)
        return FP16_BYTES * layer.weights if whole else 0

    def joins(self, alone: bool) -> bool:
        return not alone

    def write(self, to: LayerWriter, matrix: QuantizedMatrix) -> ir.Value:
        product = self.multiplies(to.layer, to.scheme.activation is None)
        return write_by_channel(to, lambda: matrix.codes, matrix.scale[:, 0], "INT8", product)


def write_by_channel(
    to: LayerWriter, codes: Callable[[], Array], scale: Array, dtype: str, product: bool
) -> ir.Value:
    """Write ``codes()`` [O, K] of ``dtype`` and ``scale`` [O]; return the dequantized weight.

    ``product``: the layer is a Conv that is written as a matrix product over windows.
    """
    layer = to.layer
    if product:
        axis, shape = 1, (layer.reduction, layer.out_channels)
        stored = to.codes(lambda: position_first(codes(), layer.taps).T, dtype, shape)
    else:
        axis = layer.out_axis
        stored = to.codes(lambda: to.folded(codes()), dtype, layer.weight_shape)
    inputs = [stored, to.constant("scale", scale.astype(np.float32))]
    return to.insert("DequantizeLinear", inputs, {"axis": axis}, "weight_dequantize")


@dataclass(frozen=True)
class Int8Activation(ActivationFormat):
    """One QuantizeLinear/DequantizeLinear pair per tensor, rank-0 scale, for all its readers."""

    bits = 8
    takes_ranges = True
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
        return write_pair(to, value, grid.scale, key, ("INT8", ONNX_INT8))


def write_pair(
    to: NodeWriter, value: ir.Value, scale: float, key: tuple[str, str], dtype: tuple[str, int]
) -> list[ir.Node]:
    """Return a QuantizeLinear/DequantizeLinear pair; ``dtype``: name and number of the code type.

    ``key``: tensor name and activation form, for the nodes' names.
    """
    tensor, form = key
    # Rank 0: with shape [1] TensorRT silently runs the convolution in FP16.
    step = to.named_constant(f"{tensor}//scale{form}", np.asarray(scale, np.float32))
    name = f"{tensor}/quantize{form}"
    quantize = to.make(
        "QuantizeLinear", [value, step], {"output_dtype": dtype[1]}, name, value, dtype[0]
    )
    inputs, name = [quantize.outputs[0], step], f"{tensor}/dequantize{form}"
    return [quantize, to.make("DequantizeLinear", inputs, {}, name, value)]


INT8_WEIGHT, INT8_INPUT = Int8Weight(), Int8Activation()
W8A8 = Scheme(
    "w8a8", INT8_WEIGHT, INT8_INPUT, meaning="8-bit weights and activations, INT8 arithmetic"
)
W8A16 = Scheme("w8a16", INT8_WEIGHT, meaning="8-bit weights, FP16 arithmetic")
