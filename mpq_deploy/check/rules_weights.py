"""Rules on weights: which forms stay packed, and which fail, fall back or unpack at each call."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from onnx import TensorProto

from mpq_deploy.check.graph_view import Constant, LayerView, Node, Stored, View
from mpq_deploy.check.rule import Context, Match, Rule, built_here, documented

# The largest matrix that is read to see whether it only picks channels.
ONE_HOT_ELEMENTS = 1 << 22
HALVES = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
UNPACKED = "is unpacked in full at each call"


def left_blocks(context: Context) -> Iterator[Match]:
    """A product whose left operand is an INT4 weight in blocks."""
    for layer in context.view.layers:
        if layer.product and layer.side == 0 and _int4(layer.weight) and _blocked(layer.weight):
            yield Match(
                layer.node,
                "its left operand is an INT4 weight in blocks: TensorRT-RTX's builder crashes",
            )


def left_channels(context: Context) -> Iterator[Match]:
    """A product whose left operand is an INT4 weight with one scale per channel."""
    for layer in context.view.layers:
        if layer.product and layer.side == 0 and _int4(layer.weight) and not _blocked(layer.weight):
            yield Match(layer.node, f"its left operand is an INT4 weight, which {UNPACKED}")


def shared_blocks(context: Context) -> Iterator[Match]:
    """One INT4 weight in blocks that feeds several products."""
    users: dict[str, list[Node]] = {}
    for layer in context.view.layers:
        constant = layer.weight.constant
        if layer.product and constant and _int4(layer.weight) and _blocked(layer.weight):
            users.setdefault(constant.name, []).append(layer.node)
    for name, nodes in users.items():
        if len(nodes) > 1:
            labels = ", ".join(node.label for node in nodes)
            yield Match(
                nodes[0], f"{labels} share the INT4 weight '{name}': TensorRT-RTX's builder crashes"
            )


def block_axis(context: Context) -> Iterator[Match]:
    """Blocks along an axis that is neither the last nor the second to last."""
    for node, constant in _block_codes(context.view):
        rank = len(constant.shape)
        if int(node.get("axis", 1)) % rank < rank - 2:
            axis = node.get("axis", 1)
            yield Match(node, f"its blocks run along axis {axis} of {list(constant.shape)}")


def block_rank(context: Context) -> Iterator[Match]:
    """Blocks in a weight that is not a matrix, or of a type that cannot have blocks in this release."""
    rank = context.dialect.block_rank
    for node, constant in _block_codes(context.view):
        if rank is not None and len(constant.shape) != rank:
            shape = list(constant.shape)
            yield Match(
                node, f"it has blocks in a weight of shape {shape}: only matrices may have them"
            )
        elif constant.dtype not in context.dialect.block_types:
            types = ", ".join(sorted(context.dialect.block_types))
            yield Match(node, f"it has blocks of {constant.dtype}: only {types} may have them")


def ragged_blocks(context: Context) -> Iterator[Match]:
    """Blocks that do not divide the axis: the parser infers another block size from the scale."""
    for node, constant in _block_codes(context.view):
        axis = int(node.get("axis", 1)) % len(constant.shape)
        scale, size = context.view.scale(node), int(node.get("block_size", 0))
        elements, count = constant.shape[axis], scale.shape[axis] if scale and scale.shape else 0
        if count and size * count != elements:
            yield Match(
                node,
                f"{elements} elements in blocks of {size} have {count} scales, from which the parser "
                f"infers blocks of {elements // count}",
            )


def w4a8_product(context: Context) -> Iterator[Match]:
    """A product of an INT8 or FP8 activation with an INT4 weight in blocks."""
    for layer in _w4a8(context, product=True):
        if _blocked(layer.weight):
            yield Match(layer.node, "it multiplies an 8-bit activation by an INT4 weight in blocks")


def w4a8_conv(context: Context) -> Iterator[Match]:
    """A convolution of an INT8 activation with an INT4 weight of four dimensions."""
    for layer in _w4a8(context, product=False):
        if not _reshaped(layer.weight):
            yield Match(layer.node, "it convolves an INT8 activation with an INT4 weight")


def w4a8_conv_reshaped(context: Context) -> Iterator[Match]:
    """The same with the weight as a matrix: it builds, and computes in FP16."""
    for layer in _w4a8(context, product=False):
        if _reshaped(layer.weight):
            yield Match(
                layer.node,
                "it convolves an INT8 activation with an INT4 weight: computed in FP16",
            )


def same_scales(context: Context) -> Iterator[Match]:
    """An INT4 weight that is quantized to INT8 with the scales it was dequantized with."""
    for layer in context.view.layers:
        path = layer.weight.path
        if not _int4(layer.weight) or len(path) < 3 or path[1].op != "QuantizeLinear":
            continue
        first, second = (context.view.scale(node) for node in path[:2])
        if first and second and np.array_equal(first.array(), second.array()):
            yield Match(
                path[1], "it quantizes to INT8 with the scales of the INT4 weight before it"
            )


def requantized(context: Context) -> Iterator[Match]:
    """4-bit storage with INT8 compute, where that is unproven."""
    if not context.dialect.requantized:
        for layer in context.view.layers:
            if layer.weight.quantized and layer.weight.requantized:
                yield Match(
                    layer.node, f"its {layer.weight.dtype} weight is quantized again at run time"
                )


def conv_reshaped(context: Context) -> Iterator[Match]:
    """An INT4 convolution whose weight is a reshaped matrix, on targets where that is unproven."""
    if not context.dialect.int4_conv:
        for layer in context.view.layers:
            if layer.node.op == "Conv" and _int4(layer.weight) and not layer.weight.requantized:
                yield Match(
                    layer.node,
                    "its weight is INT4: no TensorRT documents INT4 convolutions",
                )


def int8_weight_only(context: Context) -> Iterator[Match]:
    """INT8 weights with an FP16 activation, where it is unproven that they stay INT8."""
    if not context.dialect.int8_weights_only:
        for layer in context.view.layers:
            if layer.weight_only and layer.weight.dtype == "INT8":
                yield Match(
                    layer.node,
                    "its weight is INT8 and its activation is not: it may be stored as FP16",
                )


def int4_wide_scale(context: Context) -> Iterator[Match]:
    """An INT4 weight with FP32 scales and an FP16 result by the output_dtype attribute."""
    for layer in context.view.layers:
        dq = layer.weight.dq
        if dq is None or not _int4(layer.weight):
            continue
        if context.view.dtype(dq.input(1)) == "FLOAT" and dq.get("output_dtype") in HALVES:
            yield Match(dq, "it turns INT4 with FP32 scales into FP16 by output_dtype")


def int4_cast_after(context: Context) -> Iterator[Match]:
    """An INT4 weight with FP32 scales and a Cast to FP16: the product no longer takes it packed."""
    for layer in context.view.layers:
        dq, weight = layer.weight.dq, layer.weight
        if dq is None or not _int4(weight) or not layer.product or weight.requantized:
            continue
        cast = any(node.op == "Cast" for node in weight.path[1:])
        if cast and context.view.dtype(dq.input(1)) == "FLOAT":
            yield Match(layer.node, f"its INT4 weight has FP32 scales and a Cast: it {UNPACKED}")


def conv_unpacked(context: Context) -> Iterator[Match]:
    """A convolution by quantized weights alone: the whole weight is unpacked at each call."""
    for layer in context.view.layers:
        if not layer.product and layer.weight_only:
            yield Match(layer.node, f"its {layer.weight.dtype} weight {UNPACKED}")


def product_unpacked(context: Context) -> Iterator[Match]:
    """A product by quantized weights alone, in a form that is not fused into it."""
    for layer in context.view.layers:
        reason = _unfused(context.view, layer)
        if reason:
            yield Match(layer.node, f"its {layer.weight.dtype} weight {UNPACKED}: {reason}")


def requantized_each_call(context: Context) -> Iterator[Match]:
    """4-bit storage with INT8 or FP8 compute pays for converting the weight to 8 bits at each call."""
    weights = [layer.weight for layer in context.view.layers]
    count = sum(weight.quantized and weight.requantized for weight in weights)
    if count and context.dialect.requantized:
        yield Match(
            None,
            f"{count} layers convert their 4-bit weight to 8 bits at each call (bytes saved, not bandwidth)",
        )


def summed_weights(context: Context) -> Iterator[Match]:
    """A weight that is a sum of two dequantized ones."""
    for layer, node in _mixed(context, "Add", "Sub"):
        made = f"its weight is made by {node.label} ({node.op}) at each call"
        yield Match(layer.node, f"{made}, and no longer fused")


def joined_weights(context: Context) -> Iterator[Match]:
    """A weight that joins two quantized ones of different types: the builder fails."""
    for layer, node in _mixed(context, "Concat"):
        kinds = _quantized_kinds(context.view, node)
        if len(kinds) > 1 and "" not in kinds:
            parts = " and ".join(sorted(kinds))
            yield Match(layer.node, f"its weight is joined by {node.label} from {parts}")


def joined_with_float(context: Context) -> Iterator[Match]:
    """A weight that joins quantized and float parts: it is rebuilt at each call."""
    for layer, node in _mixed(context, "Concat"):
        kinds = _quantized_kinds(context.view, node)
        if kinds != {""} and (len(kinds) == 1 or "" in kinds):
            yield Match(layer.node, f"its weight is joined by {node.label} at each call")


def scattered_weights(context: Context) -> Iterator[Match]:
    """A weight into which outliers are scattered."""
    for layer, node in _mixed(context, "ScatterElements", "ScatterND", "Scatter"):
        yield Match(layer.node, f"its weight is rebuilt by {node.label} ({node.op}) at each call")


def multiplied_weights(context: Context) -> Iterator[Match]:
    """A weight that is a product of constants, which is computed at each call."""
    for layer, node in _mixed(context, "MatMul", "Gemm", "Mul", "Einsum"):
        yield Match(layer.node, f"its weight is computed by {node.label} ({node.op}) at each call")


def late_quantized(context: Context) -> Iterator[Match]:
    """A float weight behind a QuantizeLinear: quantized at build time, so the file is no smaller."""
    for layer in context.view.layers:
        path, constant = layer.weight.path, layer.weight.constant
        if not path or path[0].op != "QuantizeLinear" or constant is None:
            continue
        if constant.dtype.startswith(("FLOAT", "BFLOAT")):
            yield Match(
                layer.node,
                f"its weight is stored as {constant.dtype} and quantized during the build",
            )


def one_hot(context: Context) -> Iterator[Match]:
    """A product by a matrix that only picks channels: a Gather does that without multiplying."""
    for layer in context.view.layers:
        constant = layer.weight.constant
        plain = layer.node.op == "MatMul" and layer.side == 1 and not layer.weight.path
        if not plain or constant is None or constant.elements > ONE_HOT_ELEMENTS:
            continue
        if len(constant.shape) == 2 and constant.shape[1] < constant.shape[0]:
            array = constant.array().astype(np.float32)
            one_each = np.all(np.count_nonzero(array, axis=0) == 1)
            if one_each and np.all(array.max(axis=0) == 1):
                yield Match(
                    layer.node, f"it only picks {array.shape[1]} of {array.shape[0]} channels"
                )


def fp4_unpacked(context: Context) -> Iterator[Match]:
    """A product by FP4 weights alone."""
    for layer in context.view.layers:
        if layer.weight_only and layer.product and layer.weight.dtype.startswith("FLOAT4"):
            yield Match(layer.node, f"its FP4 weight {UNPACKED}")


def depthwise_int8(context: Context) -> Iterator[Match]:
    """A depthwise convolution in INT8."""
    for layer in context.view.layers:
        node, weight = layer.node, layer.weight
        if node.op != "Conv" or layer.pair is None or not weight.quantized or not weight.constant:
            continue
        shape = context.view.shape(node.inputs[1]) or weight.constant.shape
        if int(node.get("group", 1)) > 1 and len(shape) > 2 and shape[1] == 1:
            yield Match(
                node,
                "it is depthwise: INT8 pads each group to 4 channels or more (up to 280 times)",
            )


def transposed_int8(context: Context) -> Iterator[Match]:
    """A ConvTranspose with a quantized weight and activation."""
    for layer in context.view.layers:
        if layer.node.op == "ConvTranspose" and layer.weight.quantized and layer.pair is not None:
            yield Match(
                layer.node,
                "a quantized ConvTranspose runs in FP16 and unpacks its weight at each call",
            )


def weight_scale_rank(context: Context) -> Iterator[Match]:
    """A weight of several channels with one scale of shape [1]."""
    for layer in context.view.layers:
        dq, constant = layer.weight.dq, layer.weight.constant
        scale = context.view.scale(dq) if dq is not None else None
        if not layer.weight.quantized or not dq or not constant or not scale:
            continue
        if scale.shape == (1,) and constant.elements > 1 and not dq.get("block_size"):
            channels = constant.shape[int(dq.get("axis", 1)) % len(constant.shape)]
            if channels != 1:
                yield Match(dq, f"one scale of shape [1] for {channels} channels")


def _w4a8(context: Context, product: bool) -> Iterator[LayerView]:
    for layer in context.view.layers:
        weight = layer.weight
        if layer.product is product and layer.pair and _int4(weight) and not weight.requantized:
            yield layer


def _unfused(view: View, layer: LayerView) -> str:
    """Why a product does not read its weight packed; empty if it does."""
    weight, constant, dq = layer.weight, layer.weight.constant, layer.weight.dq
    if not layer.product or not layer.weight_only or layer.side == 0:
        return ""
    if weight.dtype not in ("INT4", "INT8") or weight.requantized:
        return ""
    if constant is None or dq is None or len(constant.shape) != 2:
        return ""
    blocked = _blocked(weight)
    if weight.dtype == "INT4" and not blocked:
        return "it has one scale per channel, and only blocks are fused"
    if weight.dtype == "INT8" and blocked:
        return "it has blocks, and only one scale per channel is fused"
    if any(size % 2 for size in constant.shape):
        return f"its shape {list(constant.shape)} is odd"
    scale = view.scale(dq)
    if weight.dtype == "INT4" and scale and scale.shape[int(dq.get("axis", 1)) % 2] < 2:
        return "it has one block per channel, and only two or more are fused"
    return ""


def _mixed(context: Context, *ops: str) -> Iterator[tuple[LayerView, Node]]:
    for layer in context.view.layers:
        node = layer.weight.mixed
        if node is not None and node.op in ops:
            yield layer, node


def _quantized_kinds(view: View, node: Node) -> set[str]:
    """The stored types of the parts that a node joins; "" for one that is not quantized."""
    weights = (view.stored(name) for name in node.inputs)
    return {one.dtype if one and one.quantized else "" for one in weights}


def _block_codes(view: View) -> Iterator[tuple[Node, Constant]]:
    for node in view.nodes_of("DequantizeLinear"):
        constant = view.constants.get(node.input(0))
        if constant is not None and node.get("block_size"):
            yield node, constant


def _int4(weight: Stored) -> bool:
    return weight.quantized and weight.dtype == "INT4"


def _blocked(weight: Stored) -> bool:
    return weight.dq is not None and bool(weight.dq.get("block_size"))


def _reshaped(weight: Stored) -> bool:
    return any(node.op == "Reshape" for node in weight.path)


OWN_COPY = "give each product its own copy of the constants (the engine stores equal ones once)"
ACTIVATION_SIDE = "compute the branch on the activation: Gather the channels, a small product, Add"
MATRIX = "store it as a matrix [O, I*kh*kw] with blocks along the last axis, and a Reshape before the Conv"
REQUANTIZE = (
    "dequantize in blocks, then QuantizeLinear to INT8 per channel and DequantizeLinear (w4a8); or leave the "
    "activation in FP16 (w4a16)"
)
ALSO_INT8 = "quantize the activation as well (w8a8), or leave it in FP16; as it is, it saves bytes but no time"

WEIGHT_RULES = (
    Rule("int4-left", left_blocks, "put the weight on the right (transpose the product)",
         built_here("refused")),
    Rule("int4-left-channels", left_channels, "put the weight on the right, in blocks",
         built_here("slow")),
    Rule("int4-shared", shared_blocks, OWN_COPY, built_here("refused")),
    Rule("block-axis", block_axis, MATRIX, built_here("refused", "documented")),
    Rule("block-form", block_rank, MATRIX, documented("refused")),
    Rule("block-ragged", ragged_blocks, "choose a block size that divides the axis",
         documented("wrong")),
    Rule("w4a8-product", w4a8_product, REQUANTIZE, built_here("refused")),
    Rule("w4a8-conv", w4a8_conv, REQUANTIZE, built_here("refused")),
    Rule("w4a8-conv-undone", w4a8_conv_reshaped, REQUANTIZE, built_here("fp16")),
    Rule("w4a8-same-scales", same_scales, "use blocks, or INT8 scales of their own",
         built_here("refused")),
    Rule("requantized-unproven", requantized,
         "use w8a8 or w4a16 on this target, or try it on the device",
         documented("doubtful", "trt-10.3", "trt-10.13", "trt-11")),
    Rule("int4-conv-unproven", conv_reshaped,
         "use w8a8 for convolutions on this target, or try it on the device",
         documented("doubtful", "trt-10.3", "trt-10.13", "trt-11")),
    Rule("int8-weight-only-unproven", int8_weight_only,
         "quantize the activation as well (w8a8), or try it on the device",
         documented("doubtful", "trt-10.3", "trt-10.13", "trt-11")),
    Rule("int4-output-dtype", int4_wide_scale, "store the scales in FP16", built_here("refused")),
    Rule("int4-scale-cast", int4_cast_after, "store the scales in FP16, without a Cast",
         built_here("slow")),
    Rule("conv-unpacked", conv_unpacked, ALSO_INT8, built_here("slow")),
    Rule("product-unpacked", product_unpacked,
         "INT4: blocks of 32 to 256 that divide K, two or more, K and N even; INT8: one scale per "
         "channel, K and N even", built_here("slow")),
    Rule("requantized-cost", requantized_each_call, "use w8a8 where time matters",
         built_here("note")),
    Rule("weight-sum", summed_weights, "compute two products and add them", built_here("slow")),
    Rule("weight-join", joined_weights,
         "split the layer by outputs or inputs, and Concat or Add the results",
         built_here("refused")),
    Rule("weight-join-float", joined_with_float, ACTIVATION_SIDE, built_here("slow")),
    Rule("weight-scatter", scattered_weights, ACTIVATION_SIDE, built_here("slow")),
    Rule("weight-product", multiplied_weights,
         "apply the factors to the activation one after the other", built_here("slow")),
    Rule("weight-late", late_quantized, "store the codes (INT8) and only a DequantizeLinear",
         built_here("note")),
    Rule("one-hot", one_hot, "use Gather along the channels", built_here("slow")),
    Rule("fp4-unpacked", fp4_unpacked, "use INT4 in blocks, which products take packed",
         built_here("slow")),
    Rule("depthwise-int8", depthwise_int8, "leave it in FP16, or quantize only its weight",
         built_here("slow")),
    Rule("transposed-int8", transposed_int8, "leave it in FP16", built_here("fp16")),
    Rule("weight-scale-rank", weight_scale_rank,
         "give one scale per output channel, or one of rank 0", built_here("refused")),
)  # fmt: skip
