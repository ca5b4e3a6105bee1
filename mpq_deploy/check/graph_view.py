"""An ONNX file as the rules see it: producers and readers, constants, how weights are stored.

In: a path. Out: a ``View``. Weights stay on disk; only scales, zero points and small constants are
read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.inliner
from onnx import TensorProto, numpy_helper

from mpq_deploy.errors import ModelError
from mpq_deploy.graph.layers import STANDARD_DOMAINS
from mpq_deploy.graph.load import read_proto
from mpq_deploy.graph.sound import without_weights
from mpq_deploy.system.names import printable

LAYER_OPS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
PRODUCTS = ("Gemm", "MatMul")
# Operators that pass a weight on without mixing it with another tensor.
HANDING_ON = (
    *("Reshape", "Transpose", "Cast", "Identity", "Squeeze", "Unsqueeze", "Flatten"),
    *("QuantizeLinear", "DequantizeLinear"),
)
# TensorRT's quantizers that find the scales of an activation's blocks at run time.
DYNAMIC = ("TRT_FP4DynamicQuantize", "TRT_MXFP8DynamicQuantize")
# Operators of ONNX Runtime's domain that TensorRT-RTX was seen to read as ONNX's: it looks at names.
READ_ALIKE = (("com.microsoft", "QuantizeLinear"), ("com.microsoft", "DequantizeLinear"))
# Prefix of the names of ONNX's narrow floats.
QUANTIZED_TYPES = ("INT4", "INT8", "UINT8", "FLOAT8", "FLOAT4")


@dataclass(frozen=True)
class Constant:
    """A constant: its element type by ONNX's name, its shape, and where its numbers are."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    tensor: TensorProto = field(repr=False, compare=False)
    folder: Path = field(repr=False, compare=False)

    @property
    def elements(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    def array(self) -> np.ndarray[Any, np.dtype[Any]]:
        """Read the numbers."""
        array: np.ndarray[Any, np.dtype[Any]] = numpy_helper.to_array(self.tensor, str(self.folder))
        return array


@dataclass(frozen=True)
class Node:
    """A node with a label to find it by, and its attributes as plain values."""

    label: str
    op: str
    domain: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, Any]
    named: bool

    @property
    def standard(self) -> bool:
        """An operator of ONNX, or one that is read as such."""
        return self.domain in STANDARD_DOMAINS or (self.domain, self.op) in READ_ALIKE

    def get(self, name: str, default: Any = None) -> Any:
        """Return an attribute's value."""
        return self.attributes.get(name, default)

    def input(self, index: int) -> str:
        """Return the name of an input; empty when it is left out."""
        return self.inputs[index] if index < len(self.inputs) else ""


@dataclass(frozen=True)
class Stored:
    """How the weight of a layer is stored, and how it gets to the layer.

    ``constant``: its stored tensor; ``path``: the nodes from there to the layer; ``mixed``: the
    node that makes it from several constants (``constant`` is then None).
    """

    constant: Constant | None
    path: tuple[Node, ...]
    mixed: Node | None = None

    @property
    def dq(self) -> Node | None:
        """The node that dequantizes the stored codes."""
        return self.path[0] if self.path and self.path[0].op == "DequantizeLinear" else None

    @property
    def dtype(self) -> str:
        """The stored type; empty for a weight made of several constants."""
        return self.constant.dtype if self.constant else ""

    @property
    def quantized(self) -> bool:
        """Stored as codes that a DequantizeLinear turns into numbers."""
        return self.dq is not None and self.dtype.startswith(QUANTIZED_TYPES)

    @property
    def requantized(self) -> bool:
        """Dequantized, then quantized again (4-bit storage with 8-bit compute)."""
        return any(node.op == "QuantizeLinear" for node in self.path[1:])


@dataclass(frozen=True)
class Pair:
    """The QuantizeLinear and DequantizeLinear of an activation; ``source`` is the float tensor."""

    q: Node
    dq: Node
    source: str


