"""What formats and branches write their constants and nodes with.

Everything is written in FP32 here; the FP16 passes turn scales into what is deployed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from mpq_deploy.formats.interfaces import Scheme
from mpq_deploy.graph.constants import add_constant
from mpq_deploy.graph.layers import Layer
from mpq_deploy.models.spec import Array

Attributes = dict[str, Any]


@dataclass(frozen=True)
class NodeWriter:
    """Makes constants and nodes of ``model``."""

    model: ir.Model

    @property
    def graph(self) -> ir.Graph:
        """The model's graph."""
        return self.model.graph

    def named_constant(self, name: str, content: Array | ir.TensorProtocol) -> ir.Value:
        """Return the constant ``name``, added when it is new."""
        return add_constant(self.model, name, content)

    def make(
        self,
        op: str,
        inputs: Sequence[ir.Value | None],
        attributes: Attributes,
        name: str,
        like: ir.Value | None = None,
        dtype: str = "FLOAT",
    ) -> ir.Node:
        """Make a node, not yet inserted, with one output of ``dtype``, of the shape of ``like``."""
        node = ir.node(op, inputs, attributes, name=name, num_outputs=1)
        output = node.outputs[0]
        output.name, output.type = f"{name}_output", ir.TensorType(ir.DataType[dtype])
        output.shape = None if like is None else like.shape
        return node

    def after(self, value: ir.Value, nodes: list[ir.Node]) -> ir.Value:
        """Insert ``nodes`` where ``value`` comes from; return what the last of them gives."""
        producer = value.producer()
        if producer is None:
            self.graph.insert_before(self.graph[0], nodes)
        else:
            self.graph.insert_after(producer, nodes)
        return nodes[-1].outputs[0]

    def record(self, key: str, name: str, value: Any) -> None:
        """Add ``name: value`` to the JSON that the model's metadata holds under ``key``."""
        known = json.loads(self.model.metadata_props.get(key, "{}"))
        self.model.metadata_props[key] = json.dumps({**known, name: value}, sort_keys=True)


@dataclass(frozen=True)
class LayerWriter(NodeWriter):
    """Writes one quantized weight, and the branch beside it, for one ``node`` that uses it.

    ``x``: the node's float input. A weight used by several nodes: use ``number`` gets its own
    constants, which share ``tensors``, so that the file holds them once. (One blocked INT4
    initializer that feeds products of different shapes crashes TensorRT's builder.)
    """

    layer: Layer
    scheme: Scheme
    node: ir.Node
    x: ir.Value
    number: int = 0
    tensors: dict[str, ir.TensorProtocol] = field(default_factory=dict)

    def of(self, layer: Layer, node: ir.Node | None = None) -> LayerWriter:
        """Return the writer for a part of the layer."""
        return replace(self, layer=layer, node=node or self.node, tensors={})

    def folded(self, matrix: Array) -> Array:
        """Bring a matrix [out_channels, reduction] back to the weight's shape in the file."""
        return np.asarray(
            (matrix if self.layer.out_axis == 0 else matrix.T).reshape(self.layer.weight_shape)
        )

    def constant(self, part: str, array: Array) -> ir.Value:
        """Return the constant of this use that holds ``array``, ``part`` of the weight."""
        tensor = self.tensors.setdefault(part, ir.Tensor(np.asarray(array, order="C")))
        return self.named_constant(f"{self.layer.weight}//{part}{self._suffix}", tensor)

    def codes(self, make: Callable[[], Array], dtype: str, shape: Sequence[int]) -> ir.Value:
        """Return the constant of codes, made when they are written: they are the bulk of all memory."""
        name, kind = self.layer.weight, ir.DataType[dtype]

        def stored() -> ir.Tensor[Any]:
            return ir.Tensor(np.asarray(make().astype(kind.numpy()), order="C"), name=name)

        lazy = ir.LazyTensor(stored, dtype=kind, shape=ir.Shape(shape), name=name)
        return self.named_constant(
            f"{name}//codes{self._suffix}", self.tensors.setdefault("codes", lazy)
        )

    def insert(
        self,
        op: str,
        inputs: Sequence[ir.Value],
        attributes: Attributes,
        label: str,
        dtype: str = "FLOAT",
        ending: str = "",
    ) -> ir.Value:
        """Insert a node of the weight in front of the layer's; return its output."""
        name = f"{self.layer.name}/{label}{self._suffix}{ending}"
        node = self.make(op, inputs, attributes, name, dtype=dtype)
        self.graph.insert_before(self.node, node)
        return node.outputs[0]

    @property
    def _suffix(self) -> str:
        return f"//use{self.number}" if self.number else ""

    def beside(
        self,
        op: str,
        inputs: Sequence[ir.Value | None],
        attributes: Attributes,
        label: str,
        like: ir.Value | None = None,
    ) -> ir.Node:
        """Make a node of the branch, not yet inserted, whose output has the type of ``like`` (the layer's)."""
        node = self.make(op, inputs, attributes, f"{self.node.name}/{label}")
        node.outputs[0].type = (like or self.node.outputs[0]).type
        return node

    def copy(self, label: str, bias: bool = True) -> ir.Node:
        """Make a node like the layer's, with the same inputs."""
        inputs = self.node.inputs if bias else self.node.inputs[:2]
        return self.beside(self.node.op_type, list(inputs), dict(self.node.attributes), label)

    def add_output(self, nodes: list[ir.Node], label: str) -> None:
        """Insert ``nodes`` after the layer's, and add what the last of them gives to its output."""
        output = self.node.outputs[0]
        add = self.beside("Add", [output, nodes[-1].outputs[0]], {}, label)
        self.graph.insert_after(self.node, [*nodes, add])
        self.hand_over(output, add, add)

    def hand_over(self, old: ir.Value, last: ir.Node, reader: ir.Node) -> None:
        """Let every reader of ``old`` but the branch's own ``reader`` read what ``last`` gives, by the old name."""
        new = last.outputs[0]
        for user, index in list(old.uses()):
            if user is not reader:
                user.replace_input_with(index, new)
        for index, value in enumerate(self.graph.outputs):
            if value is old:
                self.graph.outputs[index] = new
        name = old.name
        old.name, new.name, new.shape = f"{name}//body", name, old.shape
        # The body has fewer channels than the whole, where rows left it.
        old.shape = None
