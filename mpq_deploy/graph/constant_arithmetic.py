"""What operators on constants give, in NumPy, within a bound on memory.

In: nodes whose inputs are all constants. Out: arrays; None where a value would be too large.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import onnx
import onnx_ir as ir

from mpq_deploy.models.spec import Array

# Numbers of a value that is computed (our choice: 1 GiB in FP32; the largest layers of today's
# denoisers have a quarter).
LARGEST = 1 << 28

# What ONNX's reference raises for attributes and types that it does not know.
_UNKNOWN = (
    *(ArithmeticError, AttributeError, LookupError),
    *(RuntimeError, TypeError, ValueError),
)

Shape = tuple[int, ...]
Inputs = Sequence["Array | None"]


@dataclass(frozen=True)
class Step:
    """One node: what it computes, from which values, and which are not read after it."""

    node: onnx.NodeProto
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    last_uses: tuple[str, ...]


@dataclass(frozen=True)
class Arithmetic:
    """How ``result`` follows from the constants ``leaves``: computed anew at each request.

    No more than the values still needed are held, so that a whole network of such weights takes the
    memory of one.
    """

    result: str
    leaves: Mapping[str, ir.TensorProtocol]
    steps: tuple[Step, ...]
    opset: int

    def compute(self) -> Array | None:
        """Return the value; None where it, or one on the way, has over ``LARGEST`` numbers.

        None, too, for a form of an operator that ONNX's reference does not know.
        """
        try:
            return self._compute()
        except _UNKNOWN:
            return None

    def _compute(self) -> Array | None:
        values: dict[str, Array] = {}
        for step in self.steps:
            for name in step.inputs:
                if name and name not in values:
                    values[name] = self.leaves[name].numpy()
            inputs = [values[name] if name else None for name in step.inputs]
            if largest_output(step.node, inputs) > LARGEST:
                return None
            made = _evaluated(step.node, inputs, self.opset)
            values.update((name, value) for name, value in zip(step.outputs, made) if name)
            for name in step.last_uses:
                values.pop(name, None)
        return values[self.result]


def arithmetic_of(value: ir.Value, opset: int) -> Arithmetic:
    """Return how a ``value`` whose nodes are all in ``COMPUTED`` follows from initializers."""
    needed: set[ir.Node] = set()
    waiting = [value.producer()]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in needed:
            needed.add(node)
            waiting += [source.producer() for source in node.inputs if source is not None]
    start = value.producer()
    assert start is not None and start.graph is not None
    nodes = [node for node in start.graph if node in needed]
    leaves: dict[str, ir.TensorProtocol] = {}
    last: dict[str, int] = {}
    for number, node in enumerate(nodes):
        for source in node.inputs:
            if source is None or source.name is None:
                continue
            last[source.name] = number
            if source.producer() is None and source.const_value is not None:
                leaves[source.name] = source.const_value
    steps = []
    for number, node in enumerate(nodes):
        inputs = tuple("" if source is None else source.name or "" for source in node.inputs)
        outputs = tuple(made.name or "" for made in node.outputs)
        ended = tuple(name for name, end in last.items() if end == number)
        steps.append(Step(ir.to_proto(node), inputs, outputs, ended))
    return Arithmetic(value.name or "", leaves, tuple(steps), opset)


def _evaluated(node: onnx.NodeProto, inputs: Inputs, opset: int) -> list[Array]:
    """Return the node's outputs by ONNX's own reference of the operator."""
    from onnx.reference import ReferenceEvaluator

    named = onnx.NodeProto(op_type=node.op_type, attribute=node.attribute)
    feeds = {f"in{place}": value for place, value in enumerate(inputs) if value is not None}
    named.input.extend("" if value is None else f"in{p}" for p, value in enumerate(inputs))
    named.output.extend(f"out{place}" for place in range(len(node.output)))
    given = [onnx.ValueInfoProto(name=name) for name in feeds]
    results = [onnx.ValueInfoProto(name=name) for name in named.output]
    graph = onnx.helper.make_graph([named], "one", given, results)
    opsets = [onnx.helper.make_opsetid("", opset)]
    evaluator = ReferenceEvaluator(onnx.helper.make_model(graph, opset_imports=opsets))
    with np.errstate(all="ignore"):  # weights that are not finite are refused by name later
        made = [np.asarray(value) for value in evaluator.run(None, feeds)]
    # Some of its operators count in double precision, which no widened graph has.
    return [value.astype(np.float32) if value.dtype == np.float64 else value for value in made]


def largest_output(node: onnx.NodeProto, inputs: Inputs) -> int:
    """Return how many numbers the largest output of ``node`` can have."""
    shapes = [() if value is None else value.shape for value in inputs]
    if node.op_type in _BROADCAST:
        return prod(np.broadcast_shapes(*shapes))
    if node.op_type in _GROWING:
        return _GROWING[node.op_type](node, shapes, inputs)
    return max(map(prod, shapes), default=1)


def _expand(node: onnx.NodeProto, shapes: list[Shape], inputs: Inputs) -> int:
    target = () if inputs[1] is None else tuple(int(size) for size in inputs[1].ravel())
    return prod(np.broadcast_shapes(shapes[0], target))


def _tile(node: onnx.NodeProto, shapes: list[Shape], inputs: Inputs) -> int:
    times = () if inputs[1] is None else tuple(int(size) for size in inputs[1].ravel())
    return prod(shapes[0]) * prod(times)


def _product(node: onnx.NodeProto, shapes: list[Shape], inputs: Inputs) -> int:
    a, b = shapes[:2]
    columns = b[-1] if len(b) > 1 else 1
    return prod(a[:-1]) * columns * prod(b[:-2])


def _gemm(node: onnx.NodeProto, shapes: list[Shape], inputs: Inputs) -> int:
    flags: dict[str, int] = {one.name: one.i for one in node.attribute}
    return shapes[0][flags.get("transA", 0)] * shapes[1][1 - flags.get("transB", 0)]


def _gather(node: onnx.NodeProto, shapes: list[Shape], inputs: Inputs) -> int:
    axis = next((one.i for one in node.attribute if one.name == "axis"), 0)
    return prod(shapes[1]) * prod(shapes[0]) // max(shapes[0][axis], 1)


def _einsum(node: onnx.NodeProto, shapes: list[Shape], inputs: Inputs) -> int:
    # Too large where letters are summed or repeated, but that is fine for an upper bound.
    equation = str(node.attribute[0].s.decode()).replace(" ", "")
    sizes = {} if "." not in equation else {"...": LARGEST + 1}
    for letters, shape in zip(equation.partition("->")[0].split(","), shapes):
        sizes.update(zip(letters, shape))
    return prod(sizes.values())


_GROWING: dict[str, Callable[[onnx.NodeProto, list[Shape], Inputs], int]] = {
    "Concat": lambda node, shapes, inputs: sum(map(prod, shapes)),
    "Einsum": _einsum,
    "Expand": _expand,
    "Gather": _gather,
    "Gemm": _gemm,
    "MatMul": _product,
    "Tile": _tile,
}
_ELEMENTWISE = (
    "Add And Clip Div Equal Greater GreaterOrEqual Less LessOrEqual Max Mean Min Mul Not Or Pow Sub "
    "Sum Where"
)
_SHRINKING = (
    "Abs Cast CastLike Ceil Cos Erf Exp Flatten Floor Identity Log Neg Reciprocal Relu Reshape Round "
    "Shape Sigmoid Sign Sin Size Slice Softmax Softplus Split Sqrt Squeeze Tanh Transpose Trilu "
    "Unsqueeze BatchNormalization InstanceNormalization LayerNormalization ReduceL1 ReduceL2 "
    "ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare"
)
_BROADCAST = frozenset(_ELEMENTWISE.split())
# Operators that are computed where all their inputs are constants. None draws random numbers, holds
# a subgraph or brings quantized weights back to floats.
COMPUTED = _BROADCAST | _GROWING.keys() | frozenset(_SHRINKING.split())
