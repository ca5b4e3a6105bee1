"""Rules on the graph as a whole: opset, norms, float types, inputs, names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from mpq_deploy.check.rule import Context, Match, Rule, Verdict, built_here, documented

PER_CHANNEL_OPSET = 21


def opset_range(context: Context) -> Iterator[Match]:
    """An opset that the parser is not known to read."""
    low, high = context.dialect.opsets
    if not low <= context.view.opset <= high:
        reads = f"{context.dialect.runtime} reads {low} to {high}"
        yield Match(None, f"the model has opset {context.view.opset}; {reads}")


def group_norm(context: Context) -> Iterator[Match]:
    """GroupNormalization with a scale per channel, for a release before 10.9."""
    if context.dialect.group_norm or context.view.opset < PER_CHANNEL_OPSET:
        return
    for node in context.view.nodes_of("GroupNormalization"):
        yield Match(node, "GroupNormalization of opset 21 fails before TensorRT 10.9")


def one_group(context: Context) -> Iterator[Match]:
    """GroupNormalization with one group."""
    for node in context.view.nodes_of("GroupNormalization"):
        if node.get("num_groups") == 1:
            yield Match(
                node,
                "GroupNormalization with num_groups = 1 was computed as an instance norm (10.16.1)",
            )


def float32_layers(context: Context) -> Iterator[Match]:
    """Layers that compute in FP32: a strongly typed network does not change that."""
    wide = []
    for layer in context.view.layers:
        constant = layer.weight.constant
        if constant is None:
            continue
        scale = context.view.scale(layer.weight.path[-1]) if layer.weight.quantized else None
        halved = any(node.op == "Cast" for node in layer.weight.path)
        if not halved and "FLOAT" in (constant.dtype, scale.dtype if scale else ""):
            wide.append(layer.node)
    if wide:
        yield Match(wide[0], f"{len(wide)} layers compute in FP32, {wide[0].label} the first")


def dynamic_inputs(context: Context) -> Iterator[Match]:
    """Inputs with dynamic dimensions: the builder needs a profile."""
    names = [
        value.name
        for value in context.view.inputs
        if any(not d.HasField("dim_value") for d in value.type.tensor_type.shape.dim)
    ]
    if names:
        yield Match(None, f"{', '.join(names)} have dynamic dimensions")


def node_names(context: Context) -> Iterator[Match]:
    """Nodes without a unique name: an engine's kernels refer to nodes by name."""
    counts = Counter(node.label for node in context.view.nodes if node.named)
    nameless = sum(not node.named for node in context.view.nodes)
    repeated = sum(count > 1 for count in counts.values())
    if nameless or repeated:
        yield Match(None, f"{nameless} nodes have no name, {repeated} names occur more than once")


def onnxruntime_accuracy(context: Context) -> Iterator[Match]:
    """Products with quantized weights alone, whose activations ONNX Runtime quantizes by itself."""
    count = sum(layer.product and layer.weight_only for layer in context.view.layers)
    if count:
        yield Match(None, f"{count} products have weights in 4 or 8 bits and activations in float")


GRAPH_RULES = (
    Rule("opset", opset_range,
         "export with an opset in that range (the ONNX version converter lowers one)",
         {**documented("doubtful"), "onnxruntime": Verdict("doubtful", "documented")}),
    Rule("group-norm", group_norm,
         "export with opset 20 or lower, which writes it as InstanceNormalization",
         documented("refused", "trt-10.3")),
    Rule("group-norm-one-group", one_group,
         "write it as Reshape, InstanceNormalization, Mul and Add (export with opset 20 or lower)",
         documented("wrong", "trt-10.13", "trt-11")),
    Rule("float32", float32_layers,
         "convert the graph to FP16 before building: precision flags no longer exist",
         built_here("slow", "documented")),
    Rule("dynamic-inputs", dynamic_inputs,
         "give minimum, optimum and maximum shapes (trtexec --minShapes, --optShapes, --maxShapes)",
         built_here("note", "documented")),
    Rule("node-names", node_names,
         "give every node a unique name, so that the engine can be checked",
         built_here("note", "documented")),
    Rule("onnxruntime-accuracy", onnxruntime_accuracy,
         "set the session entry session.qdq_matmulnbits_accuracy_level to 0, or results are off by"
         " 5e-3", {"onnxruntime": Verdict("note", "built here")}),
)  # fmt: skip
