"""Which quantized forms TensorRT-RTX takes, and what it makes of them: one small graph per form, really built.

Run: ``python benchmarks/engine_forms.py [--only TEXT] [--sm SM86] [-o docs/engine-forms.md]``. Needs tensorrt_rtx, no
GPU. Prints one row per form: whether it builds, its weight bytes beside the bytes of its constants, and the
kernels that compute. Each build runs in its own process, since some forms crash the builder.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from mpq_deploy.engine.build_log import EngineLog, compute_dtype, parse_engine_log
from mpq_deploy.engine.build_worker import BuildJob, InputShapes
from mpq_deploy.engine.builder import WORKER
from mpq_deploy.system.children import run_child

BATCH = 4
Form = Callable[["Draft"], str]


class Draft:
    """A graph being written: input x, FP16, and the forms' usual pieces. Weights are random from one seed."""

    def __init__(self, *shape: int, opset: int = 21) -> None:
        self.shape, self.opset = shape, opset
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.rng = np.random.default_rng(0)
        self.count = 0

    def name(self, what: str) -> str:
        """Return a fresh name."""
        self.count += 1
        return f"{what}_{self.count}"

    def const(self, array: np.ndarray, what: str = "const") -> str:
        """Add an initializer."""
        name = self.name(what)
        self.constants.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def op(self, op: str, *inputs: str, domain: str = "", **attributes: object) -> str:
        """Add a node with one output, and return that."""
        out = self.name(op.lower())
        self.nodes.append(
            helper.make_node(
                op, list(inputs), [out], name=f"node.{out}", domain=domain, **attributes
            )
        )
        return out

    def scale(self, value: float = 0.05, shape: tuple[int, ...] = ()) -> str:
        """Add an FP16 scale, rank 0 unless said."""
        return self.const(np.full(shape, value, np.float16), "scale")

    def act(self, x: str, zero_point: str = "none") -> str:
        """Activation Q and DQ; ``zero_point``: none (output_dtype attribute), const (int8 initializer), bare."""
        s = self.scale()
        if zero_point == "const":
            z = self.const(np.asarray(np.int8(0)))
            return self.op("DequantizeLinear", self.op("QuantizeLinear", x, s, z), s, z)
        extra = {} if zero_point == "bare" else {"output_dtype": TensorProto.INT8}
        return self.op("DequantizeLinear", self.op("QuantizeLinear", x, s, **extra), s)

    def int8(self, shape: tuple[int, ...], axis: int = 0) -> str:
        """Per-channel INT8 weight."""
        codes = self.rng.integers(-127, 128, shape).astype(np.int8)
        return self.op(
            "DequantizeLinear", self.const(codes, "w"), self.scale(0.01, (shape[axis],)), axis=axis
        )

    def int4(self, shape: tuple[int, int], block: int | None, axis: int) -> str:
        """INT4 weight in blocks along ``axis`` (None: per channel of the other axis)."""
        codes = self.const(self.rng.integers(-7, 8, shape).astype(ml_dtypes.int4), "w")
        if block is None:
            return self.op(
                "DequantizeLinear", codes, self.scale(0.01, (shape[1 - axis],)), axis=1 - axis
            )
        size = list(shape)
        size[axis] = -(-shape[axis] // block)
        scales = self.const((self.rng.random(size) * 0.01 + 0.01).astype(np.float16), "scales")
        return self.op("DequantizeLinear", codes, scales, axis=axis, block_size=block)

    def requant(self, w: str, channels: int, axis: int, zero_point: str = "none") -> str:
        """INT8 per-channel Q and DQ of a weight that was just dequantized from INT4."""
        s = self.scale(0.003, (channels,))
        if zero_point == "const":
            z = self.const(np.zeros(channels, np.int8))
            return self.op(
                "DequantizeLinear", self.op("QuantizeLinear", w, s, z, axis=axis), s, z, axis=axis
            )
        extra = {} if zero_point == "bare" else {"output_dtype": TensorProto.INT8}
        return self.op(
            "DequantizeLinear", self.op("QuantizeLinear", w, s, axis=axis, **extra), s, axis=axis
        )

    def reshape(self, w: str, *shape: int) -> str:
        """Reshape ``w``."""
        return self.op("Reshape", w, self.const(np.array(shape, np.int64), "shape"))

    def model(self, y: str) -> onnx.ModelProto:
        """Finish the graph with output ``y``."""
        x = helper.make_tensor_value_info("x", TensorProto.FLOAT16, ["batch", *self.shape])
        graph = helper.make_graph(
            self.nodes, "form", [x], [helper.make_empty_tensor_value_info(y)], self.constants
        )
        graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT16
        ir_version = {21: 10, 23: 11}[self.opset]
        domains = sorted({node.domain for node in self.nodes} - {""})
        opsets = [("", self.opset), *((domain, 1) for domain in domains)]
        imports = [helper.make_opsetid(domain, version) for domain, version in opsets]
        return helper.make_model(graph, opset_imports=imports, ir_version=ir_version)


def conv(d: Draft, x: str, w: str, k: int, group: int = 1, **more: object) -> str:
    return d.op("Conv", x, w, pads=[k // 2] * 4 if k else [1, 1], group=group, **more)


def conv4(
    o: int, i: int, k: int, block: int | None, *, group: int = 1, act: str = "", size: int = 16
) -> Form:
    """INT4 conv as 2-D blocks and a Reshape; ``act`` also makes it w4a8 with that zero-point form."""

    def form(d: Draft) -> str:
        x = d.op("Relu", "x")
        w = d.int4((o, i // group * k * k), block, 1)
        w = d.reshape(w, o, i // group, k, k)
        if act:
            w, x = d.requant(w, o, 0, act), d.act(x, act)
        return conv(d, x, w, k, group)

    return form


def conv4_turned(o: int, i: int, k: int, block: int, *, act: str = "") -> Form:
    """INT4 conv whose reduction runs over positions first: 2-D blocks, a Reshape and a Transpose."""

    def form(d: Draft) -> str:
        x = d.op("Relu", "x")
        w = d.op(
            "Transpose", d.reshape(d.int4((o, k * k * i), block, 1), o, k, k, i), perm=[0, 3, 1, 2]
        )
        if act:
            w, x = d.requant(w, o, 0, act), d.act(x, act)
        return conv(d, x, w, k)

    return form


def windows(d: Draft, x: str, k: int, stride: int, dilation: int, pads: list[int]) -> str:
    """Im2col: [N, C, *sizes] -> [N, *sizes, k^n * C], positions first, then channels."""
    rank = len(pads) // 2
    if any(pads):
        zeros = [0, 0]
        pads = [*zeros, *pads[:rank], *zeros, *pads[rank:]]
        x = d.op("Pad", x, d.const(np.array(pads, np.int64), "pads"))
    axes = d.const(np.arange(2, 2 + rank, dtype=np.int32), "axes")
    steps = (d.const(np.full(rank, stride, np.int32), "steps"),) if stride > 1 else ()
    pieces = []
    for place in np.ndindex(*([k] * rank)):
        starts = np.array(place, np.int32) * dilation
        last = np.iinfo(np.int32).max
        ends = [start - (k - 1) * dilation or last for start in starts.tolist()]
        bounds = d.const(starts, "starts"), d.const(np.array(ends, np.int32), "ends")
        pieces.append(d.op("Slice", x, *bounds, axes, *steps))
    x = d.op("Concat", *pieces, axis=1) if len(pieces) > 1 else pieces[0]
    return d.op("Transpose", x, perm=[0, *range(2, 2 + rank), 1])


def product(
    o: int,
    i: int,
    k: int,
    block: int | None,
    *,
    rank: int = 2,
    stride: int = 1,
    dilation: int = 1,
    fourth: bool = False,
) -> Form:
    """A convolution as a matrix product over its windows: INT4 in blocks; block None: INT8 weights alone.

    ``fourth``: a 1-D input has another axis for the product.
    """

    def form(d: Draft) -> str:
        x = d.op("Relu", "x")
        if k > 1:
            x = windows(d, x, k, stride, dilation, [k // 2 * dilation] * 2 * rank)
        else:
            x = d.op("Transpose", x, perm=[0, *range(2, 2 + rank), 1])
        shape = (k**rank * i, o)
        w = d.int8(shape, 1) if block is None else d.int4(shape, block, 0)
        bias = d.const(d.rng.standard_normal(o).astype(np.float16), "bias")
        if fourth:
            x = d.op("Unsqueeze", x, d.const(np.array([1], np.int64), "axes"))
        y = d.op("Add", d.op("MatMul", x, w), bias)
        if fourth:
            y = d.op("Transpose", y, perm=[0, 3, 1, 2])
            return d.op("Squeeze", y, d.const(np.array([2], np.int64), "axes"))
        return d.op("Transpose", y, perm=[0, rank + 1, *range(1, rank + 1)])

    return form


def conv8(o: int, i: int, k: int, *, group: int = 1, act: str = "none") -> Form:
    """INT8 conv; ``act`` empty leaves the activation in FP16 (weights only)."""

    def form(d: Draft) -> str:
        x = d.op("Relu", "x")
        x = d.act(x, act) if act else x
        return conv(d, x, d.int8((o, i // group, k, k)), k, group)

    return form


def matmul4(k: int, n: int, block: int | None, *, act: str = "") -> Form:
    """INT4 MatMul, weight [K, N] in blocks along axis 0; ``act`` also makes it w4a8."""

    def form(d: Draft) -> str:
        x = d.op("Relu", "x")
        w = d.int4((k, n), block, 0)
        if act:
            w, x = d.requant(w, n, 1, act), d.act(x, act)
        return d.op("MatMul", x, w)

    return form


def matmul8(k: int, n: int, act: str = "none") -> Form:
    def form(d: Draft) -> str:
        x = d.op("Relu", "x")
        return d.op("MatMul", d.act(x, act) if act else x, d.int8((k, n), 1))

    return form


def attend(d: Draft, q: str, k: str, v: str, act: Callable[[Draft, str], str] | None = None) -> str:
    """softmax(q k^T) v of products [N, T, 128], each with a bias, in four heads; ``act`` rounds all operands."""
    heads = []
    for product, perm in ((q, [0, 2, 1, 3]), (k, [0, 2, 3, 1]), (v, [0, 2, 1, 3])):
        bias = d.const(d.rng.standard_normal(128).astype(np.float16), "bias")
        heads.append(
            d.op("Transpose", d.reshape(d.op("Add", product, bias), 0, -1, 4, 32), perm=perm)
        )
    rounded = act or (lambda _, x: x)
    heads = [rounded(d, head) for head in heads]
    scores = d.op("Mul", d.op("MatMul", *heads[:2]), d.const(np.float16(0.17)))
    probabilities = rounded(d, d.op("Softmax", scores, axis=-1))
    attended = d.op("MatMul", probabilities, heads[2])
    return d.reshape(d.op("Transpose", attended, perm=[0, 2, 1, 3]), 0, -1, 128)


def three_of_one_input(*kinds: str) -> Form:
    """Products by three 128 x 128 weights that read one input, as queries, keys and values do."""

    def form(d: Draft) -> str:
        x = d.op("Relu", "x")
        quantized = d.act(x) if any(kind.endswith("a8") for kind in kinds) else x
        made = {
            "fp16": lambda: d.const(d.rng.standard_normal((128, 128)).astype(np.float16), "w"),
            "w8a8": lambda: d.int8((128, 128), 1),
            "w8a16": lambda: d.int8((128, 128), 1),
            "w4a16": lambda: d.int4((128, 128), 64, 0),
            "w4a8": lambda: d.requant(d.int4((128, 128), 64, 0), 128, 1),
        }
        q, k, v = (
            d.op("MatMul", quantized if kind.endswith("a8") else x, made[kind]()) for kind in kinds
        )
        return attend(d, q, k, v)

    return form


def gemm(
    k: int, n: int, *, trans: int, block: int | None = 0, act: str = "", bias: bool = True
) -> Form:
    """Gemm; block 0 means INT8 weights, else INT4 blocks along K; with ``act`` the activation is INT8."""

    def form(d: Draft) -> str:
        x = d.op("Relu", "x")
        shape, out_axis = ((n, k), 0) if trans else ((k, n), 1)
        w = d.int8(shape, out_axis) if block == 0 else d.int4(shape, block, 1 - out_axis)
        if act and block != 0:
            w = d.requant(w, n, out_axis, act)
        x = d.act(x, act) if act else x
        more = (d.const(d.rng.standard_normal(n).astype(np.float16), "bias"),) if bias else ()
        return d.op("Gemm", x, w, *more, transB=trans)

    return form


def conv1d8(d: Draft) -> str:
    return conv(d, d.act(d.op("Relu", "x")), d.int8((64, 64, 3)), 0)


def conv1d4(d: Draft) -> str:
    w = d.reshape(d.int4((64, 192), 64, 1), 64, 64, 3)
    return conv(d, d.op("Relu", "x"), w, 0)


def conv3d8(d: Draft) -> str:
    return d.op("Conv", d.act(d.op("Relu", "x")), d.int8((64, 32, 3, 3, 3)), pads=[1] * 6)


def shared_act(d: Draft) -> str:
    x = d.act(d.op("Relu", "x"))
    return d.op("Add", conv(d, x, d.int8((64, 64, 3, 3)), 3), conv(d, x, d.int8((64, 64, 1, 1)), 1))


def shared_weight8(d: Draft) -> str:
    w = d.int8((64, 64, 3, 3))
    x = conv(d, d.act(d.op("Relu", "x")), w, 3)
    return conv(d, d.act(d.op("Relu", x)), w, 3)


def shared_act_mixed(d: Draft) -> str:
    x = d.act(d.op("Relu", "x"))
    w = d.requant(d.reshape(d.int4((64, 576), 64, 1), 64, 64, 3, 3), 64, 0)
    return d.op("Add", conv(d, x, d.int8((64, 64, 3, 3)), 3), conv(d, x, w, 3))


def act_and_plain(d: Draft) -> str:
    x = d.op("Relu", "x")
    w = d.const(d.rng.standard_normal((64, 64, 1, 1)).astype(np.float16), "w")
    return d.op("Add", conv(d, d.act(x), d.int8((64, 64, 3, 3)), 3), conv(d, x, w, 1))


def bias_conv8(d: Draft) -> str:
    b = d.const(d.rng.standard_normal(64).astype(np.float16), "bias")
    return d.op("Conv", d.act(d.op("Relu", "x")), d.int8((64, 64, 3, 3)), b, pads=[1] * 4)


def scale_rank1(d: Draft) -> str:
    s = d.scale(0.05, (1,))
    x = d.op("QuantizeLinear", d.op("Relu", "x"), s, output_dtype=TensorProto.INT8)
    return conv(d, d.op("DequantizeLinear", x, s), d.int8((64, 64, 3, 3)), 3)


def qdq_before_resize(d: Draft) -> str:
    x = d.act(d.op("Relu", "x"))
    sizes = d.const(np.array([1, 1, 2, 2], np.float32), "scales")
    x = d.op(
        "Resize",
        x,
        "",
        sizes,
        mode="nearest",
        coordinate_transformation_mode="asymmetric",
        nearest_mode="floor",
    )
    return conv(d, x, d.int8((64, 64, 3, 3)), 3)


def qdq_after_resize(d: Draft) -> str:
    sizes = d.const(np.array([1, 1, 2, 2], np.float32), "scales")
    x = d.op(
        "Resize",
        d.op("Relu", "x"),
        "",
        sizes,
        mode="nearest",
        coordinate_transformation_mode="asymmetric",
        nearest_mode="floor",
    )
    return conv(d, d.act(x), d.int8((64, 64, 3, 3)), 3)


def lhs_int4(d: Draft) -> str:
    return d.op("MatMul", d.int4((128, 128), 64, 1), "x")


def moving(op: str, kind: str, kernel: int = 3, shifted: bool = False) -> Form:
    """INT8 behind a SiLU, with a range that moves: by a table of ramps, or the largest value of each sample or row.

    ``shifted``: zeros are padded, and a constant taken off each channel, before the quantizer.
    """

    def form(d: Draft) -> str:
        x = d.op("Mul", "x", d.op("Sigmoid", "x"))
        if kind == "timestep":
            # Any number that is known at run time stands for the timestep.
            ramps = d.op("Cast", d.op("ReduceMax", "x", keepdims=0), to=TensorProto.FLOAT)
            ramps = d.op("Mul", ramps, d.const(np.full(20, 0.1, np.float32)))
            ramps = d.op("Clip", ramps, d.const(np.float32(0)), d.const(np.float32(1)))
            ramps = d.op("Cast", ramps, to=TensorProto.FLOAT16)
            steps = d.const(np.linspace(0.1, 0.2, 20).astype(np.float16), "steps")
            ratio = d.op("ReduceSum", d.op("Mul", ramps, steps), keepdims=0)
        else:
            axes = d.const(np.array([1, 2, 3] if op == "Conv" else [-1], np.int64))
            ratio = d.op("ReduceMax", d.op("Abs", x), axes)
            ratio = d.op("Mul", ratio, d.const(np.float16(0.1)))
            ratio = d.op("Max", ratio, d.const(np.float16(2**-7)))
        x, pads, more = d.op("Div", x, ratio), kernel // 2, list[str]()
        if shifted:
            if pads:
                x = d.op("Pad", x, d.const(np.array([0, 0, pads, pads] * 2, np.int64)))
            middle, pads = np.linspace(0.1, 0.3, 64).reshape(64, 1, 1), 0
            x = d.op("Sub", x, d.const(middle.astype(np.float16)))
            more = [d.const(np.linspace(0, 1, 64).astype(np.float16))]
        x = d.act(x)
        y = (
            d.op("Conv", x, d.int8((64, 64, kernel, kernel)), *more, pads=[pads] * 4)
            if op == "Conv"
            else d.op("MatMul", x, d.int8((64, 64), 1))
        )
        bias = d.const(np.ones((64, 1, 1) if op == "Conv" else 64, np.float16), "bias")
        return d.op("Add", d.op("Mul", y, ratio), bias)

    return form


# Rows of the table: (name, shape of x without batch, form), in parts.
Row = tuple[str, tuple[int, ...], Form]
SQUARE, MANY, VECTOR, SIGNAL = (64, 16, 16), (16,), (128,), (64, 16)
COLOURS, LATENTS = (3, 16, 16), (4, 16, 16)

CONVS_W8A8: tuple[Row, ...] = (
    ("conv w8a8, no zero point, output_dtype", SQUARE, conv8(64, 64, 3)),
    ("conv w8a8, int8 zero point", SQUARE, conv8(64, 64, 3, act="const")),
    (
        "conv w8a8, no zero point, no output_dtype (defaults to uint8)",
        SQUARE,
        conv8(64, 64, 3, act="bare"),
    ),
    ("conv w8a8 with bias", SQUARE, bias_conv8),
    ("conv w8a8 1x1", SQUARE, conv8(64, 64, 1)),
    ("conv w8a8 3 -> 64", COLOURS, conv8(64, 3, 3)),
    ("conv w8a8 64 -> 3", SQUARE, conv8(3, 64, 3)),
    ("conv w8a8 groups=32", SQUARE, conv8(64, 64, 3, group=32)),
    ("conv w8a8 groups=2", SQUARE, conv8(64, 64, 3, group=2)),
    ("conv w8a8 depthwise", SQUARE, conv8(64, 64, 3, group=64)),
    ("conv w8a8 1-D", (64, 32), conv1d8),
    ("conv w8a8 3-D", (32, 8, 8, 8), conv3d8),
    ("conv w8a8, scale of shape [1]", SQUARE, scale_rank1),
    ("conv w8a8, Q/DQ before Resize", SQUARE, qdq_before_resize),
    ("conv w8a8, Q/DQ after Resize", SQUARE, qdq_after_resize),
)
RANGES: tuple[Row, ...] = (
    ("conv w8a8, range by timestep", SQUARE, moving("Conv", "timestep")),
    ("conv w8a8, range of each sample", SQUARE, moving("Conv", "dynamic")),
    ("conv w8a8, range of each sample, shifted", SQUARE, moving("Conv", "dynamic", 3, True)),
    ("conv w8a8 1x1, range by timestep, shifted", SQUARE, moving("Conv", "timestep", 1, True)),
    ("matmul w8a8, range by timestep", (32, 64), moving("MatMul", "timestep")),
    ("matmul w8a8, range of each row", (32, 64), moving("MatMul", "dynamic")),
)
SHARED: tuple[Row, ...] = (
    ("two convs w8a8 sharing one Q/DQ", SQUARE, shared_act),
    ("two convs w8a8 and w4a8 sharing one Q/DQ", SQUARE, shared_act_mixed),
    ("one conv w8a8 and one fp16 on the same tensor", SQUARE, act_and_plain),
    ("two convs w8a8 sharing one weight", SQUARE, shared_weight8),
)
CONVS_W8A16: tuple[Row, ...] = (
    ("conv w8a16", SQUARE, conv8(64, 64, 3, act="")),
    ("conv w8a16 1x1", SQUARE, conv8(64, 64, 1, act="")),
    ("conv w8a16 groups=32", SQUARE, conv8(64, 64, 3, group=32, act="")),
    ("conv w8a16 depthwise", SQUARE, conv8(64, 64, 3, group=64, act="")),
)
CONVS_W4A16: tuple[Row, ...] = (
    ("conv w4a16 b64", SQUARE, conv4(64, 64, 3, 64)),
    ("conv w4a16 b256 (K=2304)", (256, 16, 16), conv4(64, 256, 3, 256)),
    ("conv w4a16 K=27 one block of 27", COLOURS, conv4(64, 3, 3, 27)),
    ("conv w4a16 K=36 one block of 36", LATENTS, conv4(64, 4, 3, 36)),
    ("conv w4a16 K=27 b32 (ragged)", COLOURS, conv4(64, 3, 3, 32)),
    ("conv w4a16 K=36 b32 (ragged)", LATENTS, conv4(64, 4, 3, 32)),
    ("conv w4a16 K=36 b18", LATENTS, conv4(64, 4, 3, 18)),
    ("conv w4a16 K=45 b9 (odd block)", (5, 16, 16), conv4(64, 5, 3, 9)),
    ("conv w4a16 O=3 (odd) b64", SQUARE, conv4(3, 64, 3, 64)),
    ("conv w4a16 O=3 and K=27", COLOURS, conv4(3, 3, 3, 27)),
    ("conv w4a16 1x1 b64", SQUARE, conv4(64, 64, 1, 64)),
    ("conv w4a16 groups=32 (K=18)", SQUARE, conv4(64, 64, 3, 18, group=32)),
    ("conv w4a16 groups=2 b32", SQUARE, conv4(64, 64, 3, 32, group=2)),
    ("conv w4a16 depthwise (K=9)", SQUARE, conv4(64, 64, 3, 9, group=64)),
    ("conv w4a16 1-D", (64, 32), conv1d4),
)
WINDOWS: tuple[Row, ...] = (
    ("conv w4a16 b64 as a product over windows", SQUARE, product(64, 64, 3, 64)),
    ("conv w4a16 b64 as a product, stride 2", SQUARE, product(64, 64, 3, 64, stride=2)),
    ("conv w4a16 b64 as a product, dilation 2", SQUARE, product(64, 64, 3, 64, dilation=2)),
    ("conv w4a16 b64 as a product, 1-D", SIGNAL, product(64, 64, 3, 64, rank=1)),
    (
        "conv w4a16 b64 as a product, 1-D with a fourth axis",
        SIGNAL,
        product(64, 64, 3, 64, rank=1, fourth=True),
    ),
    ("conv w4a16 b96 as a product, 3-D", (32, 4, 8, 8), product(64, 32, 3, 96, rank=3)),
    ("conv w4a16 b32 as a product, 1x1", SQUARE, product(64, 64, 1, 32)),
    ("conv w4a16 b64 as a product, 1x1 of one block", SQUARE, product(64, 64, 1, 64)),
    ("conv w4a16 b18 as a product, 4 channels in", LATENTS, product(64, 4, 3, 18)),
    ("conv w4a16 b64 as a product, 4 channels out", SQUARE, product(4, 64, 3, 64)),
    ("conv w4a16 b64 as a product, 5x5", SQUARE, product(64, 64, 5, 64)),
    ("conv w8a16 as a product over windows", SQUARE, product(64, 64, 3, None)),
    ("conv w8a16 as a product, 1x1", SQUARE, product(64, 64, 1, None)),
)
# The first two have their reduction over positions, then channels.
CONVS_W4A8: tuple[Row, ...] = (
    ("conv w4a16 b64, positions first", SQUARE, conv4_turned(64, 64, 3, 64)),
    ("conv w4a8 b64, positions first", SQUARE, conv4_turned(64, 64, 3, 64, act="none")),
    ("conv w4a8 b64, output_dtype", SQUARE, conv4(64, 64, 3, 64, act="none")),
    ("conv w4a8 b64, int8 zero points", SQUARE, conv4(64, 64, 3, 64, act="const")),
    ("conv w4a8 1x1 b64", SQUARE, conv4(64, 64, 1, 64, act="none")),
    ("conv w4a8 3 -> 64, block 27", COLOURS, conv4(64, 3, 3, 27, act="none")),
    ("conv w4a8 4 -> 64, block 36", LATENTS, conv4(64, 4, 3, 36, act="none")),
    ("conv w4a8 64 -> 3, b64", SQUARE, conv4(3, 64, 3, 64, act="none")),
    ("conv w4a8 groups=2 b32", SQUARE, conv4(64, 64, 3, 32, group=2, act="none")),
)
PRODUCTS_INT8: tuple[Row, ...] = (
    ("matmul w8a8 3-D x", (*MANY, 128), matmul8(128, 128)),
    ("matmul w8a8 2-D x", VECTOR, matmul8(128, 128)),
    ("matmul w8a8 int8 zero point", (*MANY, 128), matmul8(128, 128, "const")),
    ("matmul w8a8 K=27 N=45", (*MANY, 27), matmul8(27, 45)),
    ("matmul w8a16 3-D x", (*MANY, 128), matmul8(128, 128, "")),
    ("matmul w8a16 2-D x", VECTOR, matmul8(128, 128, "")),
    ("matmul w8a16 K=27 N=45", (*MANY, 27), matmul8(27, 45, "")),
    ("matmul w8a16 K=36 N=46", (*MANY, 36), matmul8(36, 46, "")),
    ("gemm w8a8 transB=1 bias", VECTOR, gemm(128, 128, trans=1, act="none")),
    ("gemm w8a8 transB=0 bias", VECTOR, gemm(128, 128, trans=0, act="none")),
    ("gemm w8a16 transB=1 bias", VECTOR, gemm(128, 128, trans=1)),
    ("gemm w8a16 transB=0 bias", VECTOR, gemm(128, 128, trans=0)),
    ("gemm w8a16 transB=1 no bias", VECTOR, gemm(128, 128, trans=1, bias=False)),
)
# Block -> K, where that is not 128.
REDUCTIONS = {20: 100, 48: 96, 256: 512}
BLOCKS: tuple[Row, ...] = tuple(
    (f"matmul w4a16 K={k} b{block} 3-D x", (*MANY, k), matmul4(k, 128, block))
    for block in (16, 20, 32, 48, 64, 128, 256)
    for k in [REDUCTIONS.get(block, 128)]
)
PRODUCTS_INT4: tuple[Row, ...] = (
    ("matmul w4a16 K=128 b64 2-D x", VECTOR, matmul4(128, 128, 64)),
    ("matmul w4a16 K=64 b32 (two blocks)", (*MANY, 64), matmul4(64, 64, 32)),
    ("matmul w4a16 K=64 b64 (one block)", (*MANY, 64), matmul4(64, 64, 64)),
    ("matmul w4a16 K=66 b33 (odd block)", (*MANY, 66), matmul4(66, 64, 33)),
    ("matmul w4a16 N=46 b64", (*MANY, 128), matmul4(128, 46, 64)),
    ("matmul w4a16 K=27 one block of 27", (*MANY, 27), matmul4(27, 64, 27)),
    ("matmul w4a16 K=36 one block of 36", (*MANY, 36), matmul4(36, 64, 36)),
    ("matmul w4a16 K=100 one block of 100", (*MANY, 100), matmul4(100, 64, 100)),
    ("matmul w4a16 K=100 b32 (ragged)", (*MANY, 100), matmul4(100, 64, 32)),
    ("matmul w4a16 K=45 b9", (*MANY, 45), matmul4(45, 64, 9)),
    ("matmul w4a16 K=100 b10", (*MANY, 100), matmul4(100, 64, 10)),
    ("matmul w4a16 K=96 b24", (*MANY, 96), matmul4(96, 64, 24)),
    ("matmul w4a16 K=48 b12", (*MANY, 48), matmul4(48, 64, 12)),
    ("matmul w4a16 N=45 (odd) b64", (*MANY, 128), matmul4(128, 45, 64)),
    ("matmul w4a16 N=3 (odd) b64", (*MANY, 128), matmul4(128, 3, 64)),
    ("matmul w4a16 K=27 N=45", (*MANY, 27), matmul4(27, 45, 27)),
    ("matmul w4a8 b64, output_dtype", (*MANY, 128), matmul4(128, 128, 64, act="none")),
    ("matmul w4a8 b64, int8 zero points", (*MANY, 128), matmul4(128, 128, 64, act="const")),
    ("matmul w4a8 K=27 block 27", (*MANY, 27), matmul4(27, 64, 27, act="none")),
    ("matmul w4a8 N=45 b64", (*MANY, 128), matmul4(128, 45, 64, act="none")),
    ("gemm w4a16 b64 transB=1 bias", VECTOR, gemm(128, 128, trans=1, block=64)),
    ("gemm w4a16 b64 transB=0 bias", VECTOR, gemm(128, 128, trans=0, block=64)),
    ("gemm w4a16 b64 transB=1 no bias", VECTOR, gemm(128, 128, trans=1, block=64, bias=False)),
    ("gemm w4a16 K=27 block 27 transB=1", (27,), gemm(27, 64, trans=1, block=27)),
    ("gemm w4a16 K=100 b20 transB=1", (100,), gemm(100, 64, trans=1, block=20)),
    ("gemm w4a16 N=45 b64 transB=1", VECTOR, gemm(128, 45, trans=1, block=64)),
    ("gemm w4a8 b64 transB=1 bias", VECTOR, gemm(128, 128, trans=1, block=64, act="none")),
    ("gemm w4a8 b64 transB=0 bias", VECTOR, gemm(128, 128, trans=0, block=64, act="none")),
    ("gemm w4a8 K=27 block 27 transB=1", (27,), gemm(27, 64, trans=1, block=27, act="none")),
    ("matmul w4a16, weight on the left", (128, 128), lhs_int4),
)
ATTENTIONS: tuple[Row, ...] = (
    *(
        (f"q, k, v {kind}, attention", (*MANY, 128), three_of_one_input(*[kind] * 3))
        for kind in ("fp16", "w8a8", "w8a16", "w4a16", "w4a8")
    ),
    (
        "q, k w8a8, v w4a16, attention",
        (*MANY, 128),
        three_of_one_input("w8a8", "w8a8", "w4a16"),
    ),
)
FORMS: tuple[Row, ...] = (
    *(*CONVS_W8A8, *RANGES, *SHARED, *CONVS_W8A16, *CONVS_W4A16, *WINDOWS, *CONVS_W4A8),
    *(*PRODUCTS_INT8, *BLOCKS, *PRODUCTS_INT4, *ATTENTIONS),
)


def constant_bytes(model: onnx.ModelProto) -> int:
    """Bytes of the float, int8 and int4 constants (shapes of Reshape vanish in the engine)."""
    total = 0
    for tensor in model.graph.initializer:
        size = int(np.prod(tensor.dims))
        bits = {
            TensorProto.FLOAT16: 16,
            TensorProto.INT8: 8,
            TensorProto.INT4: 4,
            TensorProto.FLOAT8E4M3FN: 8,
            TensorProto.FLOAT4E2M1: 4,
        }.get(tensor.data_type, 0)
        total += -(-size * bits // 8)
    return total


def kernels(log: EngineLog) -> str:
    """Name the kernels that compute, and those that rebuild a quantized weight at each call."""
    whole = "_gemm_mha"  # how the kernel of a whole attention is called
    found = [
        f"{'attention' if layer.name.startswith(whole) else layer.type} {compute_dtype(layer)}"
        for layer in log.layers
        if layer.compute or layer.name.startswith(whole)
    ]
    for layer in log.layers:
        narrow = {"Int4", "Int8", "FP8", "FP4E2M1"}
        dtypes = {tensor.dtype for tensor in layer.constants} & narrow
        if layer.type == "kgen" and dtypes and not layer.inputs:
            found.append(f"whole weight {min(dtypes)} -> {layer.outputs[0].dtype} each call")
    return ", ".join(found)


def build(model: onnx.ModelProto, shape: tuple[int, ...], sm: tuple[str, ...]) -> dict[str, str]:
    """Build ``model`` in a child process and describe the result."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        onnx.save(model, folder / "form.onnx")
        shapes = {"x": InputShapes((1, *shape), (2, *shape), (BATCH, *shape))}
        files = [str(folder / part) for part in ("form.onnx", "engine", "log", "result")]
        BuildJob("tensorrt_rtx", *files, sm, shapes).save(folder / "job.json")
        done = run_child(WORKER, str(folder / "job.json"))
        if done.returncode < 0:
            return {"builds": "CRASH", "bytes": "", "how": f"signal {-done.returncode}"}
        result = json.loads((folder / "result").read_text(encoding="utf-8"))
        if "errors" in result:
            why = min((e["message"] for e in result["errors"]), key=len)
            return {
                "builds": f"FAIL {result['stage']}",
                "bytes": "",
                "how": " ".join(why.split())[:110],
            }
        log = parse_engine_log((folder / "log").read_text(encoding="utf-8"))
        return {
            "builds": "yes",
            "bytes": f"{log.weights_bytes} ({constant_bytes(model)})",
            "how": kernels(log),
        }


# The forms that tell Turing from the rest.
TURING = (
    "conv w8a8 1x1",
    "conv w8a8, range of each sample, shifted",
    "conv w8a16",
    "conv w4a16 b64",
    "conv w4a8 b64, output_dtype",
    "matmul w8a8 3-D x",
)
TURING += ("matmul w8a16 3-D x", "matmul w4a16 K=128 b64 3-D x", "gemm w8a8 transB=1 bias")

RULES = """
What follows from it, and is a rule of the target `rtx` or of the check of engines:

- Activation scales are rank 0 and lie right on the layer's input: a scale of shape [1], or a Resize between, silently
  brings a convolution back to FP16.
- Q without zero point and with `output_dtype` INT8 is enough, for activations and for the second quantization of w4a8.
- INT4 constants need an even number of elements. Their blocks must divide the reduction: a ragged last block builds,
  but the parser of TensorRT proper infers the block size from the scale's shape, so its numerics are unproven. A
  reduction shorter than the block takes one block.
- A product by INT4 weights takes them as they lie if K and N are even and K has at least two blocks; else the whole
  weight is unpacked at each call (the bytes stay packed). INT8 weights alone: K and N even.
- Convolutions by INT4 or INT8 weights alone unpack the whole weight at each call: memory is saved, not bandwidth.
  Written as a product over its windows (Slices, Concat, Transpose, MatMul) a convolution takes the packed weight as
  products do, and moves its windows instead; a product of three axes is not fused, so a 1-D one needs a fourth.
- INT8 convolutions pad the channels of a group to 4: nothing for most, but four times the bytes of a depthwise one.
- A Pad and a subtraction before Q are in the quantizer's kernel, and the Conv's own bias in the product's: channels are
  shifted at no kernel.
- Layers that read the same tensor share its Q/DQ pair, whatever their weights are.
- Attention in heads of 32 to 128 channels is one kernel; in FP8 where all four operands are quantized to it, from 32
  tokens on.
- Queries, keys and values whose weights are all FP16, or all INT8 with INT8 activations, are one product over all their
  columns. Those whose kernel unpacks the weight stay apart; w4a8 (in some graphs) and FP8 (for SM89 alone) may be one.
  A run reads it from its own engine ([latency](latency.md#what-a-built-engine-shows)).
"""


FLOATS = """## FP8 and FP4

One engine for the GPUs named. What follows, and is a rule of the targets that list these formats or of `check`:

- FP8 computes wherever INT8 does, with the same bytes, but for kernels of more than 32 positions: those run in FP16,
  silently. One SM80 among the GPUs of an engine, and its build fails.
- FP8 weights alone are fused into products, as INT8's are: not into all; a convolution unpacks them at each call.
- 4-bit storage with FP8 compute: INT4 blocks, quantized to E4M3 per channel by a kernel at each call.
- NVFP4 multiplies FP4 by FP4 in products of inputs of two or three dimensions, K a multiple of 16, on SM100 and later.
  FP4 weights alone are unpacked, and MXFP8 is dequantized and multiplied in FP16.
- TensorRT's own FP8 quantizers, and `com.microsoft` Q/DQ and Gelu, are read as ONNX's.

| form | GPUs | builds | weight bytes in the engine (of the constants) | kernels that compute |
|---|---|---|---|---|
"""


def measured(names: tuple[str, ...] | None, only: str, sm: list[str]) -> list[str]:
    """Build the forms (all, or those of ``names``) and return the rows of the table; print each as it comes."""
    rows = []
    for name, shape, form in FORMS:
        if only in name and (names is None or name in names):
            draft = Draft(*shape)
            row = build(draft.model(form(draft)), shape, tuple(sm))
            rows.append(
                f"| {name} | {row['builds']} | {row['bytes']} | {row['how'].replace('|', '/')} |"
            )
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="only forms whose name contains this")
    parser.add_argument("--sm", nargs="*", default=["SM80", "SM86", "SM89", "SM120"])
    parser.add_argument("-o", "--out", type=Path)
    chosen = parser.parse_args()
    # Its forms are made with the pieces above.
    from benchmarks.float_forms import rows as float_rows

    rows = measured(None, chosen.only, chosen.sm)
    if chosen.out:
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
        chosen.out.write_text(
            page(rows, chosen.sm, measured(TURING, "", ["SM75"]), float_rows()), encoding="utf-8"
        )


def page(rows: list[str], sm: list[str], turing: list[str], floats: list[str]) -> str:
    from importlib.metadata import version

    head = (
        "| form | builds | weight bytes in the engine (of the constants) | kernels that compute |\n"
    )
    head += "|---|---|---|---|\n"
    return (
        "# Which quantized forms TensorRT-RTX takes\n\n"
        f"tensorrt_rtx {version('tensorrt_rtx')}, compute capabilities {', '.join(sm)}, no GPU: what the builder "
        "makes\nof one small graph per form, from its own log. Nothing was run on a GPU. Made by\n"
        "`python benchmarks/engine_forms.py -o docs/engine-forms.md`. `correlation` is a convolution; "
        "`runtime_fusion`\na product that takes packed weights as they are; "
        "`whole weight ... each call` means that the weight is\nunpacked again at every call.\n"
        + RULES
        + "\n"
        + head
        + "\n".join(rows)
        + "\n\n"
        "## Turing (SM75)\n\n"
        + head
        + "\n".join(turing)
        + "\n\n"
        + FLOATS
        + "\n".join(floats)
        + "\n"
    )


if __name__ == "__main__":
    main()
