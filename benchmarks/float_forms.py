"""The forms of FP8 and FP4 for ``engine_forms.py``, each with the GPUs that it is built for.

Run: ``python benchmarks/float_forms.py [--only TEXT]`` prints the rows of that table alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import ml_dtypes
import numpy as np
from onnx import TensorProto, helper

from benchmarks.engine_forms import Draft, attend, build

E4M3 = ml_dtypes.float8_e4m3fn
ADA, BLACKWELL, BOTH = ("SM89",), ("SM120",), ("SM89", "SM120")
IMAGE, ROWS, VECTOR = (64, 16, 16), (16, 128), (128,)


@dataclass(frozen=True)
class FloatForm:
    """One graph; ``shape`` of its input x without batch, the opset, and the GPUs of one engine."""

    name: str
    make: Callable[[Draft], str]
    shape: tuple[int, ...] = IMAGE
    sm: tuple[str, ...] = BOTH
    opset: int = 21


def act(d: Draft, x: str) -> str:
    """E4M3 Q and DQ by one scale of rank 0."""
    s = d.scale()
    return d.op("DequantizeLinear", d.op("QuantizeLinear", x, s, output_dtype=17), s)


def weight(d: Draft, *shape: int, axis: int = 0, channels: bool = True) -> str:
    """An E4M3 weight with one scale per channel of ``axis``, or one for all."""
    codes = d.const(d.rng.standard_normal(shape).astype(E4M3), "w")
    if not channels:
        return d.op("DequantizeLinear", codes, d.scale(0.01))
    return d.op("DequantizeLinear", codes, d.scale(0.01, (shape[axis],)), axis=axis)


def requantized(d: Draft, w: str, channels: int, axis: int) -> str:
    """E4M3 Q and DQ per channel of a weight that was dequantized from INT4."""
    s = d.scale(0.003, (channels,))
    q = d.op("QuantizeLinear", w, s, axis=axis, output_dtype=17)
    return d.op("DequantizeLinear", q, s, axis=axis)


def conv(
    *kernel: int, o: int = 64, i: int = 64, group: int = 1, alone: bool = False
) -> Callable[[Draft], str]:
    """An FP8 convolution; ``alone``: of the weight alone."""

    def form(d: Draft) -> str:
        x = d.op("Relu", "x")
        pads = [size // 2 for size in kernel] * 2
        x = x if alone else act(d, x)
        return d.op("Conv", x, weight(d, o, i // group, *kernel), pads=pads, group=group)

    return form


def conv4(d: Draft) -> str:
    w = requantized(d, d.reshape(d.int4((64, 576), 64, 1), 64, 64, 3, 3), 64, 0)
    return d.op("Conv", act(d, d.op("Relu", "x")), w, pads=[1] * 4)


def product(
    k: int = 128, n: int = 128, alone: bool = False, channels: bool = True
) -> Callable[[Draft], str]:
    """An FP8 product; ``alone``: of the weight alone."""

    def form(d: Draft) -> str:
        x = d.op("Relu", "x")
        w = weight(d, k, n, axis=1, channels=channels)
        return d.op("MatMul", x if alone else act(d, x), w)

    return form


def product4(d: Draft) -> str:
    return d.op(
        "MatMul", act(d, d.op("Relu", "x")), requantized(d, d.int4((128, 128), 64, 0), 128, 1)
    )


def product4_straight(d: Draft) -> str:
    return d.op("MatMul", act(d, d.op("Relu", "x")), d.int4((128, 128), 64, 0))


def trt_pair(d: Draft, x: str) -> str:
    s = d.scale()
    q = d.op("TRT_FP8QuantizeLinear", x, s, domain="trt")
    return d.op("TRT_FP8DequantizeLinear", q, s, domain="trt")


def trt_product(d: Draft) -> str:
    return d.op("MatMul", trt_pair(d, d.op("Relu", "x")), weight(d, 128, 128, axis=1))


def microsoft_product(d: Draft) -> str:
    s, zero = d.scale(), d.const(np.asarray(np.int8(0)))
    q = d.op("QuantizeLinear", d.op("Relu", "x"), s, zero, domain="com.microsoft")
    x = d.op("DequantizeLinear", q, s, zero, domain="com.microsoft")
    return d.op("MatMul", x, d.int8((128, 128), 1))


def microsoft_gelu(d: Draft) -> str:
    x = d.op("Gelu", d.op("Relu", "x"), domain="com.microsoft")
    return d.op("MatMul", x, d.const(d.rng.standard_normal((128, 128)).astype(np.float16)))


def dynamic(d: Draft, kind: str, *inputs: str, **attributes: object) -> tuple[str, str]:
    """Codes and block scales of the input, by TensorRT's own operator."""
    names = [d.name("codes"), d.name("scales")]
    op = f"TRT_{kind}DynamicQuantize"
    d.nodes.append(
        helper.make_node(
            op,
            list(inputs),
            names,
            name=d.name("node.dynamic"),
            domain="trt",
            axis=-1,
            **attributes,
        )
    )
    return names[0], names[1]