@dataclass(frozen=True)
class LayerView:
    """A Conv, ConvTranspose, Gemm or MatMul with one constant operand: input ``side`` (0 or 1)."""

    node: Node
    weight: Stored
    side: int
    x: str
    pair: Pair | None
    # Its activation is quantized with scales that are found at run time, by an operator of TensorRT.
    dynamic: bool = False

    @property
    def product(self) -> bool:
        """A Gemm or MatMul."""
        return self.node.op in PRODUCTS

    @property
    def weight_only(self) -> bool:
        """Its weight is quantized, its activation is not."""
        return self.weight.quantized and self.pair is None and not self.dynamic


class View:
    """A model and the questions that rules ask about it. Make one with ``open_view``."""

    def __init__(self, proto: onnx.ModelProto, folder: Path) -> None:
        self.proto, self.folder = proto, folder
        self.opset = next(
            (o.version for o in proto.opset_import if o.domain in STANDARD_DOMAINS), 0
        )
        weights = {tensor.name for tensor in proto.graph.initializer}
        self.inputs = tuple(v for v in proto.graph.input if v.name not in weights)
        self.nodes = tuple(_nodes(proto.graph))
        self.constants = {t.name: self._constant(t.name, t) for t in proto.graph.initializer}
        for raw in proto.graph.node:
            constant = raw.op_type == "Constant" and raw.domain in STANDARD_DOMAINS
            if constant and raw.attribute and raw.attribute[0].name == "value":
                self.constants[raw.output[0]] = self._constant(raw.output[0], raw.attribute[0].t)
        self.producers = {name: node for node in self.nodes for name in node.outputs if name}
        self.readers: dict[str, list[tuple[Node, int]]] = {}
        for node in self.nodes:
            for index, name in enumerate(node.inputs):
                self.readers.setdefault(name, []).append((node, index))
        self._static = set(self.constants)
        # ONNX lists nodes in topological order.
        for node in self.nodes:
            made_of = [name for name in node.inputs if name]
            if node.op == "Constant" or (made_of and self._static.issuperset(made_of)):
                self._static.update(name for name in node.outputs if name)

    def nodes_of(self, *ops: str) -> Iterator[Node]:
        """Yield the nodes of ONNX's own operators ``ops``, in order."""
        return (n for n in self.nodes if n.op in ops and n.standard)

    def producer(self, name: str) -> Node | None:
        """The node that makes a tensor; None for constants and graph inputs."""
        return None if name in self.constants else self.producers.get(name)

    def static(self, name: str) -> bool:
        """Whether a tensor depends on constants only."""
        return name in self._static

    def stored(self, name: str) -> Stored | None:
        """How the constant operand ``name`` is stored; None when it depends on an input."""
        if not self.static(name):
            return None
        path: list[Node] = []
        while name not in self.constants:
            node = self.producers[name]
            if node.op not in HANDING_ON or not node.standard or not node.inputs:
                return Stored(None, tuple(reversed(path)), node)
            path.append(node)
            name = node.inputs[0]
        return Stored(self.constants[name], tuple(reversed(path)))

    def pair(self, name: str) -> Pair | None:
        """The activation quantizer that ends in the tensor ``name``; a Cast may come after it."""
        dq = self.producer(name)
        if dq is not None and dq.op == "Cast":
            dq = self.producer(dq.inputs[0])
        if dq is None or dq.op != "DequantizeLinear" or self.static(name):
            return None
        q = self.producer(dq.inputs[0])
        if q is None or q.op != "QuantizeLinear":
            return None
        return Pair(q, dq, q.inputs[0])

    def dynamic(self, name: str) -> bool:
        """Whether the tensor ``name`` was quantized with scales of its own, such as by TRT_FP4DynamicQuantize."""
        dq = self.producer(name)
        if dq is None or not dq.op.endswith("DequantizeLinear"):
            return False
        q = self.producer(dq.input(0))
        return q is not None and q.op in DYNAMIC

    def scale(self, node: Node) -> Constant | None:
        """The constant scale of a Q or DQ, through a Cast; None when it is computed."""
        stored = self.stored(node.input(1)) if node.input(1) else None
        return stored.constant if stored else None

    def shape(self, name: str) -> tuple[int | None, ...] | None:
        """The shape as far as shape inference knows it; None if the rank is unknown."""
        if name in self.constants:
            return self.constants[name].shape
        value = self._types.get(name)
        if value is None or not value.type.tensor_type.HasField("shape"):
            return None
        sizes = value.type.tensor_type.shape.dim
        return tuple(size.dim_value if size.HasField("dim_value") else None for size in sizes)

    def dtype(self, name: str) -> str:
        """The element type as far as it is known; empty when not."""
        if name in self.constants:
            return self.constants[name].dtype
        value = self._types.get(name)
        return "" if value is None else _type_name(value.type.tensor_type.elem_type)

    @cached_property
    def layers(self) -> tuple[LayerView, ...]:
        """Every Conv, ConvTranspose, Gemm and MatMul with exactly one constant operand, in order."""
        layers = []
        for node in self.nodes_of(*LAYER_OPS):
            static = [self.static(name) for name in node.inputs[:2]]
            if len(static) < 2 or sum(static) != 1:
                continue
            side = static.index(True)
            weight = self.stored(node.inputs[side])
            assert weight is not None
            x = node.inputs[1 - side]
            layers.append(LayerView(node, weight, side, x, self.pair(x), self.dynamic(x)))
        return tuple(layers)

    def _constant(self, name: str, tensor: TensorProto) -> Constant:
        shape = tuple(tensor.dims)
        return Constant(name, _type_name(tensor.data_type), shape, tensor, self.folder)

    @cached_property
    def _types(self) -> dict[str, onnx.ValueInfoProto]:
        """What shape inference says, run on a copy whose weights are graph inputs."""
        light = without_weights(self.proto)
        try:
            inferred = onnx.shape_inference.infer_shapes(light).graph
        except onnx.shape_inference.InferenceError:
            # The declared shapes contradict each other, which is a finding of its own.
            inferred = light.graph
        return {v.name: v for v in (*inferred.value_info, *inferred.input, *inferred.output)}


