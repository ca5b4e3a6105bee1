"""Rules on operators, types, scales and zero points: what a parser accepts at all."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
from onnx import TensorProto

from mpq_deploy.check.graph_view import Node
from mpq_deploy.check.rule import (
    TENSORRT,
    Context,
    Match,
    Rule,
    Verdict,
    built_here,
    documented,
)
from mpq_deploy.graph.dialects import FP4
from mpq_deploy.graph.layers import STANDARD_DOMAINS
from mpq_deploy.models.spec import Array

QDQ = ("QuantizeLinear", "DequantizeLinear")
# Data sheets and builds: FP8 from SM89 on; FP4 was built for SM120 only, and is documented from
# SM100 on.
FP8_FROM, FP4_FROM, INT4_FROM = 89, 100, 80
MICROSOFT = "com.microsoft"
# Operators of ONNX Runtime as TensorRT-RTX 1.7.1 was given them, one form each: it refuses the
# first (MultiHeadAttention ends its process) and builds the second.
FOREIGN_REFUSED = frozenset({
    "Attention", "BiasAdd", "BiasGelu", "BiasSplitGelu", "FastGelu", "FusedConv", "FusedGemm",
    "FusedMatMul", "GroupNorm", "MatMulNBits", "MultiHeadAttention", "NhwcConv", "QLinearAdd",
    "QuickGelu", "SkipGroupNorm", "SkipLayerNormalization",
})  # fmt: skip
FOREIGN_BUILT = frozenset({
    "DequantizeLinear", "Gelu", "LayerNormalization", "QuantizeLinear",
    "SimplifiedLayerNormalization", "Trilu",
})  # fmt: skip
# Names that the parser knows and ONNX does not.
PARSER_ALONE = frozenset({"GroupQueryAttention", "SimplifiedLayerNormalization"})
TRT_OPERATORS = frozenset({
    "TRT_FP8QuantizeLinear", "TRT_FP8DequantizeLinear", "TRT_INT4QuantizeLinear",
    "TRT_INT4DequantizeLinear", "TRT_FP4DynamicQuantize", "TRT_MXFP8DynamicQuantize",
    "TRT_MXFP8DequantizeLinear",
})  # fmt: skip
# Attributes with the values that the parser takes, the default first, as TensorRT-RTX 1.7.1 says;
# operators of which it takes the first output alone; those that it has no plugin for.
PARSED_FORMS: dict[str, dict[str, tuple[int | float | str, ...]]] = {
    "Attention": {"softcap": (0.0,)},
    "AveragePool": {"dilations": (1,)},
    "BatchNormalization": {"training_mode": (0,)},
    "MaxPool": {"dilations": (1,)},
    "Resize": {
        "antialias": (0,),
        "coordinate_transformation_mode": (
            *("half_pixel", "pytorch_half_pixel", "asymmetric", "align_corners"),
            *("tf_half_pixel_for_nn",),
        ),
        "keep_aspect_ratio_policy": ("stretch",),
    },
    "ScatterElements": {"reduction": ("none",)},
    "ScatterND": {"reduction": ("none",)},
}
ONE_OUTPUT = ("LayerNormalization", "MaxPool")
NO_CAST = (TensorProto.INT16, TensorProto.UINT16, TensorProto.UINT32, TensorProto.UINT64)
BY_PLUGIN = ("NonZero", "RoiAlign")
INSTEAD = {
    "BitShift": "store 4-bit codes as an INT4 constant under a DequantizeLinear",
    "BitwiseAnd": "store 4-bit codes as an INT4 constant under a DequantizeLinear",
    "DynamicQuantizeLinear": "use fixed scales from calibration: QuantizeLinear and DequantizeLinear",
    **dict.fromkeys(
        ("QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger"),
        "export in the Q/DQ format",
    ),
}


def unsupported_operator(context: Context) -> Iterator[Match]:
    """Operators that the parser does not have."""
    for node in context.view.nodes_of(*context.dialect.unsupported):
        instead = f": {INSTEAD[node.op]}" if node.op in INSTEAD else ""
        yield Match(node, f"the parser has no {node.op}{instead}")


def unsupported_form(context: Context) -> Iterator[Match]:
    """Forms of operators that the parser refuses, although it has the operator."""
    for node in context.view.nodes_of(*PARSED_FORMS):
        for name, taken in PARSED_FORMS[node.op].items():
            given = node.get(name, taken[0])
            given = given.decode() if isinstance(given, bytes) else given
            if not set(given if isinstance(given, list) else [given]) <= set(taken):
                yield Match(node, f"the parser takes no {node.op} with {name} {given}")
    for node in context.view.nodes_of(*ONE_OUTPUT):
        if any(node.outputs[1:]):
            yield Match(node, f"the parser takes no {node.op} with further outputs")
    for node in context.view.nodes_of("Cast"):
        if node.get("to") in NO_CAST:
            kind = TensorProto.DataType.Name(node.get("to"))
            yield Match(node, f"the parser takes no Cast to {kind}")
    for node in () if context.dialect.proper else context.view.nodes_of(*BY_PLUGIN):
        yield Match(node, f"the parser needs a plugin for {node.op}, which this runtime lacks")


def doubtful_operator(context: Context) -> Iterator[Match]:
    """Operators that no source lists for this release."""
    for node in context.view.nodes_of(*context.dialect.doubtful):
        yield Match(node, f"no source says that this release's parser supports {node.op}")


def unknown_operator(context: Context) -> Iterator[Match]:
    """Operators unknown to ONNX at the model's opset: a misspelling, or a wrong opset."""
    opset = context.view.opset
    for node in context.view.nodes:
        known = onnx.defs.has(node.op, max_inclusive_version=opset)
        if node.domain in STANDARD_DOMAINS and not known:
            yield Match(node, f"ONNX has no operator {node.op} at opset {opset}")


