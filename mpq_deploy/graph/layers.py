"""An ONNX graph seen as layers: which weights may be quantized, and why others stay.

In: an ``onnx_ir.Model`` that ``graph.load`` has normalised (weights are initializers, node names
unique). Out: a ``LayerGraph`` with one ``Layer`` per quantizable weight, in graph order.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count
from math import prod
from typing import TYPE_CHECKING

import onnx_ir as ir

if TYPE_CHECKING:
    import networkx as nx

LAYER_OPS = ("Conv", "Gemm", "MatMul")
# The domain of ONNX's own operators, by its two names.
STANDARD_DOMAINS = ("", "ai.onnx")


@dataclass(frozen=True)
class LayerUse:
    """One node that applies a layer's weight. Almost every layer has exactly one."""

    node: str
    input: str
    output: str


@dataclass(frozen=True)
class Window:
    """The windows of a convolution, per spatial axis; ``pads``: before every axis, then after every axis."""

    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...]


@dataclass(frozen=True)
class Layer:
    """A Conv, Gemm or MatMul with a constant weight: the unit for which a scheme is chosen.

    A weight shared by several nodes is one layer with several uses. ``weight_shape`` is the shape
    in the file; seen as a matrix [out_channels, reduction] (see ``weight_matrix``) the output
    channels come first. ``window``: of a Conv that is written as a matrix product over its windows
    where its weight alone is quantized; None where it is not, and ``no_product`` says why
    (``latency.conv_products`` decides). ``shifted``: the forms of its quantized input whose channels are
    shifted (``formats.shifts``); ``pads``: of such a Conv, before all spatial axes, then after all.
    """

    name: str
    op: str
    weight: str
    weight_shape: tuple[int, ...]
    out_axis: int
    group: int
    uses: tuple[LayerUse, ...]
    window: Window | None = None
    no_product: str = ""
    shifted: frozenset[str] = frozenset()
    pads: tuple[int, ...] = ()

    @property
    def weights(self) -> int:
        """Number of weight elements."""
        return prod(self.weight_shape)

    @property
    def out_channels(self) -> int:
        """Number of output channels (of all groups together)."""
        return self.weight_shape[self.out_axis]

    @property
    def reduction(self) -> int:
        """Products summed into one output element: I/group * kh * kw of a Conv, K of a product."""
        return self.weights // max(self.out_channels, 1)

    @property
    def kernel(self) -> tuple[int, ...]:
        """Spatial kernel shape; empty for products."""
        return self.weight_shape[2:] if self.op == "Conv" else ()

    @property
    def taps(self) -> int:
        """Positions of the kernel: 1 for products."""
        return prod(self.kernel)

    @property
    def depthwise(self) -> bool:
        """A convolution whose groups hold one input channel each."""
        return self.op == "Conv" and self.group > 1 and self.weight_shape[1] == 1

    @property
    def inputs(self) -> tuple[str, ...]:
        """The distinct activation tensors that this layer reads, in order of use."""
        return tuple(dict.fromkeys(use.input for use in self.uses))


@dataclass(frozen=True)
class OtherWeight:
    """A constant of at least two dimensions (no norm, no bias) that is not a layer, and why."""

    name: str
    op: str
    elements: int
    reason: str


@dataclass(frozen=True)
class LayerGraph:
    """A normalised model and its layers. ``watched``: activations to calibrate that no layer reads."""

    model: ir.Model
    layers: tuple[Layer, ...]
    others: tuple[OtherWeight, ...]
    watched: tuple[str, ...] = ()

    @property
    def activations(self) -> dict[str, tuple[str, ...]]:
        """Activation tensor -> names of the layers that read it and share its quantizer."""
        readers: dict[str, list[str]] = {tensor: [] for tensor in self.watched}
        for layer in self.layers:
            for tensor in layer.inputs:
                readers.setdefault(tensor, []).append(layer.name)
        return {tensor: tuple(names) for tensor, names in readers.items()}


