"""Sequences of tensors become the tensors, and the graph gives what it gave."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from mpq_deploy.errors import ModelError
from mpq_deploy.graph.load import normalise
from tests.graphs import GraphBuilder

Body = Callable[[GraphBuilder], str]


def taken(g: GraphBuilder, sequence: str, *places: int) -> list[str]:
    return [
        g.op("SequenceAt", [sequence, g.weight(f"i{at}", np.array(at))], f"at_{number}")
        for number, at in enumerate(places)
    ]


def by_sizes(g: GraphBuilder) -> str:
    sizes = g.weight("sizes", [1, 3, 2])
    a, b = taken(g, g.op("SplitToSequence", ["x", sizes], "split", axis=1), 2, -2)
    return g.op("Concat", [b, a], "joined", axis=-1)


def by_one_size(g: GraphBuilder) -> str:
    step = g.weight("step", np.array(4))
    a, b = taken(g, g.op("SplitToSequence", ["x", step], "split", axis=-1), 0, 1)
    return g.op("Concat", [b, a], "joined", axis=1)


def by_one_size_of_a_product(g: GraphBuilder) -> str:
    step = g.weight("step", np.array(3))
    sequence = g.op("SplitToSequence", [g.matmul("x", "wide", 8, 6), step], "split", axis=1)
    return g.op("Concat", taken(g, sequence, 2, 0), "joined", axis=1)


def one_by_one(g: GraphBuilder) -> str:
    split = g.op("SplitToSequence", ["x"], "split", axis=1, keepdims=0)
    added = g.op("Add", taken(g, split, 1, 5), "added")
    return g.op("Reshape", [added, g.weight("column", [-1, 1])], "column")


def joined(g: GraphBuilder) -> str:
    sequence = g.op("SequenceConstruct", ["x", g.op("Neg", ["x"], "neg")], "pair")
    (second,) = taken(g, sequence, 1)
    both = g.op("ConcatFromSequence", [sequence], "stacked", axis=1, new_axis=1)
    flat = g.op("ReduceMax", [both], "largest", keepdims=0)
    return g.op("Add", [second, flat], "added")


def joined_along(g: GraphBuilder) -> str:
    split = g.op("SplitToSequence", ["x", g.weight("sizes", [2, 4])], "split", axis=1)
    return g.op("Neg", [g.op("ConcatFromSequence", [split], "again", axis=1)], "neg")


BODIES = [by_sizes, by_one_size, by_one_size_of_a_product, one_by_one, joined, joined_along]


@pytest.mark.parametrize("opset", [11, 17, 21])
@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("declared", [True, False], ids=["declared", "inferred"])
def test_parts_that_are_known(body: Body, opset: int, declared: bool) -> None:
    g = GraphBuilder(opset=opset)
    g.input("x", ["N", 6])
    y = body(g)
    g.op("Identity", [y], "last")
    g.nodes[-1].output[0] = g.output("y", ["N", "K"])
    proto = g.model()
    if not declared:
        del proto.graph.value_info[:]
    x = np.random.default_rng(0).standard_normal((2, 6)).astype(np.float32)
    model = normalise(ir.from_proto(proto))
    assert not [node for node in model.graph if "Sequence" in node.op_type]
    made = ir.to_proto(model)
    onnx.checker.check_model(made, full_check=True)
    old, new = (
        ort.InferenceSession(one.SerializeToString(), providers=["CPUExecutionProvider"])
        for one in (proto, made)
    )
    np.testing.assert_array_equal(new.run(None, {"x": x})[0], old.run(None, {"x": x})[0])


def test_parts_that_are_not_known_are_refused_by_name() -> None:
    g = GraphBuilder()
    g.input("x", ["N", "M"])
    split = g.op("SplitToSequence", ["x", g.weight("step", np.array(4))], "split", axis=1)
    g.op("Neg", taken(g, split, 0), "last")
    g.nodes[-1].output[0] = g.output("y", ["N", "K"])
    with pytest.raises(ModelError, match=r"'split' \(SplitToSequence\)"):
        normalise(ir.from_proto(g.model()))
