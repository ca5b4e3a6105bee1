"""INT4 in blocks along the reduction: weight-only, or requantized to INT8 at run time."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from mpq_deploy.formats.int8 import INT8_INPUT, INT8_WEIGHT, ONNX_INT8
from mpq_deploy.formats.integers import IntegerWeight
from mpq_deploy.formats.interfaces import INT4, Scheme
from mpq_deploy.formats.sizes import FP16_BYTES, INT64_BYTES, matrix_shape, nearest_divisor
from mpq_deploy.rounding.quantizers import (
    QuantizedMatrix,
    choose_multiple_scale,
    position_first,
)

if TYPE_CHECKING:
    import onnx_ir as ir

    from mpq_deploy.engine.expected import ExpectedLayer
    from mpq_deploy.graph.dialects import Dialect
    from mpq_deploy.graph.layers import Layer
    from mpq_deploy.graph.writers.node_writer import LayerWriter
    from mpq_deploy.models.spec import Array

BLOCK_SIZES = (32, 64, 128, 256)


@dataclass(frozen=True)
class Int4Weight(IntegerWeight):
    """Codes -> DequantizeLinear in blocks.

    A Conv's weight is stored as the matrix [O, I*kh*kw] and reshaped; where the Conv is written as
    a matrix product over windows, as [kh*kw*I, O].
    """

    bits = 4
    precision = INT4
    refined = True
    engine_types = ("Int4",)

    def block(self, layer: Layer) -> int | None:
        nominal = self.block_size or layer.reduction
        if self.multiplies(layer, alone=True):
            # With a single block, TensorRT unpacks the weight of a product at every call.
            nominal = min(nominal, max(1, layer.reduction // 2))
        return nearest_divisor(layer.reduction, nominal)

    def taps(self, layer: Layer) -> int:
        return layer.taps if self.multiplies(layer, alone=True) else 1

    def refusal(self, layer: Layer) -> str:
        if self.block(layer) is None:
            return f"no divisor of its reduction {layer.reduction} is near {self.block_size}"
        # Tiny blocks save no bytes; TensorRT-RTX also refuses blocks of one weight.
        others = {"INT8": INT8_WEIGHT.bytes_of(layer), "FP16": FP16_BYTES * layer.weights}
        smallest = min(others, key=lambda name: others[name])
        size = self.bytes_of(layer)
        if size < others[smallest]:
            return ""
        return f"its {size:,} bytes are not fewer than the {others[smallest]:,} of {smallest}"

    def stored_shape(self, layer: Layer) -> tuple[int, int]:
        shape = matrix_shape(layer)
        return shape[::-1] if self.multiplies(layer, alone=True) else shape

    def dialect_refusal(self, layer: Layer, dialect: Dialect) -> str:
        shape = self.stored_shape(layer)
        if prod(shape) % 2:
            return "size is odd"
        return "last dimension is odd" if shape[-1] % 2 and not dialect.odd_rows else ""

    def bytes_of(self, layer: Layer) -> int:
        block = self.block(layer)
        if block is None:
            raise ValueError(f"blocks of {self.block_size} do not fit {layer.name}")
        scales = layer.out_channels * (layer.reduction // block)
        # The constant shape of the Reshape of a Conv's matrix [O, K].
        reshaped = layer.op == "Conv" and not self.multiplies(layer, alone=True)
        shape = INT64_BYTES * len(layer.weight_shape) if reshaped else 0
        return (layer.weights + 1) // 2 + FP16_BYTES * scales + shape

    def unpacked_bytes(self, layer: Layer, alone: bool) -> int:
        """A Conv dequantizes its weight at every call; a product fuses that."""
        whole = alone and layer.op == "Conv" and not self.multiplies(layer, alone)
        return FP16_BYTES * layer.weights if whole else 0

    def fuses(self, layer: ExpectedLayer) -> bool:
        even = layer.reduction % 2 == 0 and layer.out_channels % 2 == 0
        return layer.op != "Conv" and even and layer.blocks >= 2

    def write(self, to: LayerWriter, matrix: QuantizedMatrix) -> ir.Value:
        return self.write_blocks(to, matrix.codes, matrix.scale, matrix.taps)

    def write_blocks(self, to: LayerWriter, codes: Array, scales: Array, taps: int = 1) -> ir.Value:
        """Write ``codes`` [O, K] and ``scales`` [O, B]; ``taps``: see ``QuantizedMatrix``."""
        layer = to.layer
        product = self.multiplies(layer, alone=True)
        first = layer.out_axis == 0 and not product

        def stored() -> Array:
            ordered = position_first(codes, taps)
            return ordered if first else ordered.T

        scale = scales.astype(np.float32)
        inputs = [
            to.codes(stored, "INT4", self.stored_shape(layer)),
            to.constant("scale", scale if first else scale.T),
        ]
        block = layer.reduction // scales.shape[1]
        attributes = {"axis": int(first), "block_size": block}
        weight = to.insert("DequantizeLinear", inputs, attributes, "weight_dequantize")
        if layer.op != "Conv" or product:
            return weight
        shape = to.named_constant(f"{layer.weight}//shape", np.array(layer.weight_shape, np.int64))
        return to.insert("Reshape", [weight, shape], {}, "weight_reshape")


@dataclass(frozen=True)
class RequantizedInt4(Int4Weight):
    """As ``Int4Weight``, then quantized to INT8 per output channel: 4-bit storage, INT8 compute.

    Every block scale is an integer multiple of its channel's INT8 scale, so the second quantization
    is exact.
    """

    refined = False

    @property
    def form(self) -> str:
        return f"int4x8-b{self.block_size}"

    def multiplies(self, layer: Layer, alone: bool) -> bool:
        return False

    def bytes_of(self, layer: Layer) -> int:
        return super().bytes_of(layer) + FP16_BYTES * layer.out_channels

    def unpacked_bytes(self, layer: Layer, alone: bool) -> int:
        """The weight is requantized to INT8 at every call, for every operator."""
        return layer.weights

    def fuses(self, layer: ExpectedLayer) -> bool:
        return False

    def scales(self, weight: Array, importance: Array, best: Array) -> tuple[Array, Array | None]:
        return choose_multiple_scale(weight, importance, best)

    def write(self, to: LayerWriter, matrix: QuantizedMatrix) -> ir.Value:
        assert matrix.channel_scale is not None
        weight = super().write(to, matrix)
        return write_requantized(to, weight, matrix.channel_scale, ("INT8", ONNX_INT8))


def write_requantized(
    to: LayerWriter, weight: ir.Value, scale: Array, dtype: tuple[str, int]
) -> ir.Value:
    """Write a second Q/DQ pair behind a dequantized ``weight``: ``scale`` [O], codes ``dtype``.

    ``dtype``: name and number of the ONNX type.
    """
    channel = to.constant("channel_scale", scale.astype(np.float32))
    axis, name = {"axis": to.layer.out_axis}, "weight_requantize"
    attributes = {**axis, "output_dtype": dtype[1]}
    weight = to.insert("QuantizeLinear", [weight, channel], attributes, name, dtype=dtype[0])
    return to.insert("DequantizeLinear", [weight, channel], axis, name, ending="_back")


INT4_BODIES = (
    *(
        Scheme(f"w4a16-b{block}", Int4Weight(block), meaning="4-bit weights, FP16 arithmetic")
        for block in BLOCK_SIZES
    ),
    *(
        Scheme(
            f"w4a8-b{block}",
            RequantizedInt4(block),
            INT8_INPUT,
            meaning="4-bit weights, INT8 arithmetic",
        )
        for block in BLOCK_SIZES
    ),
)
