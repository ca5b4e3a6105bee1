"""An If becomes the branch that it takes where that is known, and is refused by name where not."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from mpq_deploy.errors import ModelError
from mpq_deploy.graph.load import normalise
from mpq_deploy.graph.passes.fold_branches import FoldBranchesPass
from tests.graphs import GraphBuilder

Branch = Callable[[], onnx.GraphProto]


def branch(name: str, *nodes: onnx.NodeProto, **weights: np.ndarray) -> onnx.GraphProto:
    tensors = [numpy_helper.from_array(value, key) for key, value in weights.items()]
    made = [helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, None)]
    return helper.make_graph(nodes, name, [], made, tensors)


def proto_of(graph: GraphBuilder) -> onnx.ModelProto:
    """The model without ONNX's check, which wants a shape of every output: here ranks differ."""
    made = helper.make_graph(graph.nodes, "tiny", graph.inputs, graph.outputs, graph.weights)
    opset = helper.make_opsetid("", graph.opset)
    return helper.make_model(made, opset_imports=[opset], ir_version=10)


def squeezed() -> onnx.GraphProto:
    node = helper.make_node("Squeeze", ["x", "axes"], ["then_out"], name="squeeze")
    return branch("then", node, axes=np.array([1]))


def as_it_is() -> onnx.GraphProto:
    return branch("else", helper.make_node("Identity", ["x"], ["else_out"], name="same"))


def one_row(graph: GraphBuilder, axis: int) -> str:
    """Whether axis ``axis`` of x has the size 1, as the TorchScript exporter asks it."""
    index, one = graph.weight("index", np.array(axis)), graph.weight("one", np.array(1))
    size = graph.op("Gather", [graph.op("Shape", ["x"], "shape"), index], "size")
    return graph.op("Equal", [size, one], "is_one")


def model_of(condition: Callable[[GraphBuilder], str], then: Branch = squeezed) -> onnx.ModelProto:
    graph = GraphBuilder(opset=17)
    graph.input("x", ["n", "rows", 6])
    yes = condition(graph)
    graph.op("If", [yes], "if", then_branch=then(), else_branch=as_it_is())
    graph.op("Neg", ["if_out"], "end")
    graph.nodes[-1].output[0] = "out"
    graph.output("out")
    return proto_of(graph)


