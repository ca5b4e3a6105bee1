"""Small values of a graph that follow from constants and from the sizes of its inputs.

In: a model, and the sizes that are known of its inputs (the batch is not one). Out: by name, the
sizes and conditions that hold whatever the inputs are.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from mpq_deploy.graph.layers import STANDARD_DOMAINS
from mpq_deploy.graph.sound import without_weights
from mpq_deploy.models.spec import Array

Sizes = Mapping[str, tuple[int | None, ...]]
# Numbers of a value that is followed (our choice: a shape has at most eight).
MOST_NUMBERS = 64
# Rounds in which ONNX's inference and the values that it does not follow inform each other.
ROUNDS = 8


def known_values(proto: onnx.ModelProto, inputs: Sizes) -> dict[str, Array]:
    """Return values by name as arrays of objects, in which None is a number that is not known.

    ``inputs``: sizes of the graph's inputs, None for one that varies. ONNX infers the shapes; this
    follows what is computed from them, and hands it back until nothing more is known.
    """
    return _followed(proto, inputs)[0]


def known_shapes(proto: onnx.ModelProto, inputs: Sizes) -> dict[str, tuple[int, ...]]:
    """Return the shapes of values, by name, whose every size follows from those of the ``inputs``."""
    _, graph = _followed(proto, inputs)
    shapes = {}
    for value in (*graph.input, *graph.value_info, *graph.output):
        tensor = value.type.tensor_type
        sizes = [dim.dim_value for dim in tensor.shape.dim if dim.HasField("dim_value")]
        if tensor.HasField("shape") and len(sizes) == len(tensor.shape.dim):
            shapes[value.name] = tuple(sizes)
    return shapes


def _followed(proto: onnx.ModelProto, inputs: Sizes) -> tuple[dict[str, Array], onnx.GraphProto]:
    """Return the values that are known, and the graph with the shapes that are."""
    light = without_weights(proto)
    graph = light.graph
    for value in light.graph.input:
        if value.name in inputs:
            _declare(value, inputs[value.name])
    for value in light.graph.output:
        value.type.tensor_type.ClearField("shape")
    del light.graph.value_info[:]
    values: dict[str, Array] = {}
    for _ in range(ROUNDS):
        try:
            graph = onnx.shape_inference.infer_shapes(light, data_prop=True).graph
        except (onnx.shape_inference.InferenceError, RuntimeError, ValueError):
            break  # ONNX infers nothing of this graph, so nothing more is known
        found, sizes = _Follower(graph).follow()
        new = found.keys() - values.keys() or sizes.keys() - _declared(light.graph)
        values = found
        if not new:
            break
        _hand_back(light.graph, values, sizes)
    return values, graph


def _declare(value: onnx.ValueInfoProto, sizes: Sequence[int | None]) -> None:
    shape = value.type.tensor_type.shape
    shape.ClearField("dim")
    shape.SetInParent()
    for size in sizes:
        shape.dim.add(**({} if size is None else {"dim_value": size}))


def _declared(graph: onnx.GraphProto) -> set[str]:
    return {value.name for value in graph.value_info}


def _hand_back(graph: onnx.GraphProto, values: Mapping[str, Array], sizes: Sizes) -> None:
    """Give ONNX's inference the whole integers that it does not follow, and the shapes made of them."""
    made = {name for node in graph.node for name in node.output}
    whole = {}
    for name, value in values.items():
        if name in made and all(type(number) is int for number in value.ravel()):
            whole[name] = numpy_helper.from_array(value.astype(np.int64), name)
    nodes = [node for node in graph.node if not (node.output and node.output[0] in whole)]
    del graph.node[:]
    graph.node.extend(nodes)
    graph.initializer.extend(whole.values())
    declared = _declared(graph)
    for name, size in sizes.items():
        if name not in declared:
            _declare(graph.value_info.add(name=name), size)
            graph.value_info[-1].type.tensor_type.elem_type = TensorProto.FLOAT


@dataclass(frozen=True)
class _Node:
    """One node, read: the inputs' values (None where not followed), and its attributes."""

    inputs: list[Array | None]
    attributes: dict[str, Any]

    def integers(self, index: int, name: str) -> list[int] | None:
        """Return integers given as input ``index`` or as an attribute; None where not all are known."""
        value = self.inputs[index] if index < len(self.inputs) else None
        given = self.attributes.get(name) if value is None else value.ravel().tolist()
        if given is None or not all(isinstance(number, int) for number in given):
            return None
        return list(given)