def read_known(path: Path) -> onnx.ModelProto:
    """Read the file at ``path``; ModelError if it is missing, truncated, not ONNX, or too new for onnx."""
    proto = read_proto(path)
    newest = onnx.defs.onnx_opset_version()
    versions = [o.version for o in proto.opset_import if o.domain in STANDARD_DOMAINS]
    if not versions or not 1 <= max(versions) <= newest:
        raise ModelError(
            f"{path} declares the ONNX opset {versions[0] if versions else 'none'}; the installed onnx "
            f"knows 1 to {newest}.",
            "Update onnx, or export the model again with an older opset.",
        )
    return proto


def open_view(proto: onnx.ModelProto, path: Path) -> View:
    """Return the view of a sound model that was read from ``path``, its functions expanded."""
    if proto.functions:
        # Bounded by ``graph.sound``.
        try:
            proto = onnx.inliner.inline_local_functions(proto)
        except RuntimeError as error:
            raise ModelError(
                f"The functions of {path} cannot be expanded: {printable(str(error))[:200]}.",
                "Check it with onnx.checker, and export it again.",
            ) from error
    return View(proto, path.resolve().parent)


def _nodes(graph: onnx.GraphProto) -> Iterator[Node]:
    """Yield every node, those of subgraphs (If, Loop, Scan) after the node that holds them."""
    for index, raw in enumerate(graph.node):
        label = raw.name or f"{raw.op_type} number {index} (makes '{next(iter(raw.output), '')}')"
        values = {a.name: _plain(a) for a in raw.attribute if a.type not in _GRAPHS}
        inputs, outputs = tuple(raw.input), tuple(raw.output)
        yield Node(label, raw.op_type, raw.domain, inputs, outputs, values, bool(raw.name))
        for attribute in raw.attribute:
            if attribute.type in _GRAPHS:
                for inner in (attribute.g, *attribute.graphs):
                    yield from _nodes(inner)


_GRAPHS = (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)


def _type_name(kind: int) -> str:
    known = TensorProto.DataType.values()
    name: str = TensorProto.DataType.Name(kind) if kind in known else f"type {kind}"
    return name


def _plain(attribute: onnx.AttributeProto) -> Any:
    """An attribute's value; a tensor's numbers are not read."""
    if attribute.type in (onnx.AttributeProto.TENSOR, onnx.AttributeProto.SPARSE_TENSOR):
        return None
    return onnx.helper.get_attribute_value(attribute)
