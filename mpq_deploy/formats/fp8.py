"""FP8 (E4M3): weights with one scale per output channel, activations with one per tensor.

``f8a8`` multiplies E4M3 by E4M3. ``f8a16`` only stores the weight in E4M3. ``w4f8`` stores INT4 in
blocks, which are requantized to E4M3 at run time. Needs an Ada GPU (SM89) or later.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np

from mpq_deploy.formats.int4 import BLOCK_SIZES, RequantizedInt4, write_requantized
from mpq_deploy.formats.int8 import INT8_INPUT, write_by_channel, write_pair
from mpq_deploy.formats.interfaces import INT4, ActivationFormat, ActivationGrid, Scheme
from mpq_deploy.formats.levels import LevelWeight
from mpq_deploy.formats.minifloat import E4M3
from mpq_deploy.formats.sizes import FP16_BYTES
from mpq_deploy.rounding.arrays import cast, names_of
from mpq_deploy.rounding.float_levels import Level, LevelMatrix
from mpq_deploy.rounding.quantizers import (
    CLIP_RATIOS,
    LARGEST_SCALE,
    SMALLEST_SCALE,
    round_scale,
    row_pieces,
)

if TYPE_CHECKING:
    import onnx_ir as ir

    from mpq_deploy.calibrate.stats import ActivationStats, CalibrationStats
    from mpq_deploy.engine.expected import ExpectedLayer
    from mpq_deploy.graph.attention import Operands
    from mpq_deploy.graph.dialects import Dialect
    from mpq_deploy.graph.layers import Layer
    from mpq_deploy.graph.writers.node_writer import LayerWriter, NodeWriter
    from mpq_deploy.latency.roofline import Rates
    from mpq_deploy.models.spec import Array

GENERATION = "FP8 products came with Ada (SM89: GeForce RTX 40); Thor and Blackwell have them too"
# TensorRT-RTX silently computes Convs with more kernel positions in FP16: 4x8 is FP8, while 3x11,
# 6x6 and 3x3x4 are not (docs/engine-forms.md).
LARGEST_AREA = 32
# Scales tried, relative to absmax / 448: one octave, after which the relative precision of a float
# repeats, and a little clipping (our choice).
WEIGHT_RATIOS = np.exp2(np.arange(-2, 9) / 8)
# Significant bits of w4f8's block scales: their products with INT4 codes fit FP16's 11 bits, so
# that only the conversion to E4M3 rounds (our choice).
SCALE_BITS = 8
SMALLEST_CHANNEL_SCALE = 2.0**-14


@dataclass(frozen=True)
class E4M3Matrix(LevelMatrix):
    """E4M3 codes uint8 [O, K] and ``scale`` float16 [O]."""

    scale: Array

    def levels_at(self, columns: Array) -> tuple[Level, tuple[Array, ...]]:
        return E4M3.multiples, (cast(self.scale, np.float32)[None],)

    def decode(self, codes: Array, columns: Array) -> Array:
        return E4M3.decode(codes) * cast(self.scale, np.float32)

    @property
    def mean_step(self) -> float:
        """An estimate: neighbouring levels are 1/16 to 1/8 of their magnitude apart."""
        return float(np.abs(self.dequantize()).mean() / 12) or float(self.scale.mean())


@dataclass(frozen=True)
class RequantizedMatrix(LevelMatrix):
    """INT4 codes int8 [O, K] in blocks, whose values are requantized to E4M3 per channel.

    ``scale`` float16 [O, B] has ``SCALE_BITS`` significant bits, and ``channel_scale`` float16 [O]
    is a power of two, so that FP16 and FP32 arithmetic give the same E4M3 codes.
    """

    scale: Array
    channel_scale: Array

    def levels_at(self, columns: Array) -> tuple[Level, tuple[Array, ...]]:
        blocks = self._blocks(columns)
        return self._nearer, (self._steps[blocks], self._first(blocks))

    def _nearer(self, wanted: Array, step: Array, first: Array) -> tuple[Array, Array]:
        """Return the nearer of the two neighbouring codes by E4M3 value, and that value.

        ``first``: the index of code 0 in ``_levels``.
        """
        xp = names_of(wanted)
        below = cast(xp.floor(wanted / step), np.int32)
        xp.clip(below, INT4.quant_min, INT4.quant_max - 1, out=below)
        places = first + below
        low, high = xp.take(self._levels, places), xp.take(self._levels, places + 1)
        nearer = xp.abs(wanted - high) < xp.abs(wanted - low)
        return cast(below + nearer, np.int8), xp.where(nearer, high, low)

    def decode(self, codes: Array, columns: Array) -> Array:
        places = self._first(self._blocks(columns)) + codes
        return names_of(codes).take(self._levels, places)

    @property
    def mean_step(self) -> float:
        return float(self.scale.astype(np.float32).mean())

    def _blocks(self, columns: Array) -> Array:
        return columns // (self.codes.shape[1] // self.scale.shape[1])

    def _first(self, blocks: Array) -> Array:
        """Return the index of code 0 in ``_levels``, int [n, O], for columns in ``blocks`` [n]."""
        rows = names_of(blocks).arange(len(self.scale))
        return (blocks[:, None] * len(self.scale) + rows) * 2**INT4.bits - INT4.quant_min

    @cached_property
    def _steps(self) -> Array:
        """The block scales, float32 [B, O]."""
        return names_of(self.scale).ascontiguousarray(self.scale.T, np.float32)

    @cached_property
    def _levels(self) -> Array:
        """The requantized value of each code in each block, float32 [B * O * 16]."""
        xp = names_of(self.scale)
        codes = xp.asarray(np.arange(INT4.quant_min, INT4.quant_max + 1, dtype=np.float32))
        channel = cast(self.channel_scale, np.float32)[:, None]
        values = self._steps[:, :, None] * codes / channel
        return (E4M3.nearest(values, xp) * channel).ravel()


@dataclass(frozen=True)
class Fp8Weight(LevelWeight):
    """E4M3 codes -> DequantizeLinear with one scale per output channel."""

    bits = 8
    engine_types = ("FP8",)
    generation = GENERATION
    matrix = E4M3Matrix

    @property
    def form(self) -> str:
        return "e4m3"

    def refusal(self, layer: Layer) -> str:
        return _kernel_refusal(layer)

    def bytes_of(self, layer: Layer) -> int:
        return layer.weights + FP16_BYTES * layer.out_channels

    def unpacked_bytes(self, layer: Layer, alone: bool) -> int:
        """A weight-only Conv dequantizes its weight at every call; a product fuses that."""
        whole = alone and layer.op == "Conv" and not self.multiplies(layer, alone)
        return FP16_BYTES * layer.weights if whole else 0

    def scaled(self, layer: Layer, weight: Array, importance: Array) -> E4M3Matrix:
        xp, share = names_of(weight), cast(importance, np.float32)
        scales = [_channel_scale(weight[part], share) for part in row_pieces(weight)]
        return E4M3Matrix(xp.zeros(weight.shape, np.uint8), xp.concatenate(scales))

    def write(self, to: LayerWriter, matrix: E4M3Matrix) -> ir.Value:
        product = self.multiplies(to.layer, to.scheme.activation is None)
        values = partial(E4M3.decode, matrix.codes)
        return write_by_channel(to, values, matrix.scale, E4M3.onnx[0], product)


@dataclass(frozen=True)
class RequantizedToFp8(LevelWeight):
    """INT4 in blocks, then quantized to E4M3 per output channel: 4-bit storage, FP8 compute.

    The weight is stored as in ``RequantizedInt4``, which computes in INT8.
    """

    bits = 4
    engine_types = ("Int4",)
    generation = GENERATION
    matrix = RequantizedMatrix

    @property
    def stored(self) -> RequantizedInt4:
        """The format of the same storage that computes in INT8."""
        return RequantizedInt4(self.block_size)

    @property
    def form(self) -> str:
        return f"int4xe4m3-b{self.block_size}"

    def block(self, layer: Layer) -> int | None:
        return self.stored.block(layer)

    def refusal(self, layer: Layer) -> str:
        return self.stored.refusal(layer) or _kernel_refusal(layer)

    def multiplies(self, layer: Layer, alone: bool) -> bool:
        return False

    def stored_shape(self, layer: Layer) -> tuple[int, int]:
        return self.stored.stored_shape(layer)

    def dialect_refusal(self, layer: Layer, dialect: Dialect) -> str:
        return self.stored.dialect_refusal(layer, dialect)

    def bytes_of(self, layer: Layer) -> int:
        return self.stored.bytes_of(layer)

    def unpacked_bytes(self, layer: Layer, alone: bool) -> int:
        """The weight is requantized to E4M3 at every call, for every operator."""
        return self.stored.unpacked_bytes(layer, alone)

    def scaled(self, layer: Layer, weight: Array, importance: Array) -> RequantizedMatrix:
        block = self.block(layer)
        assert block is not None, "choices_for admits only schemes with a block size"
        xp, share = names_of(weight), cast(importance.reshape(-1, block), np.float32)
        found = [_block_scales(weight[part], share) for part in row_pieces(weight)]
        scale, channel = (xp.concatenate(arrays) for arrays in zip(*found))
        return RequantizedMatrix(xp.zeros(weight.shape, np.int8), scale, channel)

    def write(self, to: LayerWriter, matrix: RequantizedMatrix) -> ir.Value:
        weight = self.stored.write_blocks(to, matrix.codes, matrix.scale)
        return write_requantized(to, weight, matrix.channel_scale, E4M3.onnx)


@dataclass(frozen=True)
class FloatGrid(ActivationGrid):
    """The levels of E4M3 times ``scale``."""

    quant_min: int = -int(E4M3.largest)
    quant_max: int = int(E4M3.largest)

    uniform = False

    def levels(self, x: Any, xp: Any) -> Any:
        return E4M3.nearest(x, xp)


@dataclass(frozen=True)
class Fp8Activation(ActivationFormat):
    """One QuantizeLinear/DequantizeLinear pair per tensor, rank-0 scale, for all its readers."""

    bits = 8
    operand = "FP8"
    value_bytes = 1
    rate = "fp8_ops_per_s"

    @property
    def form(self) -> str:
        return "+e4m3"

    def grid(self, stats: ActivationStats, scale: float) -> FloatGrid:
        return FloatGrid(stats.float_scale(E4M3))

    def engine_bytes(self, layer: ExpectedLayer) -> int:
        """The same bytes as for INT8 (seen in every build)."""
        return INT8_INPUT.engine_bytes(layer)

    def operations_per_s(self, rates: Rates) -> float:
        assert rates.fp8 is not None, "a target that lists FP8 gives its rate"
        return rates.fp8

    def write(
        self, to: NodeWriter, value: ir.Value, grid: ActivationGrid, key: tuple[str, str]
    ) -> list[ir.Node]:
        return write_pair(to, value, grid.scale, key, E4M3.onnx)


def operand_grids(attention: Operands, stats: CalibrationStats) -> dict[str, FloatGrid]:
    """Return the quantizer of each of the four operands of FP8 attention, by tensor.

    Probabilities are at most 1: their scale maps 1 to E4M3's largest value.
    """
    seen = {t: stats.activations[t].float_scale(E4M3) for t in attention.tensors}
    largest = {attention.probabilities: float(np.float16(1 / E4M3.largest))}
    return {tensor: FloatGrid(scale) for tensor, scale in (seen | largest).items()}


def _kernel_refusal(layer: Layer) -> str:
    if layer.taps <= LARGEST_AREA:
        return ""
    size = "x".join(map(str, layer.kernel))
    return f"TensorRT computes FP8 kernels of more than {LARGEST_AREA} positions in FP16; its kernel has {size}"


def _channel_scale(weight: Array, share: Array) -> Array:
    """Return the scales float16 [O] of minimum squared error weighted by ``share`` float32 [K]."""
    xp = names_of(weight)
    amax = xp.amax(xp.abs(weight), axis=1, keepdims=True)
    lowest = xp.full_like(amax[:, 0], np.inf)
    best = round_scale(xp.where(amax > 0, amax / E4M3.largest, 1.0))
    exact = cast(amax, np.float64)
    for ratio in WEIGHT_RATIOS.tolist():
        scale = round_scale(ratio * exact / E4M3.largest)
        step = cast(scale, np.float32)
        error = xp.square(weight - E4M3.nearest(weight / step, xp) * step) @ share
        better = (error < lowest) & (amax[:, 0] > 0)
        best = xp.where(better[:, None], scale, best)
        lowest = xp.where(better, error, lowest)
    return best[:, 0]


def _block_scales(weight: Array, share: Array) -> tuple[Array, Array]:
    """Return block scales float16 [O, B] and channel scales float16 [O] of minimum squared error.

    ``share`` float32 [B, block size]: the weights of the columns.
    """
    xp, blocked = names_of(weight), weight.reshape(len(weight), *share.shape)
    amax = xp.amax(xp.abs(blocked), axis=2)
    exact = cast(amax, np.float64)
    # The largest magnitude of a channel: INT4's lowest code at the largest block scale tried.
    reach = float(CLIP_RATIOS[-1]) * -INT4.quant_min / INT4.quant_max * xp.amax(exact, axis=1)
    power = xp.ceil(xp.log2(xp.maximum(reach, SMALLEST_SCALE) / E4M3.largest))
    channel = cast(xp.maximum(xp.exp2(power), SMALLEST_CHANNEL_SCALE), np.float16)
    lowest = xp.full_like(amax, np.inf)
    best = _few_bits(xp.where(amax > 0, amax / INT4.quant_max, 1.0))
    codes = xp.zeros(weight.shape, np.int8)
    for ratio in CLIP_RATIOS.tolist():
        scale = _few_bits(ratio * exact / INT4.quant_max)
        matrix = RequantizedMatrix(codes, scale, channel).rounded(weight)
        error = (weight - matrix.dequantize()).reshape(blocked.shape)
        error = xp.einsum("obw,bw->ob", xp.square(error), share)
        better = (error < lowest) & (amax > 0)
        best, lowest = xp.where(better, scale, best), xp.where(better, error, lowest)
    return best, channel


def _few_bits(scale: Array) -> Array:
    """Round positive scales to ``SCALE_BITS`` significant bits within FP16's range."""
    xp = names_of(scale)
    mantissa, exponent = xp.frexp(xp.clip(scale, SMALLEST_SCALE, LARGEST_SCALE / 2))
    rounded = xp.ldexp(xp.rint(xp.ldexp(mantissa, SCALE_BITS)), exponent - SCALE_BITS)
    return cast(rounded, np.float16)


FP8_WEIGHT, FP8_INPUT = Fp8Weight(), Fp8Activation()
# The scheme name in plans of an attention that computes in FP8 (others are FP16).
FP8_SCHEME = "f8a8"
FP8_BODIES = (
    Scheme(FP8_SCHEME, FP8_WEIGHT, FP8_INPUT, meaning="FP8 weights and activations (E4M3)"),
    Scheme("f8a16", FP8_WEIGHT, meaning="FP8 weights (E4M3), FP16 arithmetic"),
    *(
        Scheme(
            f"w4f8-b{block}",
            RequantizedToFp8(block),
            FP8_INPUT,
            meaning="4-bit weights, FP8 arithmetic",
        )
        for block in BLOCK_SIZES
    ),
)