def layer_graph(model: ir.Model) -> LayerGraph:
    """Find the layers of ``model``, in graph order; a weight shared by several nodes is one layer."""
    users: dict[str, list[tuple[ir.Node, LayerUse]]] = {}
    refused: dict[str, tuple[str, str]] = {}
    for node in model.graph:
        for index, value in enumerate(node.inputs):
            if value is None or not value.is_initializer() or value.name is None:
                continue
            reason = refusal(node, index, value)
            if reason:
                refused.setdefault(value.name, (node.op_type, reason))
            else:
                source = node.inputs[0]
                assert source is not None  # as refusal says
                use = LayerUse(node.name or "", source.name or "", node.outputs[0].name or "")
                users.setdefault(value.name, []).append((node, use))
    layers: list[Layer] = []
    for weight, uses in users.items():
        node = uses[0][0]
        if weight in refused:
            refused[weight] = (node.op_type, f"its weight is also used by {refused[weight][0]}")
            continue
        if len({(n.op_type, _out_axis(n), _group(n)) for n, _ in uses}) > 1:
            refused[weight] = (node.op_type, "its weight is shared by nodes of different form")
            continue
        shape = _shape(model.graph.initializers[weight])
        short = len(weight) <= len(".weight")
        name = (node.name or weight) if short else weight.removesuffix(".weight")
        taken = {layer.name for layer in layers}
        if name in taken:
            name = next(one for i in count(1) if (one := f"{name}_{i}") not in taken)
        places = tuple(use for _, use in uses)
        layers.append(
            Layer(name, node.op_type, weight, shape, _out_axis(node), _group(node), places)
        )
    others = []
    for name, (op, reason) in refused.items():
        shape = _shape(model.graph.initializers[name])
        if sum(size > 1 for size in shape) >= 2:
            others.append(OtherWeight(name, op, prod(shape), reason))
    return LayerGraph(model, tuple(layers), tuple(others))


def dataflow(model: ir.Model) -> nx.DiGraph:
    """Return the nodes' names as a directed graph: an edge for each tensor handed on."""
    import networkx as nx

    graph = nx.DiGraph()
    for node in model.graph:
        graph.add_node(node.name, op=node.op_type)
        for value in node.inputs:
            producer = value.producer() if value is not None else None
            if producer is not None:
                graph.add_edge(producer.name, node.name)
    return graph


def refusal(node: ir.Node, index: int, value: ir.Value) -> str:
    """Say why constant ``value`` at input ``index`` of ``node`` makes no layer; empty: it does."""
    shape = _shape(value)
    if node.domain not in STANDARD_DOMAINS:
        return f"the operator {node.domain}::{node.op_type} is not one of ONNX"
    if node.op_type == "ConvTranspose" and index == 1:
        return "TensorRT has no INT8 or INT4 ConvTranspose: it would dequantize the weight on every call"
    if node.op_type not in LAYER_OPS:
        return f"{node.op_type} is not a Conv, Gemm or MatMul"
    if 0 in shape:
        return "it has no elements"
    if index == 0:
        return "the weight is the left operand, which TensorRT cannot take in INT4 blocks"
    if index != 1:
        return f"it is the bias of a {node.op_type}"
    if value.dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16):
        return f"its type is {value.dtype}, not a float"
    if node.op_type == "MatMul" and len(shape) != 2:
        form = "batch of matrices" if len(shape) > 2 else "vector"
        return f"a MatMul weight of {len(shape)} dimensions is a {form}"
    if node.op_type == "Gemm" and (
        _attribute(node, "transA", 0) or _attribute(node, "alpha", 1.0) != 1.0
    ):
        return "a Gemm with transA or alpha is not rewritten"
    if node.inputs[0] is None or node.inputs[0].is_initializer():
        return "both operands are constants"
    return ""


def _out_axis(node: ir.Node) -> int:
    if node.op_type == "Conv":
        return 0
    return 0 if node.op_type == "Gemm" and _attribute(node, "transB", 0) else 1


def _group(node: ir.Node) -> int:
    return int(_attribute(node, "group", 1)) if node.op_type == "Conv" else 1


def _attribute(node: ir.Node, name: str, default: float) -> float:
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.value


def _shape(value: ir.Value) -> tuple[int, ...]:
    tensor = value.const_value
    if tensor is None:
        return ()
    return tuple(int(size) for size in tensor.shape.numpy())
