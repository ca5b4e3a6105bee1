"""NVFP4 weights and activations: E2M1 in blocks of 16, E4M3 block scales, one scale per tensor.

Products multiply FP4 by FP4. ``trt::TRT_FP4DynamicQuantize`` computes the block scales of
activations at run time. Needs a Blackwell GPU (SM100, SM110, SM120). Source: NVIDIA, "Working with
Quantized Types" of TensorRT 10 and 11. ONNX Runtime has neither the operator nor FP4: its graph
reads the same codes as UINT4 through a table, and rounds activations by plain operators.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import ceil, log2
from typing import TYPE_CHECKING, Any

import numpy as np

from mpq_deploy.formats.interfaces import ActivationFormat, ActivationGrid, Scheme
from mpq_deploy.formats.levels import LevelWeight
from mpq_deploy.formats.minifloat import E2M1, E4M3
from mpq_deploy.formats.sizes import FP16_BYTES
from mpq_deploy.rounding.arrays import cast, names_of
from mpq_deploy.rounding.float_levels import Level, LevelMatrix
from mpq_deploy.rounding.quantizers import row_pieces

if TYPE_CHECKING:
    import onnx_ir as ir

    from mpq_deploy.calibrate.stats import ActivationStats
    from mpq_deploy.engine.expected import ExpectedLayer
    from mpq_deploy.graph.layers import Layer
    from mpq_deploy.graph.writers.node_writer import LayerWriter, NodeWriter
    from mpq_deploy.latency.roofline import Rates
    from mpq_deploy.models.spec import Array

BLOCK = 16
# The largest code times the largest block scale: the largest value in units of the tensor's scale.
REACH = E2M1.largest * E4M3.largest
GENERATION = "FP4 products came with Blackwell (SM100; SM120: GeForce RTX 50; SM110: Thor)"
# The smallest tensor scale: the smallest normal FP16 number.
SMALLEST_SCALAR = 2.0**-14
# Block scales tried, as offsets in E4M3 codes from that of absmax / 6; eight codes are an octave
# (our choice: from clipping a third of absmax to absmax at the level 4).
NEIGHBOURS = range(-6, 7)
# TensorRT stores block scales in tiles of 128 output channels and 4 blocks (seen in every build).
TILE = (128, 4)


@dataclass(frozen=True)
class Nvfp4Matrix(LevelMatrix):
    """E2M1 codes uint8 [O, K]; ``scale`` uint8 [O, K / 16], E4M3 codes; ``tensor_scale`` float16.

    ``tensor_scale`` is a power of two, so that FP16 holds every block's scale and every weight.
    """

    scale: Array
    tensor_scale: Array

    def levels_at(self, columns: Array) -> tuple[Level, tuple[Array, ...]]:
        return E2M1.multiples, (self._steps[columns // BLOCK],)

    def decode(self, codes: Array, columns: Array) -> Array:
        return E2M1.decode(codes) * self._steps[columns // BLOCK]

    @property
    def mean_step(self) -> float:
        """The mean scale: levels are half a scale to two scales apart."""
        return float(self._steps.mean())

    @cached_property
    def _steps(self) -> Array:
        """The block scales times the tensor scale, float32 [K / 16, O]."""
        steps = E4M3.decode(self.scale) * float(self.tensor_scale)
        return names_of(steps).ascontiguousarray(steps.T)


@dataclass(frozen=True)
class Nvfp4Weight(LevelWeight):
    """Two DequantizeLinear: the first for the block scales, the second for the codes in blocks."""

    bits = 4
    opset = 23
    engine_types = ("FP4E2M1",)
    generation = GENERATION
    matrix = Nvfp4Matrix

    @property
    def form(self) -> str:
        return "nvfp4"

    def block(self, layer: Layer) -> int | None:
        return BLOCK

    def refusal(self, layer: Layer) -> str:
        if layer.op == "Conv":
            return "NVFP4 multiplies matrices alone"
        rest = layer.reduction % BLOCK
        return f"blocks of {BLOCK} do not divide its reduction {layer.reduction}" if rest else ""

    def bytes_of(self, layer: Layer) -> int:
        return layer.weights // 2 + layer.weights // BLOCK + FP16_BYTES

    def scaled(self, layer: Layer, weight: Array, importance: Array) -> Nvfp4Matrix:
        xp = names_of(weight)
        amax = float(xp.abs(weight).max())
        scalar = (
            2.0 ** ceil(log2(amax / REACH)) if amax > SMALLEST_SCALAR * REACH else SMALLEST_SCALAR
        )
        share = cast(importance.reshape(-1, BLOCK), np.float32)
        scales = [_block_scales(weight[part], share, scalar) for part in row_pieces(weight)]
        codes = xp.zeros(weight.shape, np.uint8)
        return Nvfp4Matrix(codes, xp.concatenate(scales), np.asarray(scalar, np.float16))

    def write(self, to: LayerWriter, matrix: Nvfp4Matrix) -> ir.Value:
        turned = to.layer.out_axis == 1
        shape = to.layer.weight_shape
        scales = E4M3.decode(matrix.scale.T if turned else matrix.scale)
        inputs = [
            to.codes(lambda: scales, E4M3.onnx[0], scales.shape, "block_scale"),
            to.constant("tensor_scale", matrix.tensor_scale.astype(np.float32)),
        ]
        step = to.insert("DequantizeLinear", inputs, {}, "weight_scales")

        def stored() -> Array:
            codes = to.folded(matrix.codes)
            return codes if to.simulating else E2M1.decode(codes)

        if to.simulating:
            return _unpacked(to, to.codes(stored, "UINT4", shape), step)
        codes = to.codes(stored, E2M1.onnx[0], shape)
        attributes = {"axis": 0 if turned else 1, "block_size": BLOCK}
        return to.insert("DequantizeLinear", [codes, step], attributes, "weight_dequantize")


def _unpacked(to: LayerWriter, codes: ir.Value, step: ir.Value) -> ir.Value:
    """Write the dequantization for ONNX Runtime: look up UINT4 ``codes``, multiply by ``step``."""
    rows, columns = to.layer.weight_shape
    turned = to.layer.out_axis == 1
    blocks = (rows // BLOCK, BLOCK, columns) if turned else (rows, columns // BLOCK, BLOCK)
    single = (rows // BLOCK, 1, columns) if turned else (rows, columns // BLOCK, 1)
    table = to.constant("levels", E2M1.values)
    shapes = {
        name: to.constant(f"{name}_shape", np.array(shape, np.int64))
        for name, shape in (("blocks", blocks), ("single", single), ("whole", (rows, columns)))
    }
    index = to.insert("Cast", [codes], {"to": 6}, "weight_index", dtype="INT32")
    value = to.insert("Gather", [table, index], {"axis": 0}, "weight_levels")
    value = to.insert("Reshape", [value, shapes["blocks"]], {}, "weight_blocks")
    step = to.insert("Reshape", [step, shapes["single"]], {}, "weight_steps")
    value = to.insert("Mul", [value, step], {}, "weight_product")
    return to.insert("Reshape", [value, shapes["whole"]], {}, "weight_dequantize")


def _block_scales(weight: Array, share: Array, scalar: float) -> Array:
    """Return block scales of minimum squared error as E4M3 codes uint8 [O, B].

    ``share`` float32 [B, 16]: the weights of the columns; ``scalar``: the tensor scale.
    """
    xp, blocked = names_of(weight), weight.reshape(len(weight), *share.shape)
    amax = xp.amax(xp.abs(blocked), axis=2)
    first = cast(E4M3.encode(amax / (E2M1.largest * scalar)), np.int32)
    lowest = xp.full_like(amax, np.inf)
    best = cast(xp.maximum(first, 1), np.uint8)
    largest = int(E4M3.encode(np.float32(E4M3.largest)))
    for neighbour in NEIGHBOURS:
        codes = cast(xp.clip(first + neighbour, 1, largest), np.uint8)
        step = (E4M3.decode(codes) * scalar)[:, :, None]
        error = xp.square(blocked - E2M1.nearest(blocked / step, xp) * step)
        error = xp.einsum("obw,bw->ob", error, share)
        better = error < lowest
        best, lowest = xp.where(better, codes, best), xp.where(better, error, lowest)
    return best


@dataclass(frozen=True)
class DynamicBlocks(ActivationGrid):
    """E2M1 in blocks of 16 of the last axis; dynamic block scales, E4M3 times ``scale``."""

    uniform = False
    dynamic = True

    def rounded(self, x: Any, xp: Any) -> Any:
        """Return ``x`` fake-quantized; ``xp``: NumPy or torch."""
        blocks = x.reshape(*x.shape[:-1], -1, BLOCK)
        amax = xp.amax(xp.abs(blocks), axis=-1, keepdims=True)
        step = E4M3.nearest(amax / E2M1.largest / self.scale, xp) * self.scale
        # Blocks whose scale rounds to 0 become zeros.
        safe = xp.where(step > 0, step, xp.ones_like(step))
        return (E2M1.nearest(blocks / safe, xp) * step).reshape(x.shape)


@dataclass(frozen=True)
class Nvfp4Activation(ActivationFormat):
    """``trt::TRT_FP4DynamicQuantize`` and two DequantizeLinear, for the ranks TensorRT takes."""

    bits = 4
    operand = "FP4E2M1"
    # A code, and its share of the block scale.
    value_bytes = 0.5 + 1 / BLOCK
    rate = "fp4_ops_per_s"
    ranks = (2, 3)
    twin_only = "NVFP4 is simulated in ONNX Runtime: the same codes, and activations rounded by plain operators"

    @property
    def form(self) -> str:
        return "+nvfp4"

    def grid(self, stats: ActivationStats, scale: float) -> DynamicBlocks:
        reach = max(float(stats.amax.max()) / REACH, SMALLEST_SCALAR)
        return DynamicBlocks(float(np.float16(reach)))

    def engine_bytes(self, layer: ExpectedLayer) -> int:
        """Padding of the block scales to whole tiles, and two FP32 scalars of 128 bytes each."""
        sizes = layer.out_channels, layer.reduction // BLOCK
        tiles = [-(-size // tile) * tile for size, tile in zip(sizes, TILE)]
        return tiles[0] * tiles[1] - sizes[0] * sizes[1] + 2 * 128

    def operations_per_s(self, rates: Rates) -> float:
        assert rates.fp4 is not None, "a target that lists NVFP4 gives its rate"
        return rates.fp4

    def write(
        self, to: NodeWriter, value: ir.Value, grid: ActivationGrid, key: tuple[str, str]
    ) -> list[ir.Node]:
        tensor, form = key
        scale = to.named_constant(f"{tensor}//scale{form}", np.asarray(grid.scale, np.float32))
        if to.simulating:
            return _rounding_nodes(to, value, scale, f"{tensor}//{form}")
        attributes = {"axis": -1, "block_size": BLOCK, "scale_type": E4M3.onnx[1]}
        types = (E2M1.onnx[0], E4M3.onnx[0])
        name = f"{tensor}/quantize{form}"
        operator = ("trt", "TRT_FP4DynamicQuantize")
        quantize = to.make_foreign(operator, [value, scale], attributes, name, types)
        codes, blocks = quantize.outputs
        codes.shape = value.shape
        step = to.make("DequantizeLinear", [blocks, scale], {}, f"{tensor}/scales{form}")
        attributes = {"axis": -1, "block_size": BLOCK}
        inputs, name = [codes, step.outputs[0]], f"{tensor}/dequantize{form}"
        return [quantize, step, to.make("DequantizeLinear", inputs, attributes, name, value)]


def _rounding_nodes(to: NodeWriter, value: ir.Value, scale: ir.Value, base: str) -> list[ir.Node]:
    """Return plain operators that compute ``DynamicBlocks.rounded`` for a ``value`` of any rank."""
    nodes: list[ir.Node] = []

    def add(op: str, *inputs: ir.Value, dtype: str = "FLOAT", **attributes: Any) -> ir.Value:
        nodes.append(to.make(op, inputs, attributes, f"{base}/{len(nodes)}_{op}", dtype=dtype))
        return nodes[-1].outputs[0]

    def number(name: str, content: Any, dtype: type = np.float32) -> ir.Value:
        return to.named_constant(f"{base}/{name}", np.asarray(content, dtype))

    shape = add("Shape", value, dtype="INT64")
    ends = [number(name, [at], np.int64) for name, at in (("start", 0), ("stop", -1), ("axis", 0))]
    split = number("split", [-1, BLOCK], np.int64)
    leading = add("Slice", shape, *ends, dtype="INT64")
    blocks = add("Reshape", value, add("Concat", leading, split, dtype="INT64", axis=0))
    last = number("last", [-1], np.int64)
    amax = add("ReduceMax", add("Abs", blocks), last, keepdims=1)
    fraction = add("Div", amax, number("largest", E2M1.largest))
    codes = add("QuantizeLinear", fraction, scale, dtype=E4M3.onnx[0], output_dtype=E4M3.onnx[1])
    step = add("DequantizeLinear", codes, scale)
    none = add("Equal", step, number("zero", 0.0), dtype="BOOL")
    scaled = add("Div", blocks, add("Where", none, number("one", 1.0), step))
    limits = number("low", -E2M1.largest), number("high", E2M1.largest)
    size = add("Abs", add("Clip", scaled, *limits))
    # The distance between levels: 0.5 below 2, 1 below 4, then 2.
    fine = add("Less", size, number("two", 2.0), dtype="BOOL")
    middle = add("Less", size, number("four", 4.0), dtype="BOOL")
    wide = add("Where", middle, number("one", 1.0), number("two", 2.0))
    spacing = add("Where", fine, number("half", 0.5), wide)
    clipped = add("Clip", scaled, *limits)
    rounded = add("Mul", add("Round", add("Div", clipped, spacing)), spacing)
    add("Reshape", add("Mul", rounded, step), shape)
    nodes[-1].outputs[0].shape = value.shape
    return nodes


NVFP4 = Scheme(
    "nvfp4", Nvfp4Weight(), Nvfp4Activation(), meaning="FP4 weights and activations (NVFP4)"
)