def foreign_operator(context: Context) -> Iterator[Match]:
    """Operators of ONNX Runtime that TensorRT-RTX refused when tried."""
    for node, name in _foreign(context):
        if node.domain == MICROSOFT and node.op in FOREIGN_REFUSED:
            yield Match(node, f"{name} is not an ONNX operator, and the parser does not support it")


def plugin_operator(context: Context) -> Iterator[Match]:
    """Untried operators of another domain, with names that no parser knows."""
    for node, name in _foreign(context):
        tried = node.domain == MICROSOFT and node.op in (*FOREIGN_REFUSED, *FOREIGN_BUILT)
        if not tried and not _own_of_tensorrt(node, context) and not _named_alike(node):
            yield Match(node, f"{name} is not an ONNX operator: it needs a plugin of that name")


def alike_operator(context: Context) -> Iterator[Match]:
    """Operators of another domain that share their name with one of the parser's own."""
    for node, name in _foreign(context):
        tried = node.domain == MICROSOFT and node.op in (*FOREIGN_REFUSED, *FOREIGN_BUILT)
        if not tried and _named_alike(node):
            yield Match(node, f"the parser ignores domains: it reads {name} as its own {node.op}")


def known_foreign_operator(context: Context) -> Iterator[Match]:
    """Operators of ONNX Runtime that TensorRT-RTX accepts: it ignores domains."""
    for node, name in _foreign(context):
        if node.domain == MICROSOFT and node.op in FOREIGN_BUILT:
            yield Match(node, f"the parser ignores domains: it reads {name} as its own {node.op}")


def tensorrt_operator(context: Context) -> Iterator[Match]:
    """TensorRT's own quantizers (trt::TRT_FP8QuantizeLinear and others), as modelopt writes them."""
    for node, name in _foreign(context):
        if _own_of_tensorrt(node, context):
            yield Match(node, f"only TensorRT has the operator {name}")


def _foreign(context: Context) -> Iterator[tuple[Node, str]]:
    """Yield the nodes of other domains with their qualified names."""
    for node in context.view.nodes:
        if node.domain not in STANDARD_DOMAINS:
            yield node, f"{node.domain}::{node.op}"


def _named_alike(node: Node) -> bool:
    return onnx.defs.has(node.op) or node.op in PARSER_ALONE