def run(proto: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


@pytest.mark.parametrize("rows", [1, 3])
def test_a_size_of_the_input_decides(rows: int) -> None:
    proto = model_of(lambda graph: one_row(graph, 1))
    model = normalise(ir.from_proto(proto), {"x": (None, rows, 6)})
    assert "If" not in {node.op_type for node in model.graph}
    x = np.random.default_rng(0).standard_normal((2, rows, 6)).astype(np.float32)
    folded = ir.to_proto(model)
    np.testing.assert_array_equal(run(folded, x), run(proto, x))


def test_what_is_computed_from_sizes_decides_too() -> None:
    """The size of an Expand to a shape that is divided, filled and chosen: case of ``squeeze`` after ``expand``."""

    def condition(graph: GraphBuilder) -> str:
        weight = graph.weight
        size = graph.op("Gather", [graph.op("Shape", ["x"], "s"), weight("i", np.array([1]))], "g")
        half = graph.op("Div", [size, weight("two", np.array([2]))], "half")
        minus = weight("minus", np.array([-1]))
        wanted = graph.op("Concat", [minus, half, minus], "wanted", axis=0)
        ones = graph.op("ConstantOfShape", [weight("three", np.array([3]))], "ones")
        graph.nodes[-1].attribute.append(
            helper.make_attribute("value", numpy_helper.from_array(np.array([1])))
        )
        free = graph.op("Equal", [wanted, minus], "free")
        target = graph.op("Where", [free, ones, wanted], "target")
        row = graph.op("ReduceMax", ["x"], "row", axes=[1], keepdims=1)
        spread = graph.op("Expand", [row, target], "spread")
        shape = graph.op("Shape", [spread], "shape")
        rows = graph.op("Gather", [shape, weight("index", np.array(1))], "rows")
        return graph.op("Equal", [rows, weight("one", np.array(1))], "is_one")

    proto = model_of(condition)
    for rows, left in ((2, "squeeze"), (6, "same")):
        model = FoldBranchesPass({"x": (None, rows, 6)})(ir.from_proto(proto)).model
        assert [node.name for node in model.graph][-2:] == [left, "end"]


def test_a_batch_decides_nothing() -> None:
    proto = model_of(lambda graph: one_row(graph, 0))
    with pytest.raises(
        ModelError, match=r"The node 'if' \(If\) takes one of two branches by 'is_one_out'"
    ):
        normalise(ir.from_proto(proto), {"x": (None, 1, 6)})


def test_data_decides_nothing() -> None:
    def condition(graph: GraphBuilder) -> str:
        largest = graph.op("ReduceMax", ["x"], "largest", keepdims=0)
        return graph.op("Greater", [largest, graph.weight("limit", np.float32(1))], "large")

    with pytest.raises(ModelError, match="known only at run time") as caught:
        normalise(ir.from_proto(model_of(condition)), {"x": (None, 1, 6)})
    assert "data-dependent branches" in caught.value.hint


@pytest.mark.parametrize("yes", [True, False])
def test_a_constant_decides(yes: bool) -> None:
    proto = model_of(lambda graph: graph.weight("yes", np.array(yes)))
    model = FoldBranchesPass()(ir.from_proto(proto)).model
    assert [node.op_type for node in model.graph] == ["Squeeze" if yes else "Identity", "Neg"]


def test_equal_branches_are_one_whatever_decides() -> None:
    def condition(graph: GraphBuilder) -> str:
        largest = graph.op("ReduceMax", ["x"], "largest", keepdims=0)
        return graph.op("Greater", [largest, graph.weight("limit", np.float32(1))], "large")

    model = normalise(ir.from_proto(model_of(condition, then=as_it_is)))
    assert [node.op_type for node in model.graph] == ["Neg"]


def test_branches_that_differ_in_a_weight_are_two() -> None:
    def scaled(by: float) -> onnx.GraphProto:
        node = helper.make_node("Mul", ["x", "by"], [f"out_{by}"], name="scale")
        return branch("scaled", node, by=np.float32([by] * 2000))

    graph = GraphBuilder(opset=17)
    graph.input("x", ["n", 2000])
    graph.input("yes", [], TensorProto.BOOL)
    graph.op("If", ["yes"], "if", then_branch=scaled(1), else_branch=scaled(2))
    graph.op("Neg", ["if_out"], "end")
    graph.nodes[-1].output[0] = graph.output("out")
    with pytest.raises(ModelError, match="known only at run time"):
        FoldBranchesPass()(ir.from_proto(proto_of(graph)))


def test_a_branch_within_a_branch_and_a_name_that_is_taken() -> None:
    """The inner If is looked at in turn; its weight has the name of another one outside."""

    def nested() -> onnx.GraphProto:
        inner = helper.make_node("Add", ["x", "limit"], ["sum"], name="add")
        then = branch("inner", inner, limit=np.float32(7))
        node = helper.make_node(
            "If", ["again"], ["then_out"], name="inner_if", then_branch=then, else_branch=as_it_is()
        )
        return branch("then", node, again=np.array(True))

    graph = GraphBuilder(opset=17)
    graph.input("x", ["n", 6])
    yes = graph.weight("yes", np.array(True))
    graph.op("If", [yes], "if", then_branch=nested(), else_branch=as_it_is())
    graph.op("Mul", ["if_out", graph.weight("factor", np.float32(2))], "end")
    graph.nodes[-1].output[0] = graph.output("out")
    model = ir.from_proto(proto_of(graph))
    model.graph.initializers["factor"].name = "limit"
    folded = ir.to_proto(normalise(model))
    x = np.ones((1, 6), np.float32)
    np.testing.assert_array_equal(run(folded, x), np.full((1, 6), 16, np.float32))


def test_an_output_keeps_its_name_though_a_branch_hands_the_input_on() -> None:
    graph = GraphBuilder(opset=17)
    graph.input("x", ["n", 6])
    graph.op(
        "If",
        [graph.weight("no", np.array(False))],
        "if",
        then_branch=squeezed(),
        else_branch=as_it_is(),
    )
    graph.nodes[-1].output[0] = graph.output("out")
    model = normalise(ir.from_proto(proto_of(graph)))
    x = np.ones((2, 6), np.float32)
    assert [value.name for value in model.graph.outputs] == ["out"]
    np.testing.assert_array_equal(run(ir.to_proto(model), x), x)


def test_a_loop_is_refused_by_name() -> None:
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go"], ["on"]),
            helper.make_node("Neg", ["state"], ["next"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("step", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("state", TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", TensorProto.FLOAT, None),
        ],
    )
    graph = GraphBuilder(opset=17)
    x = graph.input("x", ["n", 6])
    graph.op("Loop", [graph.weight("trips", np.array(3)), "", x], "loop", body=body)
    graph.op("Neg", ["loop_out"], "end")
    graph.nodes[-1].output[0] = graph.output("out")
    with pytest.raises(ModelError, match=r"The node 'loop' \(Loop\) holds a subgraph"):
        normalise(ir.from_proto(proto_of(graph)))


def test_weights_of_the_branch_not_taken_are_left_out() -> None:
    """Weights of the graph around, one of which also stands in an If within that branch."""

    def product(weight: str, name: str) -> onnx.NodeProto:
        return helper.make_node("MatMul", ["x", weight], [f"{name}_out"], name=name)

    def choose(name: str) -> onnx.NodeProto:
        inner = [branch(f"{name}_{end}", product(end, f"{name}_{end}")) for end in "cd"]
        then, other = inner
        out = [f"{name}_out"]
        return helper.make_node("If", ["no"], out, name=name, then_branch=then, else_branch=other)

    graph = GraphBuilder(opset=17)
    graph.input("x", ["n", 6])
    for name in "abcd":
        graph.random(name, 6, 6)
    graph.weight("no", np.array(False))
    then = branch("then", product("a", "first"), choose("inner"))
    graph.op("If", ["no"], "if", then_branch=then, else_branch=branch("b", product("b", "second")))
    graph.op("Neg", ["if_out"], "end")
    graph.nodes[-1].output[0] = graph.output("out")
    model = normalise(ir.from_proto(proto_of(graph)))
    assert [*model.graph.initializers] == ["b"]
