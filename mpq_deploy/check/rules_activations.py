"""Rules on quantized activations: where INT8 compute is lost, or costs more than it gains."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

from mpq_deploy.check.graph_view import LayerView, Node, Pair, View
from mpq_deploy.check.rule import Context, Match, Rule, built_here, documented
from mpq_deploy.formats.fp8 import LARGEST_AREA

# Turing's INT8 convolutions are computed in FP16 by TensorRT-RTX.
INT8_CONV_FROM = 80
RGB = 3


def scale_of_one_element(context: Context) -> Iterator[Match]:
    """A convolution whose activation has a scale of shape [1] instead of rank 0."""
    for layer, pair in _int8_layers(context.view):
        scale = context.view.scale(pair.q)
        if layer.node.op == "Conv" and scale is not None and scale.shape == (1,):
            yield Match(
                layer.node,
                f"the scale '{scale.name}' of its activation has the shape [1], not rank 0",
            )


def scale_of_rank(context: Context) -> Iterator[Match]:
    """An activation scale of one element and rank 2 or more."""
    for pair in _pairs(context.view):
        scale = context.view.scale(pair.q)
        if scale is not None and len(scale.shape) > 1 and scale.elements == 1:
            yield Match(pair.q, f"its scale has the shape {list(scale.shape)}, not rank 0")


def scale_per_channel(context: Context) -> Iterator[Match]:
    """An activation with a scale for each channel."""
    for pair in _pairs(context.view):
        scale = context.view.scale(pair.q)
        if scale is not None and scale.elements > 1:
            yield Match(pair.q, f"it quantizes an activation with {scale.elements} scales")


def behind_resize(context: Context) -> Iterator[Match]:
    """A convolution with an INT8 weight whose activation was quantized before a Resize."""
    for layer in context.view.layers:
        node = context.view.producer(layer.x)
        if layer.node.op != "Conv" or not layer.weight.quantized or layer.pair is not None:
            continue
        if node is not None and node.op == "Resize" and context.view.pair(node.inputs[0]):
            yield Match(
                layer.node,
                f"its activation is quantized before {node.label} (Resize), not right before it",
            )


def attention(context: Context) -> Iterator[Match]:
    """A product of two activations, as in attention, with INT8 operands."""
    for node in context.view.nodes_of("MatMul"):
        if any(context.view.static(name) for name in node.inputs[:2]):
            continue
        pairs = [context.view.pair(name) for name in node.inputs[:2]]
        if any(pair is not None and _int8(context.view, pair) for pair in pairs):
            yield Match(
                node,
                "it multiplies two activations in INT8: the fused attention kernel is lost (8 -> 53 MB)",
            )


def own_quantizers(context: Context) -> Iterator[Match]:
    """A tensor that several QuantizeLinear nodes quantize alike."""
    seen: dict[tuple[str, bytes], Node] = {}
    for pair in _pairs(context.view):
        scale = context.view.scale(pair.q)
        if scale is None or scale.elements != 1:
            continue
        first = seen.setdefault((pair.source, scale.array().tobytes()), pair.q)
        if first is not pair.q:
            yield Match(
                pair.q,
                f"it repeats {first.label}, which quantizes the same tensor with the same scale",
            )


def int8_branch(context: Context) -> Iterator[Match]:
    """An outlier branch on gathered channels that is itself quantized to INT8."""
    for layer, pair in _int8_layers(context.view):
        source = context.view.producer(pair.source)
        if source is None or source.op != "Gather" or not layer.weight.quantized:
            continue
        beside = context.view.readers.get(source.inputs[0], [])
        if any(reader.op == "QuantizeLinear" for reader, _ in beside):
            yield Match(
                layer.node,
                "its channels are gathered from a tensor that is also quantized, and are quantized themselves",
            )


def rgb_conv(context: Context) -> Iterator[Match]:
    """An explicitly quantized convolution of 3 input channels."""
    for layer, _ in _int8_layers(context.view):
        constant = layer.weight.constant
        shape = context.view.shape(layer.node.inputs[1]) or (constant.shape if constant else ())
        whole = layer.node.op == "Conv" and int(layer.node.get("group", 1)) == 1
        if whole and len(shape) > 2 and shape[1] == RGB:
            yield Match(layer.node, "it is an INT8 convolution of 3 input channels")


def turing_conv(context: Context) -> Iterator[Match]:
    """An INT8 convolution for Turing."""
    if context.oldest is None or context.oldest >= INT8_CONV_FROM:
        return
    for layer, _ in _int8_layers(context.view):
        if layer.node.op == "Conv":
            yield Match(
                layer.node, f"an INT8 convolution is computed in FP16 on SM{context.oldest}"
            )


def fp8_kernel(context: Context) -> Iterator[Match]:
    """An FP8 convolution with a kernel of more than 32 positions."""
    for layer in context.view.layers:
        dq = context.view.producer(layer.x)
        constant = layer.weight.constant
        shape = context.view.shape(layer.node.inputs[1]) or (constant.shape if constant else ())
        area = prod(size or 1 for size in shape[2:])
        if layer.node.op != "Conv" or dq is None or not dq.op.endswith("DequantizeLinear"):
            continue
        if area > LARGEST_AREA and _fp8(context.view, dq):
            size = "x".join(str(size) for size in shape[2:])
            yield Match(
                layer.node, f"an FP8 convolution with a kernel of {size} is computed in FP16"
            )


def mxfp8(context: Context) -> Iterator[Match]:
    """Activations in MXFP8: FP8 in blocks of 32 with scales found at run time."""
    for node in context.view.nodes:
        if node.op == "TRT_MXFP8DynamicQuantize":
            yield Match(node, "what reads its MXFP8 is computed in FP16")


def nvfp4_release(context: Context) -> Iterator[Match]:
    """NVFP4 activations for TensorRT 10, whose releases compute them wrongly, or crash."""
    for node in context.view.nodes:
        if node.op == "TRT_FP4DynamicQuantize":
            yield Match(
                node,
                "NVFP4 with dynamic scales needs TensorRT 11: on Thor 10.13.3.9 is wrong at batch 1 where two or "
                "more epilogues fuse, and the builder of 10.16.2.10 crashes",
            )


def shared_input(context: Context) -> Iterator[Match]:
    """Products that share an input, as q, k and v do: one release miscompiles them for Thor."""
    if 110 not in context.capabilities:
        return
    users: dict[str, list[Node]] = {}
    for layer in context.view.layers:
        if layer.product:
            users.setdefault(layer.x, []).append(layer.node)
    for nodes in users.values():
        if len(nodes) > 1:
            yield Match(nodes[0], f"{', '.join(node.label for node in nodes)} share an input")


def _pairs(view: View) -> Iterator[Pair]:
    pairs = (view.pair(node.outputs[0]) for node in view.nodes_of("DequantizeLinear"))
    return (pair for pair in pairs if pair is not None)


def _int8_layers(view: View) -> Iterator[tuple[LayerView, Pair]]:
    """Layers whose activation is quantized to 8-bit integers."""
    pairs = ((layer, layer.pair) for layer in view.layers)
    return ((layer, pair) for layer, pair in pairs if pair is not None and _int8(view, pair))


def _fp8(view: View, dq: Node) -> bool:
    """Whether ``dq`` gives what was quantized to FP8, by ONNX's operator or TensorRT's own."""
    own = dq.domain == "trt" and dq.op == "TRT_FP8DequantizeLinear"
    return own or view.dtype(dq.input(0)).startswith("FLOAT8E4M3")


def _int8(view: View, pair: Pair) -> bool:
    return view.dtype(pair.q.outputs[0]) in ("INT8", "UINT8", "")


ACTIVATION_RULES = (
    Rule("activation-scale-shape", scale_of_one_element,
         "store the scale with rank 0 (numpy.asarray keeps it, numpy.ascontiguousarray makes [1] "
         "of it)", built_here("fp16")),
    Rule("activation-scale-rank", scale_of_rank, "store the scale with rank 0",
         built_here("refused")),
    Rule("activation-per-channel", scale_per_channel,
         "use one scale for the tensor; move outlier channels into the weight with a Mul before "
         "(smoothing)", {**documented("refused"), "trt-rtx": built_here("fp16")["trt-rtx"]}),
    Rule("quantized-before-resize", behind_resize,
         "put QuantizeLinear and DequantizeLinear after the Resize", built_here("fp16")),
    Rule("attention-int8", attention, "leave the two products of attention in FP16",
         built_here("slow")),
    Rule("quantizers-repeated", own_quantizers,
         "let all readers share one QuantizeLinear and DequantizeLinear", built_here("note")),
    Rule("branch-int8", int8_branch,
         "leave the branch in FP16: in INT8 it runs beside the body with twice the activation "
         "memory", built_here("note")),
    Rule("conv-rgb", rgb_conv, "leave the first convolution in FP16 (TensorRT issue 3638)",
         documented("doubtful", "trt-10.3", "trt-10.13", "trt-11")),
    Rule("int8-conv-gpu", turing_conv,
         "leave convolutions in FP16 on this GPU, or use w8a16 for their bytes",
         {"trt-rtx": built_here("fp16")["trt-rtx"]}),
    Rule("fp8-kernel", fp8_kernel, "leave it in FP16: FP8 gains nothing there and loses accuracy",
         built_here("fp16")),
    Rule("mxfp8", mxfp8, "use FP8 with one scale per tensor, or NVFP4 on Blackwell",
         built_here("fp16")),
    Rule("nvfp4-release", nvfp4_release, "use FP8 on this release, or TensorRT 11",
         documented("wrong", "trt-10.13")),
    Rule("shared-input", shared_input,
         "compare the engine's output at batch 1 with ONNX Runtime's on the device (TensorRT-Edge-"
         "LLM issue 105)", documented("note", "trt-10.13")),
)  # fmt: skip