def _own_of_tensorrt(node: Node, context: Context) -> bool:
    """Whether a node is one of TensorRT's quantizers, which this release has."""
    new = node.op.startswith(("TRT_FP4", "TRT_MXFP8")) and FP4 not in context.dialect.types
    return node.domain == "trt" and node.op in TRT_OPERATORS and not new


def constant_type(context: Context) -> Iterator[Match]:
    """Constants of a type that the runtime does not have: UINT4, INT2, INT16, strings."""
    for constant in context.view.constants.values():
        if constant.dtype in context.dialect.types or not context.dialect.tensorrt:
            continue
        for node, _ in context.view.readers.get(constant.name, [])[:1]:
            yield Match(node, f"its constant '{constant.name}' is {constant.dtype}")


def uint8_codes(context: Context) -> Iterator[Match]:
    """DequantizeLinear of UINT8 codes that no QuantizeLinear makes (other rules check those)."""
    for node in context.view.nodes_of("DequantizeLinear"):
        producer = context.view.producer(node.input(0))
        quantized = producer is not None and producer.op == "QuantizeLinear"
        if context.view.dtype(node.input(0)) == "UINT8" and not quantized:
            yield Match(node, "it dequantizes UINT8")


def int32_codes(context: Context) -> Iterator[Match]:
    """DequantizeLinear of INT32 codes: biases as ONNX Runtime's quantizer writes them."""
    for node in context.view.nodes_of("DequantizeLinear"):
        if context.view.dtype(node.input(0)) == "INT32":
            yield Match(node, "it dequantizes INT32")


def scalar_codes(context: Context) -> Iterator[Match]:
    """DequantizeLinear of a scalar: the parser reshapes it, which crashes the builder."""
    for node in context.view.nodes_of("DequantizeLinear"):
        constant = context.view.constants.get(node.input(0))
        if constant is not None and constant.shape == ():
            yield Match(node, f"it dequantizes the single number '{constant.name}'")


def uint8_zero_point(context: Context) -> Iterator[Match]:
    """QuantizeLinear to UINT8, by its zero point."""
    for node in context.view.nodes_of("QuantizeLinear"):
        zero = context.view.constants.get(node.input(2))
        if zero is not None and zero.dtype == "UINT8" and not np.any(zero.array()):
            yield Match(
                node,
                "its zero point is UINT8: TensorRT quantizes to INT8 instead, and values clip at 127",
            )


def uint8_by_default(context: Context) -> Iterator[Match]:
    """QuantizeLinear without any output type: UINT8 in ONNX, INT8 in TensorRT."""
    for node in context.view.nodes_of("QuantizeLinear"):
        if not node.input(2) and not node.get("output_dtype"):
            yield Match(
                node, "it names no output type: the default is UINT8 in ONNX, INT8 in TensorRT"
            )


def zero_point_value(context: Context) -> Iterator[Match]:
    """A zero point other than 0."""
    for node in context.view.nodes_of(*QDQ):
        stored = context.view.stored(node.input(2)) if node.input(2) else None
        zero = stored.constant if stored else None
        if zero is not None and np.any(zero.array().astype(np.float32)):
            yield Match(node, "its zero point is not 0")


def computed_zero_point(context: Context) -> Iterator[Match]:
    """A zero point that is computed at run time."""
    for node in context.view.nodes_of(*QDQ):
        if node.input(2) and not context.view.static(node.input(2)):
            yield Match(node, "its zero point is computed at run time")


def scale_value(context: Context) -> Iterator[Match]:
    """A scale that is 0 or negative: the parser refuses it."""
    for node, values in _scales(context):
        if np.any(values <= 0):
            yield Match(node, f"its scale holds {float(values.min())}")


def scale_not_finite(context: Context) -> Iterator[Match]:
    """A scale that is infinite or NaN: the parser lets it pass."""
    for node, values in _scales(context):
        bad = values[~np.isfinite(values)]
        if bad.size:
            yield Match(node, f"its scale holds {float(bad.flat[0])}")


