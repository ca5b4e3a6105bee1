"""Let a graph that was exported for a fixed number of samples take any number."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from math import prod
from typing import NoReturn

import numpy as np
import onnx_ir as ir

from mpq_deploy.errors import ModelError
from mpq_deploy.graph.constants import add_constant
from mpq_deploy.graph.known_values import known_shapes
from mpq_deploy.graph.passes.base import GraphPass, NodeMaker, ensure
from mpq_deploy.models.spec import Array

EXPORT_HINT = (
    "Export the model with a dynamic first axis (dynamic_axes or dynamic_shapes of torch.onnx)."
)
BATCH = "batch"


class OpenBatchPass(GraphPass):
    """Make the first axis of ``names``, inputs of one fixed size there, an axis of any size.

    The axis is followed through the graph by the shapes that ONNX infers for the fixed size. Rows
    must stay apart: whether they do is for the caller to compare with the file, row by row.

    1. Constants that hold the size are rewritten: the shapes of Reshape (-1), Expand (1) and Resize.
    2. A constant that is joined to samples (a class token) is repeated for each.
    3. Every other operator has the axis where its inputs have it, aligned as broadcasting does.
    4. A node that takes the axis away, cuts it or sums over it is a ModelError that names it.
    """

    def __init__(self, names: Collection[str]) -> None:
        self.names = names

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Follow the axis from the inputs to the outputs."""
        inputs = self._inputs(model)
        if all(value.shape is not None and value.shape[0] == BATCH for value in inputs):
            return ir.passes.PassResult(model, False)
        firsts = [value.shape[0] for value in inputs if value.shape is not None]
        batch = next((size for size in firsts if isinstance(size, int)), 1)
        for value in inputs:
            value.shape = ir.Shape([batch, *tuple(value.shape or ())[1:]])
        found = _Shapes(model)
        for value in model.graph.inputs:
            if value.name in self.names:
                found.axes[value], found.outer[value] = 0, 1
                found.batch = found.shape(value)[0]
        for node in list(model.graph):
            if any(value in found.axes for value in node.inputs if value is not None):
                _Step(found, node).follow()
        for value, axis in found.axes.items():
            dims: list[int | str | None] = [*found.shape(value)]
            dims[axis] = BATCH if value.is_graph_input() or value.is_graph_output() else None
            value.shape = ir.Shape(dims)
        for value in model.graph.outputs:
            if found.axes.get(value) != 0 or found.outer[value] != 1:
                raise ModelError(
                    f"The output '{value.name}' has no row for each sample.", EXPORT_HINT
                )
        return ir.passes.PassResult(model, True)

    def ensures(self, model: ir.Model) -> None:
        """No input fixes the number of samples."""
        fixed = [one for one in self._inputs(model) if one.shape and isinstance(one.shape[0], int)]
        ensure(not fixed, "An input fixes the number of samples.")

    def _inputs(self, model: ir.Model) -> list[ir.Value]:
        return [value for value in model.graph.inputs if value.name in self.names]


class _Shapes:
    """The shapes of all values for the fixed number of samples, and the batch axis of those that have one."""

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self.axes: dict[ir.Value, int] = {}
        # How many entries of that axis come before the samples' rows: 77 where tokens [77, N] are one axis.
        self.outer: dict[ir.Value, int] = {}
        self.batch = 1
        inputs = {value.name or "": tuple(value.shape or ()) for value in model.graph.inputs}
        sizes = {
            name: tuple(size if isinstance(size, int) else None for size in shape)
            for name, shape in inputs.items()
        }
        self._known = known_shapes(ir.to_proto(model), sizes)

    def shape(self, value: ir.Value) -> tuple[int, ...]:
        """Return the shape of a value. Raises ModelError where it is not known."""
        if value.const_value is not None:
            return tuple(value.const_value.shape.numpy())
        shape = self._known.get(value.name or "")
        if shape is None or 0 in shape:
            raise ModelError(
                f"The batch of the file is fixed, and the shape of '{value.name}' is not known: no other batch "
                "can be given to it.",
                EXPORT_HINT,
            )
        return shape


