"""One small graph per rule of the checker, and the forms that no rule may object to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import TensorProto, helper

from tests.check.draft import Draft

IMAGE, ROWS = (64, 16, 16), (16, 128)
Make = Callable[[Draft], str]


@dataclass(frozen=True)
class Form:
    """A graph that ``rule`` finds for ``target`` ("" for a good form), and what building it for RTX must show.

    ``build``: fails, half (no INT8 compute), unpacked (the whole weight at each call), builds, or "" where the builder
    is not asked (other targets, or a matter of numbers).
    """

    rule: str
    make: Make
    shape: tuple[int, ...] = IMAGE
    target: str = "rtx"
    build: str = "builds"
    opset: int = 21
    batch: int | str = 2
    dtype: int = TensorProto.FLOAT16


def conv8(d: Draft, x: str, *shape: int, **more: Any) -> str:
    shape = shape or (64, 64, 3, 3)
    return d.conv(x, d.int8(*shape), **more)


def conv4(d: Draft, x: str) -> str:
    return d.conv(x, d.reshape(d.int4(64, 576, axis=1), 64, 64, 3, 3))


def mm(d: Draft, w: str) -> str:
    return d.op("MatMul", d.relu(), w)


def mm8(d: Draft, w: str) -> str:
    return d.op("MatMul", d.act(d.relu()), w)


def act_with(d: Draft, scale: str, zero: str = "", **more: Any) -> str:
    inputs = [d.relu(), scale] + ([zero] if zero else [])
    q = d.op("QuantizeLinear", *inputs, **more)
    return d.op(
        "DequantizeLinear", q, *inputs[1:], **{k: v for k, v in more.items() if k == "axis"}
    )


def shared_int4(d: Draft) -> str:
    w = d.int4(128, 128)
    mean = d.op("ReduceMean", d.relu(), d.const(np.array([1], np.int64)), keepdims=1)
    return d.op("Add", mm(d, w), d.op("MatMul", mean, w))


def shared_alike(d: Draft) -> str:
    w, x = d.int4(128, 128), d.relu()
    return d.op("Add", d.op("MatMul", x, w), d.op("MatMul", d.op("Sigmoid", x), w))


def same_scales(d: Draft) -> str:
    s = d.scale(0.01, (64,))
    w = d.op("DequantizeLinear", d.codes("int4", 64, 64, 3, 3), s, axis=0)
    return d.conv(d.act(d.relu()), d.requant(w, 64, 0, s))


def int4_cast(d: Draft) -> str:
    w8 = d.op("Cast", d.codes("int4", 128, 128), to=TensorProto.INT8)
    return mm(d, d.op("DequantizeLinear", w8, d.scale(0.01, (128,)), axis=1))


def qlinear(d: Draft) -> str:
    bits = d.op(
        "BitShift", d.const(np.ones(4, np.uint8)), d.const(np.ones(4, np.uint8)), direction="LEFT"
    )
    scale = d.op("Cast", bits, to=TensorProto.FLOAT16)
    return d.op(
        "Mul", d.op("ReduceMean", d.relu(), keepdims=1), d.op("ReduceMax", scale, keepdims=0)
    )


def nbits(d: Draft) -> str:
    codes, scales = d.const(np.zeros((128, 4, 16), np.uint8)), d.const(np.ones(512, np.float16))
    return d.op(
        "MatMulNBits",
        d.relu(),
        codes,
        scales,
        domain="com.microsoft",
        K=128,
        N=128,
        bits=4,
        block_size=32,
    )


def resized(d: Draft, *sizes: str, **form: Any) -> str:
    given = sizes or ("", "", d.const(np.array([2, 64, 8, 8])))
    return d.op("Resize", d.relu(), *given, mode="linear", **form)


def reduced(d: Draft, op: str, *places: int, reduction: str) -> str:
    index = d.const(np.zeros(places, np.int64))
    return d.op(op, d.relu(), index, d.half(1, 64, 16, 16), reduction=reduction)


def with_outputs(d: Draft, op: str, *constants: str, **form: Any) -> str:
    """The first output, with another one that nothing reads."""
    out = d.op(op, d.relu(), *constants, **form)
    d.nodes[-1].output.append("second")
    return out


def cut_out(d: Draft) -> str:
    region = d.const(np.array([0, 0, 0, 0, 1, 1, 0.9, 0.9], np.float32))
    scales = d.const(np.ones(4, np.float32))
    return resized(d, region, scales, coordinate_transformation_mode="tf_crop_and_resize")


def counted(d: Draft) -> str:
    return d.op("Cast", d.op("NonZero", d.relu()), to=TensorProto.FLOAT16)


def cast_to(d: Draft, kind: int) -> str:
    return d.op("Cast", d.op("Cast", d.relu(), to=kind), to=TensorProto.FLOAT16)


def trained_norm(d: Draft) -> str:
    parts = [d.half(64) for _ in range(4)]
    out = with_outputs(d, "BatchNormalization", *parts, training_mode=1)
    d.nodes[-1].output.append("third")
    return out


REFUSED_FORMS: tuple[Make, ...] = (
    lambda d: resized(d, antialias=1),
    lambda d: resized(d, keep_aspect_ratio_policy="not_larger"),
    cut_out,
    lambda d: d.op("MaxPool", d.relu(), kernel_shape=[2, 2], dilations=[2, 2]),
    lambda d: d.op("AveragePool", d.relu(), kernel_shape=[2, 2], dilations=[2, 2]),
    lambda d: with_outputs(d, "MaxPool", kernel_shape=[2, 2]),
    lambda d: with_outputs(d, "LayerNormalization", d.half(16)),
    trained_norm,
    lambda d: reduced(d, "ScatterElements", 1, 64, 16, 16, reduction="add"),
    lambda d: reduced(d, "ScatterND", 1, 1, reduction="max"),
    counted,
    lambda d: cast_to(d, TensorProto.INT16),
    lambda d: cast_to(d, TensorProto.UINT32),
)
ZERO = np.int8(0)
UNARY_REFUSED = ("FastGelu", "QuickGelu")


def microsoft(d: Draft, op: str) -> str:
    return d.op(op, d.relu(), domain="com.microsoft")


def microsoft_pair(d: Draft, zero: Any = ZERO) -> str:
    given = d.scale(), d.const(np.asarray(zero))
    codes = d.op("QuantizeLinear", d.relu(), *given, domain="com.microsoft")
    return d.op("DequantizeLinear", codes, *given, domain="com.microsoft")


def trt_pair(d: Draft, x: str, kind: str) -> str:
    scale = d.scale()
    codes = d.op(f"TRT_{kind}QuantizeLinear", x, scale, domain="trt")
    return d.op(f"TRT_{kind}DequantizeLinear", codes, scale, domain="trt")


def fp4_dynamic(d: Draft) -> str:
    return d.op("TRT_FP4DynamicQuantize", d.relu(), d.scale(), domain="trt", axis=-1, block_size=16)


def cast_scale(d: Draft) -> str:
    return mm(d, d.op("Cast", d.int4(128, 128, scale=np.float32), to=TensorProto.FLOAT16))


def attention8(d: Draft) -> str:
    x = d.relu()
    q, k, v = (d.act(d.op("MatMul", x, d.half(128, 128))) for _ in "qkv")
    scores = d.op("MatMul", q, d.op("Transpose", k, perm=[0, 2, 1]))
    return d.op("MatMul", d.act(d.op("Softmax", scores, axis=-1)), v)


def fp8(d: Draft, conv: bool = False) -> str:
    import ml_dtypes

    shape = (64, 64, 3, 3) if conv else (128, 128)
    codes = d.const(np.ones(shape, ml_dtypes.float8_e4m3fn))
    w = d.op("DequantizeLinear", codes, d.scale(0.01))
    return d.conv(d.relu(), w) if conv else mm(d, w)


def fp4(d: Draft) -> str:
    codes = d.raw(TensorProto.FLOAT4E2M1, [128, 128], bytes([0x22] * (128 * 64)))
    return mm(d, d.op("DequantizeLinear", codes, d.scale(0.01, (8, 128)), axis=0, block_size=16))


def act8(d: Draft, x: str) -> str:
    scale = d.scale()
    q = d.op("QuantizeLinear", x, scale, output_dtype=TensorProto.FLOAT8E4M3FN)
    return d.op("DequantizeLinear", q, scale)


def w8f8(d: Draft, *shape: int, axis: int = 0) -> str:
    import ml_dtypes

    codes = d.const(d.rng.standard_normal(shape).astype(ml_dtypes.float8_e4m3fn))
    return d.op("DequantizeLinear", codes, d.scale(0.01, (shape[axis],)), axis=axis)


def dynamic(d: Draft, kind: str, **more: Any) -> tuple[str, str]:
    """Codes and scales of the input, by an operator of TensorRT."""
    d.count += 1
    names = [f"codes_{d.count}", f"scales_{d.count}"]
    inputs = [d.relu(), *([d.scale(0.01)] if kind == "FP4" else [])]
    op, label = f"TRT_{kind}DynamicQuantize", f"n.dynamic_{d.count}"
    more = {"axis": -1, **more}
    d.nodes.append(helper.make_node(op, inputs, names, name=label, domain="trt", **more))
    return names[0], names[1]


def nvfp4(d: Draft) -> str:
    import ml_dtypes

    codes, scales = dynamic(d, "FP4", block_size=16, scale_type=17)
    scale = d.nodes[-1].input[1]
    x = d.op(
        "DequantizeLinear", codes, d.op("DequantizeLinear", scales, scale), axis=-1, block_size=16
    )
    raw = d.raw(TensorProto.FLOAT4E2M1, [128, 128], bytes([0x22] * (128 * 64)))
    blocks = d.const(np.ones((8, 128), ml_dtypes.float8_e4m3fn))
    steps = d.op("DequantizeLinear", blocks, d.scale(0.01))
    return d.op("MatMul", x, d.op("DequantizeLinear", raw, steps, axis=0, block_size=16))


def mxfp8(d: Draft) -> str:
    import ml_dtypes

    codes, scales = dynamic(d, "MXFP8", block_size=32)
    blocks = {"domain": "trt", "block_size": 32}
    x = d.op("TRT_MXFP8DequantizeLinear", codes, scales, axis=-1, **blocks)
    weight = d.const(d.rng.standard_normal((128, 128)).astype(ml_dtypes.float8_e4m3fn))
    steps = d.const(np.full((4, 128), 127, np.uint8))
    return d.op("MatMul", x, d.op("TRT_MXFP8DequantizeLinear", weight, steps, axis=0, **blocks))


def requant8(d: Draft) -> str:
    scale = d.scale(0.003, (128,))
    kind = {"output_dtype": TensorProto.FLOAT8E4M3FN}
    q = d.op("QuantizeLinear", d.int4(128, 128), scale, axis=1, **kind)
    return d.op("MatMul", act8(d, d.relu()), d.op("DequantizeLinear", q, scale, axis=1))


def raw_codes(d: Draft, data_type: int, bits: int) -> str:
    codes = d.raw(data_type, [128, 128], bytes(128 * 128 * bits // 8))
    return mm(d, d.op("DequantizeLinear", codes, d.scale(0.01, (128,)), axis=1))


def norm(d: Draft, groups: int = 8) -> str:
    ones = d.const(np.ones(64 if d.opset >= 21 else groups, np.float16))
    return d.op("GroupNormalization", d.relu(), ones, ones, num_groups=groups)


def joined(d: Draft, other: str) -> str:
    left = d.int4(64, 128, block=32)
    right = {"int8": lambda: d.int8(64, 128, axis=1), "half": lambda: d.half(64, 128)}[other]()
    return mm(d, d.op("Concat", left, right, axis=0))


def scattered(d: Draft) -> str:
    index, updates = d.const(np.zeros((1, 128), np.int64)), d.half(1, 128)
    return mm(d, d.op("ScatterElements", d.int4(128, 128), index, updates, axis=0))


def gather_branch(d: Draft, int8: bool) -> str:
    x = d.relu()
    part = d.op("Gather", x, d.const(np.arange(16)), axis=-1)
    body = d.op("MatMul", d.act(x), d.int8(128, 128, axis=1))
    branch = (
        d.op("MatMul", d.act(part, d.scale(0.4)), d.int8(16, 128, axis=1))
        if int8
        else d.op("MatMul", part, d.half(16, 128))
    )
    return d.op("Add", body, branch)


def repeated_pairs(d: Draft) -> str:
    x = d.relu()
    return d.op("Add", conv8(d, d.act(x)), conv8(d, d.act(x)))


def late(d: Draft) -> str:
    s = d.scale(0.01, (64,))
    return d.conv(d.act(d.relu()), d.requant(d.half(64, 64, 3, 3), 64, 0, s))


def one_hot(d: Draft) -> str:
    pick = np.zeros((128, 16), np.float16)
    pick[np.arange(16) * 7, np.arange(16)] = 1
    return d.op("MatMul", d.op("MatMul", d.relu(), d.const(pick)), d.half(16, 128))


def computed_scale(d: Draft) -> str:
    x = d.relu()
    s = d.op("ReduceMax", d.op("Abs", x), keepdims=0)
    q = d.op("QuantizeLinear", x, s, output_dtype=TensorProto.INT8)
    return d.op("DequantizeLinear", q, s)


def computed_zero(d: Draft) -> str:
    z = d.op("Cast", d.op("ReduceMin", "x", keepdims=0), to=TensorProto.INT8)
    return d.op("DequantizeLinear", d.codes("int8", 4), d.scale(), z)


def qkv(d: Draft) -> str:
    x = d.relu()
    return d.op("Add", d.op("MatMul", x, d.half(128, 128)), d.op("MatMul", x, d.half(128, 128)))


def unnamed(d: Draft) -> str:
    y = d.relu()
    d.nodes[-1].name = ""
    return y


def wrong_scale_type(d: Draft) -> str:
    s = d.scale(0.05, (), np.float32)
    q = d.op("QuantizeLinear", d.relu(), s, output_dtype=TensorProto.INT8)
    return d.op("DequantizeLinear", q, d.scale())


def int32_bias(d: Draft) -> str:
    bias = d.op("DequantizeLinear", d.const(np.ones(64, np.int32)), d.scale(0.01, (64,)), axis=0)
    return d.op("Conv", d.act(d.relu()), d.int8(*W8), bias, pads=[1] * 4)


def scalar_int8(d: Draft) -> str:
    return d.op(
        "Mul", d.relu(), d.op("DequantizeLinear", d.const(np.asarray(np.int8(3))), d.scale())
    )


def float32_conv(d: Draft) -> str:
    w = d.const(np.ones((64, 64, 3, 3), np.float32))
    return d.conv(d.relu(), w)


W8 = (64, 64, 3, 3)
BAD = [
    Form("int4-left", lambda d: d.op("MatMul", d.int4(128, 128, axis=1), "x"), (128, 128), build="fails"),
    Form("int4-left-channels", lambda d: d.op("MatMul", d.int4(128, 128, block=None), "x"), (128, 128),
         build="unpacked"),
    Form("int4-shared", shared_int4, ROWS, build="fails"),
    Form("int4-shared", shared_alike, ROWS, build="fails"),
    Form("block-axis", lambda d: d.conv(d.relu(), d.int4(*W8, block=32, axis=1)), build="fails"),
    Form("block-form", lambda d: d.conv(d.relu(), d.int4(*W8, block=32, axis=1)), target="jetson-agx-orin"),
    Form("block-ragged", lambda d: mm(d, d.int4(100, 128, block=32)), (16, 100), build=""),
    Form("w4a8-product", lambda d: mm8(d, d.int4(128, 128)), ROWS, build="fails"),
    Form("w4a8-conv", lambda d: d.conv(d.act(d.relu()), d.int4(*W8, block=None)), build="fails"),
    Form("w4a8-conv-undone", lambda d: conv4(d, d.act(d.relu())), build="half"),
    Form("w4a8-same-scales", same_scales, build="fails"),
    Form("requantized-unproven", lambda d: mm8(d, d.requant(d.int4(128, 128), 128, 1)), ROWS, "jetson-agx-orin"),
    Form("int4-conv-unproven", lambda d: conv4(d, d.relu()), target="jetson-thor"),
    Form("int8-weight-only-unproven", lambda d: mm(d, d.int8(128, 128, axis=1)), ROWS, "tensorrt-11"),
    Form(
        "int4-output-dtype",
        lambda d: mm(d, d.int4(128, 128, scale=np.float32, output_dtype=TensorProto.FLOAT16)),
        ROWS,
        build="fails",
        opset=23,
    ),
    Form("int4-scale-cast", cast_scale, ROWS, build="unpacked"),
    Form("conv-unpacked", lambda d: conv8(d, d.relu()), build="unpacked"),
    Form("conv-unpacked", lambda d: conv4(d, d.relu()), build="unpacked"),
    Form("conv-unpacked", lambda d: d.conv(d.relu(), d.int4(*W8, block=None)), build="unpacked"),
    Form("product-unpacked", lambda d: mm(d, d.int4(128, 128, block=None, axis=1)), ROWS, build="unpacked"),
    Form("product-unpacked", lambda d: mm(d, d.int4(64, 128, block=64)), (16, 64), build="unpacked"),
    Form("product-unpacked", lambda d: mm(d, d.int8(27, 45, axis=1)), (16, 27), build="unpacked"),
    Form("requantized-cost", lambda d: mm8(d, d.requant(d.int4(128, 128), 128, 1)), ROWS, build="unpacked"),
    Form("weight-sum", lambda d: mm(d, d.op("Add", d.int4(128, 128), d.int4(128, 128))), ROWS, build="unpacked"),
    Form("weight-join", lambda d: joined(d, "int8"), ROWS, build="fails"),
    Form("weight-join-float", lambda d: joined(d, "half"), ROWS, build="unpacked"),
    Form("weight-scatter", scattered, ROWS, build="unpacked"),
    Form("weight-product", lambda d: mm(d, d.op("MatMul", d.half(128, 8), d.half(8, 128))), ROWS),
    Form("weight-late", late),
    Form("one-hot", one_hot, ROWS),
    Form("fp4-unpacked", fp4, ROWS, "rtx-blackwell", "unpacked", opset=23),
    Form("fp8-kernel", lambda d: d.conv(act8(d, d.relu()), w8f8(d, 64, 64, 7, 7), pad=3), target="rtx-ada"),
    Form("fp8-kernel", lambda d: d.conv(trt_pair(d, d.relu(), "FP8"), w8f8(d, 64, 64, 7, 7), pad=3), target="rtx-ada"),
    Form("mxfp8", mxfp8, ROWS, "rtx-blackwell", opset=23),
    Form("operator-tensorrt", nvfp4, ROWS, "rtx-blackwell", opset=23),
    Form("operator-tensorrt", nvfp4, ROWS, "jetson-thor-jp7", opset=23),
    Form("nvfp4-release", nvfp4, ROWS, "jetson-thor", opset=23),
    Form("requantized-cost", requant8, ROWS, "rtx-ada", "unpacked"),
    Form("w4a8-product", lambda d: d.op("MatMul", act8(d, d.relu()), d.int4(128, 128)), ROWS, "rtx-ada", "fails"),
    Form("depthwise-int8", lambda d: conv8(d, d.act(d.relu()), 64, 1, 3, 3, group=64)),
    Form("transposed-int8", lambda d: d.op("ConvTranspose", d.act(d.relu()), d.int8(*W8, axis=1)), build="half"),
    Form("weight-scale-rank", lambda d: d.conv(
        d.act(d.relu()), d.op("DequantizeLinear", d.codes("int8", *W8), d.scale(0.01, (1,)), axis=0)), build="fails"),
    Form("activation-scale-shape", lambda d: conv8(d, d.act(d.relu(), d.scale(0.05, (1,)))), build="half"),
    Form("activation-scale-rank", lambda d: conv8(d, d.act(d.relu(), d.scale(0.05, (1, 1, 1, 1)))), build="fails"),
    Form("activation-per-channel", lambda d: d.op(
        "MatMul", d.act(d.relu(), d.scale(0.05, (128,)), axis=2), d.int8(128, 128, axis=1)), ROWS, build="half"),
    Form("activation-per-channel", lambda d: d.op(
        "MatMul", d.act(d.relu(), d.scale(0.05, (128,)), axis=2), d.int8(128, 128, axis=1)), ROWS, "tensorrt-10"),
    Form("quantized-before-resize", lambda d: conv8(d, d.resize(d.act(d.relu()))), build="half"),
    Form("attention-int8", attention8, ROWS),
    Form("quantizers-repeated", repeated_pairs),
    Form("branch-int8", lambda d: gather_branch(d, True), ROWS),
    Form("conv-rgb", lambda d: conv8(d, d.act(d.relu()), 64, 3, 3, 3), (3, 16, 16), "jetson-agx-orin"),
    Form("int8-conv-gpu", lambda d: conv8(d, d.act(d.relu())), target="rtx-turing", build="half"),
    Form("shared-input", qkv, ROWS, "jetson-thor"),
    Form("operator-unknown", lambda d: d.op("Rellu", "x"), build=""),
    Form("operator-unsupported", qlinear, build="fails"),
    *(Form("operator-form", make, build="fails") for make in REFUSED_FORMS),
    Form("operator-doubtful", lambda d: d.op("RMSNormalization", d.relu(), d.half(16)), target="jetson-thor", opset=23),
    Form("operator-unsupported", lambda d: d.op("RMSNormalization", d.relu(), d.half(16)), target="jetson-agx-orin",
         opset=23),
    Form("operator-foreign", nbits, ROWS, build="fails"),
    *(Form("operator-foreign", lambda d, op=op: microsoft(d, op), ROWS, build="fails") for op in UNARY_REFUSED),
    Form("operator-plugin", lambda d: d.op("Own", d.relu(), domain="org.someone"), ROWS, build="fails"),
    Form("operator-alike", lambda d: d.op("Relu", d.relu(), domain="org.someone"), ROWS),
    *(Form("operator-by-name", lambda d, op=op: microsoft(d, op), ROWS) for op in ("Gelu", "Trilu")),
    Form("operator-by-name", microsoft_pair, ROWS),
    Form("zero-point", lambda d: microsoft_pair(d, np.uint8(128)), ROWS, build="fails"),
    Form("operator-tensorrt", lambda d: mm(d, trt_pair(d, d.half(128, 128), "FP8")), ROWS, "rtx-ada"),
    Form("operator-tensorrt", lambda d: mm(d, trt_pair(d, d.half(128, 128), "FP8")), ROWS, "tensorrt-10"),
    Form("fp8-gpu", lambda d: mm(d, trt_pair(d, d.half(128, 128), "FP8")), ROWS, "rtx", build="fails"),
    Form("operator-plugin", fp4_dynamic, ROWS, "jetson-agx-orin", opset=23),
    Form("constant-type", lambda d: raw_codes(d, TensorProto.UINT4, 4), ROWS, build="fails"),
    Form("constant-type", lambda d: raw_codes(d, TensorProto.INT2, 2), ROWS, build="fails", opset=25),
    Form("uint8-codes", lambda d: raw_codes(d, TensorProto.UINT8, 8), ROWS, build="fails"),
    Form("int32-codes", int32_bias, build="fails"),
    Form("scalar-codes", scalar_int8, build="fails"),
    Form("uint8-zero-point", lambda d: d.op("Relu", act_with(d, d.scale(), d.const(np.asarray(np.uint8(0)))))),
    Form("uint8-by-default", lambda d: conv8(d, act_with(d, d.scale()))),
    Form("zero-point", lambda d: conv8(d, act_with(d, d.scale(), d.const(np.asarray(np.int8(3))))), build="fails"),
    Form("zero-point-computed", computed_zero, build="fails"),
    Form("scale-positive", lambda d: conv8(d, d.act(d.relu(), d.scale(0.0))), build="fails"),
    Form("scale-positive", lambda d: conv8(d, d.act(d.relu(), d.scale(-1.0))), build="fails"),
    Form("scale-finite", lambda d: conv8(d, d.act(d.relu(), d.scale(np.inf)))),
    Form("scale-constant", computed_scale, target="jetson-agx-orin"),
    Form("scale-type", wrong_scale_type, target="jetson-agx-orin"),
    Form("fp8-gpu", fp8, ROWS, build="fails"),
    Form("conv-unpacked", lambda d: fp8(d, True), target="rtx-ada", build="unpacked"),
    Form("fp4-gpu", fp4, ROWS, build="fails", opset=23),
    Form("fp4-onnxruntime", fp4, ROWS, "onnxruntime-cpu", opset=23),
    Form("int4-gpu", lambda d: mm(d, d.int4(128, 128)), ROWS, "rtx-turing", "fails"),
    Form("int4-reader", int4_cast, ROWS, build="fails"),
    Form("int4-odd", lambda d: mm(d, d.int4(27, 45, block=27)), (16, 27), build="fails"),
    Form("int4-odd", lambda d: mm(d, d.int4(64, 45, block=32)), (16, 64), "tensorrt-10"),
    Form("opset", lambda d: d.relu(), target="jetson-agx-orin", opset=22),
    Form("group-norm", norm, target="jetson-agx-orin"),
    Form("group-norm-one-group", lambda d: norm(d, 1), target="tensorrt-11"),
    Form("float32", float32_conv, dtype=TensorProto.FLOAT),
    Form("dynamic-inputs", lambda d: d.relu(), batch="batch"),
    Form("node-names", unnamed),
    Form("onnxruntime-accuracy", lambda d: mm(d, d.int8(128, 128, axis=1)), ROWS, "onnxruntime-cpu"),
]  # fmt: skip

# What TENSORRT.md's table and docs/engine-forms.md call good, per target.
GOOD = [
    Form("", lambda d: d.conv(d.relu(), d.half(*W8))),
    Form("", lambda d: conv8(d, d.act(d.relu()))),
    Form("", lambda d: conv8(d, d.act(d.relu()), 64, 2, 3, 3, group=32)),
    Form("", lambda d: mm8(d, d.int8(128, 128, axis=1)), ROWS),
    Form("", lambda d: mm(d, d.int8(128, 128, axis=1)), ROWS),
    Form("", lambda d: mm(d, d.int4(128, 128)), ROWS),
    Form("", lambda d: d.op("Gemm", d.relu(), d.int4(128, 128, axis=1), transB=1), (128,)),
    Form("", lambda d: mm(d, d.op("Transpose", d.int4(128, 128, axis=1), perm=[1, 0])), ROWS),
    Form("", lambda d: mm8(d, d.int4(128, 128, block=None, axis=1)), ROWS),
    Form("", lambda d: gather_branch(d, False), ROWS),
    Form("", lambda d: conv8(d, d.act(d.resize(d.relu())))),
    Form("", lambda d: conv8(d, d.act(d.op("Mul", d.relu(), d.half(64, 1, 1))))),
    Form("", norm),
    Form("", lambda d: conv8(d, d.act(d.relu())), target="jetson-agx-orin"),
    Form("", lambda d: mm(d, d.int4(128, 128)), ROWS, "jetson-agx-orin"),
    Form("", lambda d: mm8(d, d.int8(128, 128, axis=1)), ROWS, "tensorrt-11"),
    Form("", fp8, ROWS, "rtx-ada"),
    Form("", lambda d: d.conv(act8(d, d.relu()), w8f8(d, 64, 64, 4, 8), pad=3), target="rtx-ada"),
    Form(
        "", lambda d: d.op("MatMul", act8(d, d.relu()), w8f8(d, 128, 128, axis=1)), ROWS, "rtx-ada"
    ),
    Form("", lambda d: conv8(d, d.act(d.relu())), target="onnxruntime-cpu"),
]


def model_of(form: Form) -> Any:
    d = Draft(*form.shape, opset=form.opset, dtype=form.dtype)
    d.batch = form.batch
    return d.model(form.make(d))