def computed_scale(context: Context) -> Iterator[Match]:
    """A scale that is computed from an input: this release wants a build-time constant."""
    if context.dialect.constant_scales:
        for node in context.view.nodes_of(*QDQ):
            if node.input(1) and not context.view.static(node.input(1)):
                yield Match(node, "its scale is computed at run time")


def scale_type(context: Context) -> Iterator[Match]:
    """QuantizeLinear of one float type with a scale of another."""
    for node in context.view.nodes_of("QuantizeLinear"):
        types = context.view.dtype(node.input(0)), context.view.dtype(node.input(1))
        if all(types) and types[0] != types[1]:
            yield Match(node, f"it quantizes {types[0]} with a scale of {types[1]}")


def fp8_on_old_gpu(context: Context) -> Iterator[Match]:
    """FP8 for a GPU without it."""
    yield from _needs_gpu(context, "FLOAT8", FP8_FROM, "FP8")


def fp4_on_old_gpu(context: Context) -> Iterator[Match]:
    """FP4 for a GPU without it."""
    yield from _needs_gpu(context, FP4, FP4_FROM, "FP4")


def int4_on_old_gpu(context: Context) -> Iterator[Match]:
    """INT4 for Turing."""
    yield from _needs_gpu(context, "INT4", INT4_FROM, "INT4")


def fp4_in_onnxruntime(context: Context) -> Iterator[Match]:
    """DequantizeLinear of FP4, which ONNX Runtime does not implement."""
    for node in context.view.nodes_of("DequantizeLinear"):
        if context.view.dtype(node.input(0)) == FP4:
            yield Match(node, "it dequantizes FP4")


def int4_reader(context: Context) -> Iterator[Match]:
    """An INT4 constant read by anything but a DequantizeLinear or an operator that only moves it."""
    moves = ("Concat", "Reshape", "Transpose", "Identity", "Shape", "Squeeze", "Unsqueeze")
    for name, constant in context.view.constants.items():
        for node, _ in context.view.readers.get(name, []) if constant.dtype == "INT4" else []:
            if node.op not in ("DequantizeLinear", *moves):
                yield Match(node, f"{node.op} reads the INT4 constant '{name}'")


def odd_int4(context: Context) -> Iterator[Match]:
    """INT4 with an odd number of elements, or for TensorRT itself an odd last dimension."""
    for node in context.view.nodes_of("DequantizeLinear"):
        constant = context.view.constants.get(node.input(0))
        if constant is None or constant.dtype != "INT4":
            continue
        what = f"'{constant.name}' {list(constant.shape)}"
        if constant.elements % 2:
            yield Match(node, f"{what} has an odd number of INT4 elements")
        elif constant.shape[-1] % 2 and not context.dialect.odd_rows:
            yield Match(node, f"the last dimension of the INT4 constant {what} is odd")


def _needs_gpu(context: Context, prefix: str, first: int, name: str) -> Iterator[Match]:
    oldest = context.oldest
    if oldest is None or oldest >= first:
        return
    for node in context.view.nodes:
        quantized = node.outputs[0] if node.op == "QuantizeLinear" else node.input(0)
        standard = node.standard and node.op in QDQ
        if (standard and context.view.dtype(quantized).startswith(prefix)) or (
            node.domain == "trt" and node.op.startswith(f"TRT_{name}")
        ):
            yield Match(
                node, f"it uses {name}, which needs SM{first} or newer; the target has SM{oldest}"
            )


def _scales(context: Context) -> Iterator[tuple[Node, Array]]:
    seen: set[str] = set()
    for node in context.view.nodes_of(*QDQ):
        scale = context.view.scale(node)
        # A Q/DQ pair has one scale: its first reader is named.
        if scale is not None and scale.name not in seen:
            seen.add(scale.name)
            yield node, scale.array().astype(np.float64)


KEEP_FLOAT = "leave the layer in FP16, or use another precision"
SYMMETRIC = "quantize symmetrically to INT8 with zero point 0 (leave the zero point of INT4 out)"