class _Follower:
    """Goes through a graph in order, with the values and the sizes that are known so far."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self._graph = graph
        self._values = {
            tensor.name: numpy_helper.to_array(tensor).astype(object)
            for tensor in graph.initializer
            if prod(tensor.dims) <= MOST_NUMBERS and tensor.data_type in _NUMBERS
        }
        self._sizes: dict[str, tuple[int | None, ...]] = {}
        for value in (*graph.input, *graph.value_info, *graph.output):
            shape = value.type.tensor_type.shape
            if value.type.tensor_type.HasField("shape"):
                known = (dim.dim_value if dim.HasField("dim_value") else None for dim in shape.dim)
                self._sizes[value.name] = tuple(known)

    def follow(self) -> tuple[dict[str, Array], Sizes]:
        """Return the values that are followed, and the sizes that ONNX did not infer."""
        made: dict[str, tuple[int | None, ...]] = {}
        for node in self._graph.node:
            if node.domain not in STANDARD_DOMAINS or len(node.output) != 1:
                continue
            value = self._value(node)
            if value is not None and value.size <= MOST_NUMBERS:
                self._values[node.output[0]] = value
            shape = self._shape(node)
            if shape is not None:
                made[node.output[0]] = self._sizes[node.output[0]] = shape
        return self._values, made

    def _value(self, node: onnx.NodeProto) -> Array | None:
        attributes = {one.name: helper.get_attribute_value(one) for one in node.attribute}
        if node.op_type in ("Shape", "Size"):
            return self._size_of(node, attributes)
        inputs = [self._values.get(name) for name in node.input]
        if node.op_type not in _FOLLOWED or (inputs and inputs[0] is None):
            return None
        if node.op_type in _ELEMENTWISE and any(value is None for value in inputs):
            return None
        try:
            return _FOLLOWED[node.op_type](_Node(inputs, attributes))
        except (ArithmeticError, IndexError, KeyError, TypeError, ValueError):
            return None  # a form that is not followed

    def _size_of(self, node: onnx.NodeProto, attributes: Mapping[str, Any]) -> Array | None:
        sizes = self._sizes.get(node.input[0])
        if sizes is None:
            return None
        if node.op_type == "Shape":
            return _array(sizes[attributes.get("start", 0) : attributes.get("end")])
        known = [size for size in sizes if size is not None]
        return _array(prod(known) if len(known) == len(sizes) else None)

    def _shape(self, node: onnx.NodeProto) -> tuple[int | None, ...] | None:
        """Return the shape that an Expand or Reshape gives, where ONNX knows no rank or not all sizes."""
        if node.op_type not in ("Expand", "Reshape") or len(node.input) < 2:
            return None
        known, target = self._sizes.get(node.output[0]), self._values.get(node.input[1])
        source = self._sizes.get(node.input[0])
        if target is None or source is None or (known is not None and None not in known):
            return None
        wanted = target.ravel().tolist()
        if node.op_type == "Reshape":
            return tuple(size if size is not None and size > 0 else None for size in wanted)
        rank = max(len(source), len(wanted))
        pairs = zip((1,) * (rank - len(source)) + source, [1] * (rank - len(wanted)) + wanted)
        return tuple(b if a == 1 else a if b == 1 or a is not None else None for a, b in pairs)


def _array(numbers: Any) -> Array:
    made = np.empty(np.shape(numbers), object)
    made[...] = numbers
    return made


def _elementwise(function: Callable[..., Any], count: int) -> Callable[[_Node], Array]:
    """Apply ``function`` where all its ``count`` numbers are known."""

    def apply(*numbers: Any) -> Any:
        return None if None in numbers else function(*numbers)

    each = np.frompyfunc(apply, count, 1)
    return lambda node: np.asarray(each(*node.inputs), object)


def _divide(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def _cast(node: _Node) -> Array:
    kind = _NUMBERS[node.attributes["to"]]
    each = np.frompyfunc(lambda number: None if number is None else kind(number), 1, 1)
    return np.asarray(each(node.inputs[0]), object)


def _gather(node: _Node) -> Array | None:
    source, index = node.inputs
    if source is None or index is None:
        return None
    return np.asarray(source.take(index.astype(np.int64), node.attributes.get("axis", 0)), object)


def _concat(node: _Node) -> Array | None:
    known = [value for value in node.inputs if value is not None and value.ndim == 1]
    return np.concatenate(known) if len(known) == len(node.inputs) else None


def _reshape(node: _Node) -> Array | None:
    shape, source = node.integers(1, "shape"), node.inputs[0]
    return None if shape is None or source is None else source.reshape(shape)


def _squeeze(node: _Node) -> Array | None:
    axes, source = node.integers(1, "axes"), node.inputs[0]
    return None if axes is None or source is None else np.squeeze(source, tuple(axes))


def _unsqueeze(node: _Node) -> Array | None:
    axes, source = node.integers(1, "axes"), node.inputs[0]
    return None if axes is None or source is None else np.expand_dims(source, tuple(axes))


def _slice(node: _Node) -> Array | None:
    starts, ends = node.integers(1, "starts"), node.integers(2, "ends")
    source = node.inputs[0]
    if source is None or starts is None or ends is None:
        return None
    given = len(node.inputs)
    axes = (
        node.integers(3, "axes")
        if given > 3 or "axes" in node.attributes
        else list(range(len(starts)))
    )
    steps = node.integers(4, "steps") if given > 4 else [1] * len(starts)
    if axes is None or steps is None:
        return None
    cut = [slice(None)] * source.ndim
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        # From the back, what lies before the first place is written as a very negative end.
        beyond = step < 0 and end < -source.shape[axis]
        cut[axis] = slice(start, None if beyond else end, step)
    return source[tuple(cut)]


def _transpose(node: _Node) -> Array | None:
    source = node.inputs[0]
    return None if source is None else source.transpose(node.attributes.get("perm"))


def _filled(node: _Node) -> Array | None:
    shape, fill = node.integers(0, ""), node.attributes.get("value")
    number = 0.0 if fill is None else numpy_helper.to_array(fill).item()
    if shape is None or prod(shape) > MOST_NUMBERS or not isinstance(number, int):
        return None
    return np.full(shape, number, object)


def _modulo(node: _Node) -> Array | None:
    """The remainder with the divisor's sign, as Python's; that with the dividend's is not followed."""
    if node.attributes.get("fmod"):
        return None
    return _elementwise(lambda one, other: one % other if other else None, 2)(node)


