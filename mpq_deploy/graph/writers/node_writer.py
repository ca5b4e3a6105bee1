"""The tools with which formats and branches write their constants and nodes.

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
from mpq_deploy.formats.sizes import cuts
from mpq_deploy.graph.constants import add_constant
from mpq_deploy.graph.layers import Layer
from mpq_deploy.models.spec import Array

Attributes = dict[str, Any]
# Larger than every size, as the end of a Slice.
TO_THE_END = 2**31 - 1


@dataclass(frozen=True)
class NodeWriter:
    """Makes constants and nodes of ``model``.

    ``simulating``: for the FP32 graph of ONNX Runtime, where it lacks what the deployed graph has.
    """

    model: ir.Model
    simulating: bool = field(default=False, kw_only=True)

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

    def make_foreign(
        self,
        operator: tuple[str, str],
        inputs: Sequence[ir.Value],
        attributes: Attributes,
        name: str,
        dtypes: Sequence[str],
    ) -> ir.Node:
        """Make a node of a non-ONNX ``operator`` (domain, name), not yet inserted, with outputs of ``dtypes``."""
        domain, op = operator
        self.graph.opset_imports.setdefault(domain, 1)
        node = ir.node(op, inputs, attributes, domain=domain, name=name, num_outputs=len(dtypes))
        for number, (output, dtype) in enumerate(zip(node.outputs, dtypes)):
            output.name, output.type = f"{name}_output{number}", ir.TensorType(ir.DataType[dtype])
        return node

    def after(self, value: ir.Value, nodes: list[ir.Node]) -> ir.Value:
        """Insert ``nodes`` where ``value`` comes from; return what the last of them gives."""
        # Behind a graph input they may read nodes of ours at the start: ramps of the timestep.
        read = [value, *(other for node in nodes for other in node.inputs if other is not None)]
        made = (other.producer() for other in read)
        producer = next((node for node in made if node and node.graph is self.graph), None)
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

    def codes(
        self, make: Callable[[], Array], dtype: str, shape: Sequence[int], part: str = "codes"
    ) -> ir.Value:
        """Return the constant of codes, made when they are written: they are the bulk of all memory."""
        name, kind = self.layer.weight, ir.DataType[dtype]

        def stored() -> ir.Tensor[Any]:
            return ir.Tensor(np.asarray(make().astype(kind.numpy()), order="C"), name=name)

        lazy = ir.LazyTensor(stored, dtype=kind, shape=ir.Shape(shape), name=name)
        return self.named_constant(
            f"{name}//{part}{self._suffix}", self.tensors.setdefault(part, lazy)
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

    def multiply(self, weight: ir.Value) -> None:
        """Write the layer's Conv as a product: its windows [N, *sizes, K] times ``weight`` [K, O].

        Positions of the kernel first, channels within each. A window's first place is a Slice of
        the whole input, so no size must be known. TensorRT-RTX makes one kernel of the windows, a
        product of the packed weight, and one kernel back (docs/engine-forms.md); of three axes it
        unpacks the weight, so a 1-D input gets a fourth. The node's name goes to the product, for
        engines are looked up by it; its output stays its own.
        """
        node, rank = self.node, len(self.layer.kernel)
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        name, x = node.name, node.inputs[0]
        assert x is not None
        value, added = self._windows(x), None
        if rank == 1:
            added = self.constant("added_axis", np.array([2], np.int64))
            value = self._beside_product("Unsqueeze", [value, added], {}, "add_axis")
            rank = 2
        last = {"perm": [0, *range(2, 2 + rank), 1]}
        value = self._beside_product("Transpose", [value], last, "channels_last")
        node.name = f"{name}/channels_first"
        value = self._beside_product("MatMul", [value, weight], {}, "", name)
        if bias is not None:
            value = self._beside_product("Add", [value, bias], {}, "bias")
        first = {"perm": [0, 1 + rank, *range(1, 1 + rank)]}
        if added is not None:
            value = self._beside_product("Transpose", [value], first, "channels_second")
            self._become("Squeeze", [value, added], {})
        else:
            self._become("Transpose", [value], first)

    def _windows(self, x: ir.Value) -> ir.Value:
        """Cut [N, C, *sizes] into what each position of the kernel sees: [N, taps * C, *sizes]."""
        window, kernel = self.layer.window, self.layer.kernel
        assert window is not None
        rank = len(kernel)
        if any(window.pads):
            before, after = window.pads[:rank], window.pads[rank:]
            pads = np.array([0, 0, *before, 0, 0, *after], np.int64)
            x = self._beside_product("Pad", [x, self.constant("pads", pads)], {}, "pad")
        if not cuts(window, self.layer.taps):
            return x
        axes = self.constant("axes", np.arange(2, 2 + rank, dtype=np.int32))
        # Steps of 1 as well: without them TensorRT-RTX's parser refuses a Slice of one axis.
        steps = self.constant("steps", np.array(window.strides, np.int32))
        pieces = []
        for number, place in enumerate(np.ndindex(*kernel)):
            starts = [i * step for i, step in zip(place, window.dilations)]
            # From the end: -2 leaves out the last two places; none are left out at the last one.
            ends = [
                (i - size + 1) * step or TO_THE_END
                for i, size, step in zip(place, kernel, window.dilations)
            ]
            bounds = [
                self.constant(f"{what}{number}", np.array(places, np.int32))
                for what, places in (("starts", starts), ("ends", ends))
            ]
            inputs = [x, *bounds, axes, steps]
            pieces.append(self._beside_product("Slice", inputs, {}, f"slice{number}"))
        if len(pieces) == 1:
            return pieces[0]
        return self._beside_product("Concat", pieces, {"axis": 1}, "windows")

    def _beside_product(
        self,
        op: str,
        inputs: Sequence[ir.Value],
        attributes: Attributes,
        label: str,
        name: str | None = None,
    ) -> ir.Value:
        node = self.make(op, inputs, attributes, name or f"{self.layer.name}/{label}{self._suffix}")
        if name is not None:
            # The layer's own output may have the name that its node's name gives.
            node.outputs[0].name = f"{name}/product"
        self.graph.insert_before(self.node, node)
        return node.outputs[0]

    def _become(self, op: str, inputs: Sequence[ir.Value], attributes: Attributes) -> None:
        """Make the layer's node another operator, so that who reads its output reads on."""
        node = self.node
        node.op_type = op
        node.attributes.clear()
        node.attributes.update(
            {key: ir.convenience.convert_attribute(key, value) for key, value in attributes.items()}
        )
        node.resize_inputs(len(inputs))
        for index, value in enumerate(inputs):
            node.replace_input_with(index, value)

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

    def unpad(self) -> None:
        """Let the Conv pad nothing: its input is padded."""
        if "pads" in self.node.attributes:
            none = [0] * (2 * len(self.layer.kernel))
            self.node.attributes["pads"] = ir.convenience.convert_attribute("pads", none)

    def finish_product(self, ratio: ir.Value | None, shift: Array | None = None) -> None:
        """Add ``shift`` [O] to what the node gives, multiply it by ``ratio``, then add its bias.

        Both as far as they are given; the shift becomes the Conv's own bias.
        """
        node = self.node
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        output, nodes = node.outputs[0], list[ir.Node]()
        if ratio is not None:
            nodes.append(self.beside("Mul", [output, ratio], {}, "range"))
        if bias is not None:
            node.resize_inputs(2)
            added = self._by_channel(bias) if node.op_type == "Conv" else bias
            last = nodes[-1].outputs[0] if nodes else output
            nodes.append(self.beside("Add", [last, added], {}, "bias"))
        if shift is not None:
            node.resize_inputs(3)
            node.replace_input_with(2, self.constant("shift", shift))
        if not nodes:
            return
        self.graph.insert_after(node, nodes)
        self.hand_over(output, nodes[-1], nodes[0])
        output.shape = nodes[-1].outputs[0].shape

    def _by_channel(self, bias: ir.Value) -> ir.Value:
        """Return a Conv's bias [O] as [O, 1, ...], to be added to its output."""
        assert bias.const_value is not None
        array = bias.const_value.numpy().reshape(-1, *(1,) * len(self.layer.kernel))
        if not bias.uses():
            del self.graph.initializers[bias.name or ""]
        return self.constant("bias", array)

    def add_output(self, nodes: list[ir.Node], label: str) -> ir.Value:
        """Insert ``nodes`` after the layer's, and add what the last of them gives to its output.

        Return the sum.
        """
        output = self.node.outputs[0]
        add = self.beside("Add", [output, nodes[-1].outputs[0]], {}, label)
        self.graph.insert_after(self.node, [*nodes, add])
        self.hand_over(output, add, add)
        return add.outputs[0]

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