class _Step:
    """One node: where its outputs have the batch, and what of it must change."""

    def __init__(self, found: _Shapes, node: ir.Node) -> None:
        self.found, self.node = found, node
        self.inputs = [value for value in node.inputs if value is not None]
        self.source = next(value for value in self.inputs if value in found.axes)
        self.axis, self.dims = found.axes[self.source], found.shape(self.source)
        self.outer = found.outer[self.source]

    def follow(self) -> None:
        """Note the axis of each output."""
        kind = self.node.op_type
        if kind in ("Shape", "Size"):
            return
        if kind in ("Reshape", "Flatten"):
            self._reshape()
            return
        if kind == "Concat":
            self._repeat_constants()
        for output in self.node.outputs:
            if any(output.uses()) or output.is_graph_output():
                self._set(output, self._axis(kind, output))
        if kind in ("Expand", "Resize"):
            self._open_sizes(kind)

    def _axis(self, kind: str, output: ir.Value) -> int:
        """Return the batch axis of an output."""
        axis, rank = self.axis, len(self.dims)
        if kind == "Transpose":
            order = self._attribute("perm") or [*range(rank)][::-1]
            return order.index(axis)
        if kind in ("Squeeze", "Unsqueeze") or kind.startswith("Reduce"):
            return self._moved(kind, len(self.found.shape(output)))
        if kind == "Gather":
            along = (self._attribute("axis") or [0])[0]
            if self.source is self.node.inputs[0]:
                along %= rank
                others = len(self.found.shape(self.inputs[1])) - 1
                self._keep(along != axis)
                return axis if axis < along else axis + others
            return along % len(self.found.shape(self.inputs[0])) + axis
        if kind in ("Concat", "Split"):
            self._keep((self._attribute("axis") or [0])[0] % rank != axis)
        return len(self.found.shape(output)) - (rank - axis)

    def _moved(self, kind: str, rank: int) -> int:
        """Return the axis behind a node that takes axes away or puts new ones in."""
        axes = self._attribute("axes")
        if axes is None and len(self.inputs) > 1:
            constant = self.inputs[1].const_value
            axes = None if constant is None else [int(one) for one in constant.numpy().ravel()]
        self._keep(axes is not None)
        assert axes is not None
        if kind == "Unsqueeze":
            new = {one % rank for one in axes}
            return [place for place in range(rank) if place not in new][self.axis]
        gone = {one % len(self.dims) for one in axes}
        self._keep(self.axis not in gone)
        if kind.startswith("Reduce") and (self._attribute("keepdims") or [1])[0]:
            return self.axis
        return self.axis - sum(one < self.axis for one in gone)

    def _set(self, output: ir.Value, axis: int) -> None:
        """Note an output's axis; refuse one that is not the batch, or not of all inputs."""
        shape = self.found.shape(output)
        moves = self.node.op_type in ("Transpose", "Squeeze", "Unsqueeze", "Gather")
        moves |= self.node.op_type.startswith("Reduce")
        self._keep(0 <= axis < len(shape) and shape[axis] == self.dims[self.axis])
        for value in () if moves else self.inputs:
            if (own := self.found.axes.get(value)) is not None:
                self._keep(len(shape) - (len(self.found.shape(value)) - own) == axis)
                self._keep(self.found.outer[value] == self.outer)
        self.found.axes[output], self.found.outer[output] = axis, self.outer

    def _reshape(self) -> None:
        """Give a Reshape -1 for the axis that holds the batch; all before it is as large as before."""
        output, batch = self.node.outputs[0], self.found.batch
        shape, before = self.found.shape(output), prod(self.dims[: self.axis]) * self.outer
        # Where the rows may be: (axis, how many of its entries are before them). Each keeps the order.
        places = [
            (axis, before // prod(shape[:axis]))
            for axis, size in enumerate(shape)
            if before % prod(shape[:axis]) == 0
            and size % (before // prod(shape[:axis]) * batch) == 0
        ]
        self._keep(bool(places))
        last = len(shape) - 1

        def likely(place: tuple[int, int]) -> tuple[bool, bool, bool]:
            # Of several an axis of the batch alone; then any but the features'; then one that it leads.
            axis, outer = place
            return (shape[axis], outer) != (batch, 1), last == axis > 0, outer != 1

        axis, self.found.outer[output] = min(places, key=likely)
        self.found.axes[output] = axis
        if self.node.op_type == "Reshape":
            sizes = [-1 if one == axis else size for one, size in enumerate(shape)]
            self._replace(1, np.asarray(sizes, np.int64), "shape")

    def _repeat_constants(self) -> None:
        """Repeat what is joined to samples, and is the same for all of them, for each."""
        for index, value in enumerate(self.node.inputs):
            if value is None or value in self.found.axes:
                continue
            shape = self.found.shape(value)
            self._keep(len(shape) == len(self.dims) and shape[self.axis] == self.found.batch)
            maker = NodeMaker(self.found.model, f"{self.node.name}.rows_{index}")
            first = maker.constant("first", np.asarray([0], np.int64))
            row = maker.op("Gather", value, first, axis=self.axis)
            parts = [maker.constant("one", np.ones(1, np.int64))] * len(shape)
            parts[self.axis] = self._count(maker)
            sizes = maker.op("Concat", *parts, axis=0) if len(parts) > 1 else parts[0]
            repeated = maker.op("Expand", row, sizes)
            self.node.replace_input_with(index, repeated)
            self.found.model.graph.insert_before(self.node, maker.nodes)

    def _open_sizes(self, kind: str) -> None:
        """Take the number of samples out of the sizes of an Expand or Resize."""
        index = 1 if kind == "Expand" else 3
        value = self.node.inputs[index] if len(self.node.inputs) > index else None
        if value is None:
            return
        axis = self.found.axes[self.node.outputs[0]]
        sizes = np.asarray(self.found.shape(self.node.outputs[0]), np.int64)
        if kind == "Expand":
            sizes[axis] = 1
            self._replace(index, sizes, "shape")
            return
        maker = NodeMaker(self.found.model, f"{self.node.name}.sizes")
        parts = [
            maker.constant(f"size_{n}", np.asarray([size], np.int64))
            for n, size in enumerate(sizes)
        ]
        parts[axis] = self._count(maker)
        self.node.replace_input_with(index, maker.op("Concat", *parts, axis=0))
        self.found.model.graph.insert_before(self.node, maker.nodes)

    def _count(self, maker: NodeMaker) -> ir.Value:
        """Return the number of rows of the source, int64 [1]."""
        place = maker.constant("axis", np.asarray([self.axis], np.int64))
        return maker.op("Gather", maker.op("Shape", self.source), place, axis=0)

    def _replace(self, index: int, values: Array, what: str) -> None:
        constant = add_constant(self.found.model, f"{self.node.name}.open_{what}", values)
        self.node.replace_input_with(index, constant)

    def _attribute(self, name: str) -> list[int] | None:
        found = self.node.attributes.get(name)
        if found is None:
            return None
        return [*found.as_ints()] if found.type == ir.AttributeType.INTS else [found.as_int()]

    def _keep(self, holds: bool) -> None:
        if not holds:
            self._refuse()

    def _refuse(self) -> NoReturn:
        shapes: list[Sequence[int]] = [list(self.dims)]
        raise ModelError(
            f"The file fixes its batch, and '{self.node.name}' ({self.node.op_type}) on {shapes[0]} does not keep "
            "samples apart: the graph takes no other batch.",
            EXPORT_HINT,
        )