def _where(node: _Node) -> Array:
    def choose(condition: Any, yes: Any, no: Any) -> Any:
        return None if condition is None else yes if condition else no

    return np.asarray(np.frompyfunc(choose, 3, 1)(*node.inputs), object)


# Floats are not followed: they round, and differently at every precision.
_INTEGERS = ("INT64", "INT32", "INT16", "INT8", "UINT8")
_NUMBERS: dict[int, Callable[[Any], Any]] = {
    TensorProto.BOOL: bool,
    **dict.fromkeys((TensorProto.DataType.Value(name) for name in _INTEGERS), int),
}
_ELEMENTWISE: dict[str, Callable[[_Node], Array | None]] = {
    "Add": _elementwise(operator.add, 2),
    "And": _elementwise(operator.and_, 2),
    "Div": _elementwise(_divide, 2),
    "Equal": _elementwise(operator.eq, 2),
    "Greater": _elementwise(operator.gt, 2),
    "GreaterOrEqual": _elementwise(operator.ge, 2),
    "Less": _elementwise(operator.lt, 2),
    "LessOrEqual": _elementwise(operator.le, 2),
    "Mod": _modulo,
    "Mul": _elementwise(operator.mul, 2),
    "Not": _elementwise(operator.not_, 1),
    "Or": _elementwise(operator.or_, 2),
    "Sub": _elementwise(operator.sub, 2),
    "Where": _where,
    "Xor": _elementwise(operator.ne, 2),
}
_FOLLOWED: dict[str, Callable[[_Node], Array | None]] = {
    **_ELEMENTWISE,
    "Cast": _cast,
    "Concat": _concat,
    "ConstantOfShape": _filled,
    "Gather": _gather,
    "Identity": lambda node: node.inputs[0],
    "Reshape": _reshape,
    "Slice": _slice,
    "Squeeze": _squeeze,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