TYPE_RULES = (
    Rule("operator-unknown", unknown_operator,
         "export again with the opset that has it, or correct its name",
         {**documented("refused"), "onnxruntime": Verdict("refused", "documented")}),
    Rule("operator-unsupported", unsupported_operator,
         "replace it with operators that the parser supports", built_here("refused", "documented")),
    Rule("operator-form", unsupported_form,
         "export the model with a form that the parser takes, or compute it outside of the model",
         built_here("refused")),
    Rule("operator-doubtful", doubtful_operator,
         "export with opset 20, which decomposes it, or try it on the device",
         {**documented("doubtful", "trt-10.13"), "trt-11": Verdict("doubtful", "unproven")}),
    Rule("operator-foreign", foreign_operator,
         "export to plain ONNX operators (for MatMulNBits: an INT4 constant, DequantizeLinear and "
         "MatMul)", built_here("refused", "documented")),
    Rule("operator-plugin", plugin_operator,
         "export to plain ONNX operators, or load the plugin when the engine is built and run",
         {**documented("refused"), "trt-rtx": Verdict("refused", "unproven")}),
    Rule("operator-alike", alike_operator,
         "export to plain ONNX operators: the two may differ in inputs, layout or result",
         {name: Verdict("doubtful", "unproven") for name in TENSORRT}),
    Rule("operator-by-name", known_foreign_operator,
         "no change needed; plain ONNX operators would also run elsewhere", built_here("note")),
    Rule("operator-tensorrt", tensorrt_operator,
         "no change needed for TensorRT; other runtimes need QuantizeLinear and DequantizeLinear",
         built_here("note", "documented")),
    Rule("constant-type", constant_type,
         "store codes as INT8 or INT4 (signed), indices as INT32 or INT64, numbers as FP16 or FP32",
         built_here("refused", "documented")),
    Rule("uint8-codes", uint8_codes, SYMMETRIC, built_here("refused", "documented")),
    Rule("int32-codes", int32_codes,
         "leave biases in float (onnxruntime's quantize_static: extra_options QuantizeBias False)",
         built_here("refused", "documented")),
    Rule("scalar-codes", scalar_codes,
         "leave single numbers in float (quantize only Conv, Gemm and MatMul)",
         built_here("refused")),
    Rule("uint8-zero-point", uint8_zero_point, SYMMETRIC, documented("wrong")),
    Rule("uint8-by-default", uint8_by_default,
         "set output_dtype to INT8 (opset 21) or give an INT8 zero point of 0",
         {**documented("doubtful"), "trt-rtx": Verdict("doubtful", "built here")}),
    Rule("zero-point", zero_point_value, SYMMETRIC, built_here("refused", "documented")),
    Rule("zero-point-computed", computed_zero_point, SYMMETRIC,
         built_here("refused", "documented")),
    Rule("scale-positive", scale_value, "calibrate again: every scale must be above 0",
         built_here("refused", "documented")),
    Rule("scale-finite", scale_not_finite, "calibrate again: every scale must be finite",
         {**built_here("wrong", "documented"), "onnxruntime": Verdict("wrong", "documented")}),
    Rule("scale-constant", computed_scale, "use a constant scale from calibration",
         documented("refused", "trt-10.3")),
    Rule("scale-type", scale_type,
         "give the scale the type of its tensor (FP16 in an FP16 graph)",
         {**documented("refused", "trt-10.3"), **documented("doubtful", "trt-10.13", "trt-11")}),
    Rule("fp8-gpu", fp8_on_old_gpu, KEEP_FLOAT, built_here("refused", "documented")),
    Rule("fp4-gpu", fp4_on_old_gpu, KEEP_FLOAT, built_here("refused", "documented")),
    Rule("int4-gpu", int4_on_old_gpu, "use INT8 weights on this GPU (scheme w8a16 or w8a8)",
         built_here("refused", "documented")),
    Rule("fp4-onnxruntime", fp4_in_onnxruntime, KEEP_FLOAT,
         {"onnxruntime": Verdict("refused", "built here")}),
    Rule("int4-reader", int4_reader,
         "dequantize INT4 with DequantizeLinear (to requantize: QuantizeLinear after it)",
         built_here("refused")),
    Rule("int4-odd", odd_int4, "use INT8 for this weight, or leave it in FP16",
         built_here("refused", "documented")),
)  # fmt: skip