def fp4(d: Draft, k: int, n: int, axis: int = 0) -> str:
    """E2M1 in blocks of 16 with E4M3 scales under one scalar."""
    shape = (k, n) if axis == 0 else (n, k)
    blocks = (k // 16, n) if axis == 0 else (n, k // 16)
    raw = d.rng.integers(0, 256, k * n // 2).astype(np.uint8).tobytes()
    tensor = helper.make_tensor(d.name("w"), TensorProto.FLOAT4E2M1, shape, raw, raw=True)
    d.constants.append(tensor)
    scales = d.const((d.rng.random(blocks) * 100 + 1).astype(E4M3), "scales")
    step = d.op("DequantizeLinear", scales, d.scale(0.001))
    return d.op("DequantizeLinear", tensor.name, step, axis=axis, block_size=16)


def nvfp4(k: int = 128, n: int = 128, axis: int = 0) -> Callable[[Draft], str]:
    """W4A4: axis 0 for a MatMul of [K, N], axis 1 for a Gemm of [N, K]."""

    def form(d: Draft) -> str:
        s = d.scale(0.01)
        codes, scales = dynamic(d, "FP4", d.op("Relu", "x"), s, block_size=16, scale_type=17)
        step = d.op("DequantizeLinear", scales, s)
        x = d.op("DequantizeLinear", codes, step, axis=-1, block_size=16)
        if axis == 0:
            return d.op("MatMul", x, fp4(d, k, n))
        return d.op("Gemm", x, fp4(d, k, n, 1), transB=1)

    return form


def fp4_alone(d: Draft) -> str:
    return d.op("MatMul", d.op("Relu", "x"), fp4(d, 128, 128))


def mxfp8(d: Draft) -> str:
    codes, scales = dynamic(d, "MXFP8", d.op("Relu", "x"), block_size=32)
    more = {"domain": "trt", "block_size": 32}
    x = d.op("TRT_MXFP8DequantizeLinear", codes, scales, axis=-1, **more)
    w = d.const(d.rng.standard_normal((128, 128)).astype(E4M3), "w")
    steps = d.const(np.full((4, 128), 127, np.uint8), "scales")
    return d.op("MatMul", x, d.op("TRT_MXFP8DequantizeLinear", w, steps, axis=0, **more))


def attention(d: Draft) -> str:
    x = d.op("Relu", "x")
    weights = [
        d.const((d.rng.standard_normal((128, 128)) * 0.05).astype(np.float16)) for _ in "qkv"
    ]
    q, k, v = (act(d, d.op("MatMul", x, w)) for w in weights)
    scores = d.op("MatMul", q, d.op("Transpose", k, perm=[0, 2, 1]))
    return d.op("MatMul", act(d, d.op("Softmax", scores, axis=-1)), v)


def three_of_one_input(d: Draft) -> str:
    x = act(d, d.op("Relu", "x"))
    q, k, v = (d.op("MatMul", x, weight(d, 128, 128, axis=1)) for _ in "qkv")
    return attend(d, q, k, v)


def attention_of_heads(d: Draft) -> str:
    x = d.op("Relu", "x")
    q, k, v = (
        d.op("MatMul", x, d.const((d.rng.standard_normal((128, 128)) * 0.05).astype(np.float16)))
        for _ in "qkv"
    )
    return attend(d, q, k, v, act)


FORMS = (
    FloatForm("conv f8a8", conv(3, 3)),
    FloatForm("conv f8a8, for SM80 too", conv(3, 3), sm=("SM80", "SM89")),
    FloatForm("conv f8a8 1x1", conv(1, 1)),
    FloatForm("conv f8a8 3 -> 64", conv(3, 3, i=3), (3, 16, 16)),
    FloatForm("conv f8a8 64 -> 3", conv(3, 3, o=3)),
    FloatForm("conv f8a8 groups=2", conv(3, 3, group=2)),
    FloatForm("conv f8a8 depthwise", conv(3, 3, group=64)),
    FloatForm("conv f8a8 4x8 (32 positions)", conv(4, 8)),
    FloatForm("conv f8a8 3x11 (33)", conv(3, 11)),
    FloatForm("conv f8a8 7x7", conv(7, 7)),
    FloatForm("conv f8a8 1-D", conv(3), (64, 32)),
    FloatForm("conv f8a8 3-D", conv(3, 3, 3, i=32), (32, 8, 8, 8)),
    FloatForm("conv f8a8 3-D 3x3x4 (36)", conv(3, 3, 4, i=32), (32, 8, 8, 8)),
    FloatForm("conv f8a16", conv(3, 3, alone=True)),
    FloatForm("conv w4f8 b64", conv4),
    FloatForm("matmul f8a8", product(), ROWS),
    FloatForm("matmul f8a8, one scale for all channels", product(channels=False), ROWS),
    FloatForm("matmul f8a8 K=27 N=45", product(27, 45), (16, 27)),
    FloatForm("matmul f8a16", product(alone=True), ROWS),
    FloatForm("matmul f8a16 K=27 N=45", product(27, 45, alone=True), (16, 27)),
    FloatForm("matmul w4f8 b64", product4, ROWS),
    FloatForm("matmul, INT4 blocks straight to an FP8 activation", product4_straight, ROWS),
    FloatForm("matmul, activation by trt::TRT_FP8QuantizeLinear", trt_product, ROWS),
    FloatForm("matmul w8a8, Q/DQ of com.microsoft", microsoft_product, ROWS, ("SM86",)),
    FloatForm("Gelu of com.microsoft", microsoft_gelu, ROWS, ("SM86",)),
    FloatForm("matmul nvfp4", nvfp4(), ROWS, BLACKWELL, 23),
    FloatForm("matmul nvfp4, for SM89 too", nvfp4(), ROWS, BOTH, 23),
    FloatForm("matmul nvfp4 2-D x", nvfp4(), VECTOR, BLACKWELL, 23),
    FloatForm("matmul nvfp4 4-D x", nvfp4(), (2, 16, 128), BLACKWELL, 23),
    FloatForm("matmul nvfp4 K=48 N=10", nvfp4(48, 10), (16, 48), BLACKWELL, 23),
    FloatForm("gemm nvfp4 transB=1", nvfp4(128, 96, 1), VECTOR, BLACKWELL, 23),
    FloatForm("matmul, FP4 weights alone", fp4_alone, ROWS, BLACKWELL, 23),
    FloatForm("matmul mxfp8, scales in UINT8", mxfp8, ROWS, BLACKWELL, 23),
    FloatForm("q, k, v f8a8, attention", three_of_one_input, ROWS),
    FloatForm("q, k, v f8a8, attention", three_of_one_input, ROWS, ADA),
    FloatForm("q, k, v f8a8, attention", three_of_one_input, ROWS, BLACKWELL),
    FloatForm("attention, q, k, v and probabilities in FP8", attention, ROWS),
    FloatForm("the same in four heads, of 256 tokens", attention_of_heads, (256, 128)),
)


def rows(only: str = "") -> list[str]:
    """Build the forms and return the rows of their table; print each as it comes."""
    found = []
    for form in FORMS:
        if only in form.name:
            draft = Draft(*form.shape, opset=form.opset)
            row = build(draft.model(form.make(draft)), form.shape, form.sm)
            how = row["how"].replace("|", "/")
            gpus = ", ".join(form.sm)
            found.append(f"| {form.name} | {gpus} | {row['builds']} | {row['bytes']} | {how} |")
            print(found[-1], flush=True)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="only forms whose name contains this")
    rows(parser.parse_args().only)
