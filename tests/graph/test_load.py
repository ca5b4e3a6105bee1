"""The passes that bring a user's graph to the common form: values stay, names stay, a second run changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from mpq_deploy.errors import ModelError
from mpq_deploy.graph.layers import layer_graph
from mpq_deploy.graph.load import load_model, normalise
from mpq_deploy.graph.passes.fold_constants import FoldConstantsPass
from mpq_deploy.graph.passes.name_nodes import NameNodesPass
from mpq_deploy.graph.passes.raise_opset import RaiseOpsetPass
from mpq_deploy.graph.passes.widen import WidenPass
from tests.graphs import GraphBuilder

Array = np.ndarray[Any, Any]


def run(model: ir.Model, **feeds: Array) -> Array:
    session = ort.InferenceSession(
        ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return np.asarray(session.run(None, feeds)[0])


def finished(graph: GraphBuilder, last: str, shape: list[int | str]) -> ir.Model:
    graph.op("Neg", [last], "end")
    graph.nodes[-1].output[0] = graph.output("out", shape)
    return ir.from_proto(graph.model())


def initializer(model: ir.Model, name: str) -> Array:
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    return tensor.numpy()


def test_a_transposed_weight_keeps_its_name() -> None:
    graph = GraphBuilder()
    x = graph.input("x", ["n", 4])
    w = graph.op("Transpose", [graph.random("to_q.weight", 6, 4)], "t", perm=[1, 0])
    model = finished(graph, graph.op("MatMul", [x, w], "to_q"), ["n", 6])
    feed = graph.rng.standard_normal((3, 4)).astype(np.float32)
    before, weight = run(model, x=feed), initializer(model, "to_q.weight").copy()
    assert FoldConstantsPass()(model).modified
    np.testing.assert_array_equal(initializer(model, "to_q.weight"), weight.T)
    np.testing.assert_allclose(run(model, x=feed), before, atol=1e-6)
    assert not FoldConstantsPass()(model).modified
    assert [node.op_type for node in model.graph] == ["MatMul", "Neg"]


def test_a_weight_transposed_twice_alike_stays_one() -> None:
    graph = GraphBuilder()
    x = graph.input("x", ["n", 4])
    w = graph.random("w", 4, 4)
    first = graph.op("MatMul", [x, graph.op("Transpose", [w], "t1", perm=[1, 0])], "first")
    second = graph.op("MatMul", [first, graph.op("Transpose", [w], "t2", perm=[1, 0])], "second")
    model = normalise(finished(graph, second, ["n", 4]))
    assert list(model.graph.initializers) == ["w"]
    (layer,) = layer_graph(model).layers
    assert len(layer.uses) == 2


def test_a_weight_in_two_forms_is_kept_in_both() -> None:
    graph = GraphBuilder()
    x = graph.input("x", ["n", 4])
    w = graph.random("w", 4, 4)
    first = graph.op("MatMul", [x, graph.op("Transpose", [w], "t1")], "first")
    model = finished(graph, graph.op("MatMul", [first, w], "second"), ["n", 4])
    feed = np.ones((2, 4), np.float32)
    before = run(model, x=feed)
    model = normalise(model)
    np.testing.assert_array_equal(initializer(model, "w.transposed"), initializer(model, "w").T)
    np.testing.assert_allclose(run(model, x=feed), before, atol=1e-6)


def test_chains_of_shape_operators_fold() -> None:
    graph = GraphBuilder()
    x = graph.input("x", ["n", 2, 3])
    w = graph.random("norm.weight", 2, scale=1.0)
    grown = graph.op("Unsqueeze", [w, graph.weight("axes", np.array([1]))], "grow")
    shaped = graph.op("Reshape", [grown, graph.weight("shape", np.array([0, -1]))], "shape_it")
    cast = graph.op(
        "Cast", [graph.op("Cast", [shaped], "to_double", to=TensorProto.DOUBLE)], "back", to=1
    )
    flat = graph.op("Flatten", [cast], "flat", axis=-1)
    model = finished(graph, graph.op("Mul", [x, flat], "scale"), ["n", 2, 3])
    feed = graph.rng.standard_normal((2, 2, 3)).astype(np.float32)
    before = run(model, x=feed)
    model = normalise(model)
    assert list(model.graph.initializers) == ["norm.weight"]
    assert [node.op_type for node in model.graph] == ["Mul", "Neg"]
    np.testing.assert_allclose(run(model, x=feed), before, atol=1e-6)


def sliced(shared: bool) -> ir.Model:
    """A table whose middle is read, by indices that are cast first, and its last rows backwards from there."""
    graph = GraphBuilder()
    x = graph.input("x", ["n", 2, 3])
    table = graph.random("positions", 6, 5, scale=1.0)

    def index(name: str, *values: int) -> str:
        return graph.op(
            "Cast",
            [graph.weight(f"{name}.int", np.array(values, np.int32))],
            name,
            to=TensorProto.INT64,
        )

    rows = graph.op(
        "Slice", [table, index("a", -5), index("b", 1 << 30), index("c", 0), index("d", 1)], "rows"
    )
    both = [index("e", -1, 0), index("f", -3, 3), index("g", 0, -1), index("h", -1, 1)]
    part = graph.op("Slice", [rows, *both], "part")
    total = graph.op("Add", [x, part], "add")
    if shared:
        whole = graph.op("ReduceSum", [table], "sum", keepdims=0)
        total = graph.op("Add", [total, whole], "add_whole")
    return finished(graph, total, ["n", 2, 3])


def test_a_part_of_a_table_is_all_that_is_kept() -> None:
    model = sliced(shared=False)
    feed = np.ones((2, 2, 3), np.float32)
    before = run(model, x=feed)
    model = normalise(model)
    assert list(model.graph.initializers) == ["positions"]
    assert initializer(model, "positions").shape == (2, 3)
    assert [node.op_type for node in model.graph] == ["Add", "Neg"]
    np.testing.assert_array_equal(run(model, x=feed), before)
    assert not FoldConstantsPass()(model).modified


def test_a_table_that_is_read_as_a_whole_too_is_not_stored_twice() -> None:
    model = sliced(shared=True)
    feed = np.ones((2, 2, 3), np.float32)
    before = run(model, x=feed)
    model = normalise(model)
    assert initializer(model, "positions").shape == (6, 5)
    assert [name for name in model.graph.initializers if "positions" in name] == ["positions"]
    np.testing.assert_allclose(run(model, x=feed), before, rtol=1e-6)
    assert not FoldConstantsPass()(model).modified


def test_the_size_of_a_weight_is_no_use_of_it() -> None:
    """EDM2 divides its weights by roots of their sizes: without folded constants the graph asks for these."""
    g = GraphBuilder()
    g.input("x", ["N", 8])
    weight = g.random("linear.weight", 4, 8)
    turned = g.op("Transpose", [weight], "turned", perm=[1, 0])
    sizes = g.op("Shape", [weight], "sizes", start=1)
    width = g.op("Cast", [sizes], "width", to=1)
    g.op("Div", [g.op("MatMul", ["x", turned], "linear"), width], "divided")
    g.nodes[-1].output[0] = g.output("y", ["N", 4])
    model = normalise(ir.from_proto(g.model()))
    (layer,) = layer_graph(model).layers
    assert layer.weight == "linear.weight" and layer.weight_shape == (8, 4)
    assert not [node for node in model.graph if node.op_type in ("Shape", "Transpose", "Cast")]


def test_a_fold_that_is_an_output_stays() -> None:
    graph = GraphBuilder()
    graph.input("x", ["n"])
    graph.op("Transpose", [graph.random("w", 2, 3)], "t")
    graph.nodes[-1].output[0] = graph.output("out", [3, 2])
    model = ir.from_proto(graph.model())
    assert not FoldConstantsPass()(model).modified


def test_constants_identities_and_unused_weights() -> None:
    graph = GraphBuilder()
    x = graph.input("x", ["n", 4])
    graph.random("unused.weight", 4, 4)
    value = numpy_helper.from_array(graph.rng.standard_normal((4, 4)).astype(np.float32))
    w = graph.op("Identity", [graph.op("Constant", [], "constant", value=value)], "alias")
    model = finished(
        graph, graph.op("Identity", [graph.op("MatMul", [x, w], "product")], "same"), ["n", 4]
    )
    feed = np.eye(4, dtype=np.float32)
    before = run(model, x=feed)
    model = normalise(model)
    assert [node.op_type for node in model.graph] == ["MatMul", "Neg"]
    assert len(model.graph.initializers) == 1 and len(layer_graph(model).layers) == 1
    np.testing.assert_array_equal(run(model, x=feed), before)


def test_nodes_get_unique_names() -> None:
    graph = GraphBuilder()
    x = graph.input("x", ["n"])
    for name in ("a", "b", "c", "d"):
        x = graph.op("Relu", [x], name)
    for node, name in zip(graph.nodes, ("act", "", "act", "act_1"), strict=True):
        node.name = name
    model = finished(graph, x, ["n"])
    assert NameNodesPass()(model).modified
    assert [node.name for node in model.graph] == ["act", "Relu", "act_2", "act_1", "end"]
    assert not NameNodesPass()(model).modified


def group_norm_18() -> onnx.ModelProto:
    """GroupNormalization of opset 18: one scale per group; opset 21 has one per channel."""
    builder = GraphBuilder()
    scale, bias = (
        numpy_helper.from_array(np.float32(v), n)
        for v, n in (([2, 3], "scale"), ([0.5, -1], "bias"))
    )
    node = helper.make_node("GroupNormalization", ["x", "scale", "bias"], ["out"], num_groups=2)
    large = numpy_helper.from_array(
        builder.rng.standard_normal((4, 4, 9, 9)).astype(np.float32), "conv.weight"
    )
    conv = helper.make_node("Conv", ["out", "conv.weight"], ["y"], pads=[4, 4, 4, 4])
    shapes = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", 4, 5, 5]) for n in ("x", "y")
    ]
    graph = helper.make_graph([node, conv], "g", shapes[:1], shapes[1:], [scale, bias, large])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def test_raising_the_opset_converts_operators_that_changed() -> None:
    model = ir.from_proto(group_norm_18())
    feed = np.random.default_rng(0).standard_normal((2, 4, 5, 5)).astype(np.float32)
    before = run(model, x=feed)
    raised = normalise(model)
    assert raised.graph.opset_imports[""] == 21
    assert [value.name for value in raised.graph.inputs] == [
        "x"
    ] and "conv.weight" in raised.graph.initializers
    assert "GroupNormalization" not in {node.op_type for node in raised.graph}
    np.testing.assert_allclose(run(raised, x=feed), before, atol=1e-4)


def test_group_norm_per_channel_becomes_instance_norm_with_the_names_kept() -> None:
    graph = GraphBuilder(opset=21)
    x = graph.input("x", ["n", 6, 3, 2])
    weights = [graph.random(f"norm.{part}", 6, scale=1.0) for part in ("weight", "bias")]
    model = finished(
        graph, graph.op("GroupNormalization", [x, *weights], "norm", num_groups=3), ["n", 6, 3, 2]
    )
    feed = graph.rng.standard_normal((2, 6, 3, 2)).astype(np.float32)
    before = run(model, x=feed)
    made = normalise(model)
    np.testing.assert_allclose(run(made, x=feed), before, atol=1e-5)
    assert initializer(made, "norm.weight").shape == (6, 1, 1)
    names = [node.name for node in made.graph]
    assert len(set(names)) == len(names)


def test_a_newer_opset_is_left_alone() -> None:
    graph = GraphBuilder(opset=22)
    model = finished(graph, graph.input("x", ["n"]), ["n"])
    assert not RaiseOpsetPass()(model).modified


def test_widening_removes_casts_that_do_nothing() -> None:
    graph = GraphBuilder()
    x = graph.input("x", ["n", 4])
    half = graph.op("Cast", [x], "down", to=TensorProto.FLOAT16)
    w = graph.weight("w", graph.rng.standard_normal((4, 4)).astype(np.float16))
    wide = graph.op("Cast", [graph.op("MatMul", [half, w], "product")], "up", to=TensorProto.FLOAT)
    model = finished(graph, wide, ["n", 4])
    feed = graph.rng.standard_normal((3, 4)).astype(np.float32)
    before = run(model, x=feed)
    assert WidenPass()(model).modified and not WidenPass()(model).modified
    assert [node.op_type for node in model.graph] == ["MatMul", "Neg"]
    np.testing.assert_allclose(run(model, x=feed), before, atol=2e-2)


@pytest.mark.parametrize("opset", [17, 21])
def test_normalising_twice_changes_nothing(opset: int, tmp_path: Path) -> None:
    from tests.tiny_models import tiny_onnx_denoiser

    once = normalise(ir.from_proto(tiny_onnx_denoiser(opset)))
    first = ir.to_proto(once).SerializeToString(deterministic=True)
    assert ir.to_proto(normalise(once)).SerializeToString(deterministic=True) == first


def bare(graph: GraphBuilder) -> ir.Model:
    """The graph without a single declared type inside, as exporters write it."""
    model = graph.model()
    del model.graph.value_info[:]
    return ir.from_proto(model)


def test_types_that_no_one_declared_are_inferred() -> None:
    graph = GraphBuilder()
    x = graph.input("x", ["n", 8, 4, 4])
    scale, bias = graph.random("norm.weight", 8, scale=1.0), graph.random("norm.bias", 8, scale=0.1)
    # ONNX infers nothing of GroupNormalization, nor of what follows.
    normal = graph.op("GroupNormalization", [x, scale, bias], "norm", num_groups=2)
    again = graph.op(
        "GroupNormalization",
        [graph.conv(normal, "conv", 8, 8), scale, bias],
        "norm_2",
        num_groups=4,
    )
    graph.op("Relu", [again], "relu")
    graph.nodes[-1].output[0] = graph.output("out", ["n", 8, 4, 4])
    model = normalise(bare(graph))
    untyped = [value.name for node in model.graph for value in node.outputs if value.dtype is None]
    assert not untyped
    feed = graph.rng.standard_normal((2, 8, 4, 4)).astype(np.float32)
    np.testing.assert_allclose(
        run(model, x=feed), run(ir.from_proto(graph.model()), x=feed), atol=1e-5
    )


def test_types_are_inferred_where_shapes_lie_in_another_file(tmp_path: Path) -> None:
    # convert_model_to_external_data(size_threshold=0) moves them as well.
    g = GraphBuilder()
    g.input("x", ["N", 4])
    rows = g.op("Reshape", ["x", g.weight("shape", [0, 2, 2])], "rows")
    g.op("Neg", [rows], "neg")
    g.nodes[-1].output[0] = g.output("y", ["N", 2, 2])
    proto, path = g.model(), tmp_path / "model.onnx"
    del proto.graph.value_info[:]
    onnx.save(proto, path, save_as_external_data=True, location="w.bin", size_threshold=0)
    model = normalise(load_model(path))
    assert all(value.dtype == ir.DataType.FLOAT for node in model.graph for value in node.outputs)


def test_outputs_of_foreign_operators_take_the_type_of_their_floats() -> None:
    graph = GraphBuilder()
    x = graph.input("x", ["n", 4])
    graph.nodes.append(
        helper.make_node("QuickGelu", [x], ["g"], name="gelu", domain="com.microsoft")
    )
    graph.op("MatMul", ["g", graph.random("w", 4, 4)], "product")
    graph.nodes[-1].output[0] = graph.output("out", ["n", 4])
    made = helper.make_graph(graph.nodes, "g", graph.inputs, graph.outputs, graph.weights)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = normalise(ir.from_proto(helper.make_model(made, opset_imports=opsets, ir_version=10)))
    assert (
        next(node for node in model.graph if node.op_type == "QuickGelu").outputs[0].dtype
        == ir.DataType.FLOAT
    )


def test_what_the_converter_makes_constants_of_becomes_initializers() -> None:
    """Limits of Clip are attributes until opset 10: the converter writes them as Constant nodes."""
    graph = GraphBuilder(opset=10)
    x = graph.input("x", ["n", 4])
    graph.op(
        "Clip",
        [graph.op("MatMul", [x, graph.random("w", 4, 4)], "product")],
        "clip",
        min=-0.5,
        max=0.5,
    )
    graph.nodes[-1].output[0] = graph.output("out", ["n", 4])
    made = helper.make_graph(graph.nodes, "g", graph.inputs, graph.outputs, graph.weights)
    proto = helper.make_model(made, opset_imports=[helper.make_opsetid("", 10)], ir_version=5)
    feed = graph.rng.standard_normal((3, 4)).astype(np.float32)
    before = run(ir.from_proto(proto), x=feed)
    model = normalise(ir.from_proto(proto))
    assert "Constant" not in [node.op_type for node in model.graph]
    names = [node.name for node in model.graph]
    assert all(names) and len(set(names)) == len(names)
    np.testing.assert_allclose(run(model, x=feed), before, atol=1e-6)


def test_double_precision_becomes_single() -> None:
    graph = GraphBuilder()
    x = graph.op("Cast", [graph.input("x", ["n", 4])], "to_double", to=TensorProto.DOUBLE)
    weight = graph.weight("w", graph.rng.standard_normal((4, 6)))
    single = graph.op(
        "Cast", [graph.op("MatMul", [x, weight], "product")], "to_single", to=TensorProto.FLOAT
    )
    model = finished(graph, single, ["n", 6])
    feed = graph.rng.standard_normal((3, 4)).astype(np.float32)
    before = run(model, x=feed)
    model = normalise(model)
    assert [node.op_type for node in model.graph] == ["MatMul", "Neg"]
    assert initializer(model, "w").dtype == np.float32
    np.testing.assert_allclose(run(model, x=feed), before, rtol=1e-5)


def test_infinite_masks_become_finite_and_softmax_stays() -> None:
    graph = GraphBuilder()
    x = graph.input("x", ["n", 3])
    mask = graph.weight("mask", np.array([0, -np.inf, 0], np.float32))
    above = graph.op(
        "Where",
        [
            graph.weight("keep", np.array([True, True, False])),
            x,
            graph.weight("low", np.float32(-np.inf)),
        ],
        "where",
    )
    model = finished(
        graph, graph.op("Softmax", [graph.op("Add", [above, mask], "add")], "softmax"), ["n", 3]
    )
    feed = graph.rng.standard_normal((2, 3)).astype(np.float32)
    before = run(model, x=feed)
    model = normalise(model)
    assert (
        np.isfinite(initializer(model, "mask")).all()
        and np.isfinite(initializer(model, "low")).all()
    )
    np.testing.assert_array_equal(run(model, x=feed), before)


def test_infinity_that_is_compared_with_stays() -> None:
    graph = GraphBuilder()
    x = graph.input("x", ["n", 3])
    equal = graph.op("Equal", [x, graph.weight("inf", np.float32(np.inf))], "equal")
    model = normalise(
        finished(graph, graph.op("Cast", [equal], "cast", to=TensorProto.FLOAT), ["n", 3])
    )
    assert np.isinf(initializer(model, "inf"))


def test_a_refusal_inside_a_pass_is_said_as_such() -> None:
    graph = GraphBuilder()
    graph.input("x", ["n", 3], TensorProto.FLOAT16)
    then = helper.make_graph(
        [helper.make_node("Neg", ["x"], ["a"])],
        "t",
        [],
        [helper.make_tensor_value_info("a", TensorProto.FLOAT16, None)],
    )
    other = helper.make_graph(
        [helper.make_node("Abs", ["x"], ["b"])],
        "e",
        [],
        [helper.make_tensor_value_info("b", TensorProto.FLOAT16, None)],
    )
    graph.input("yes", [], TensorProto.BOOL)
    graph.op("If", ["yes"], "if", then_branch=then, else_branch=other)
    graph.op("Cast", ["if_out"], "cast", to=TensorProto.FLOAT)
    graph.nodes[-1].output[0] = graph.output("out", ["n", 3])
    with pytest.raises(ModelError, match="known only at run time"):
        normalise(ir.from_proto(graph.model()))


@pytest.mark.parametrize("start", [3, 5])
def test_slices_that_cut_one_weight_up_are_layers(start: int) -> None:
    """Two projections out of one matrix; parts that overlap would take more bytes than it: it stays."""
    graph = GraphBuilder()
    x, both = graph.input("x", ["n", 4]), graph.random("both", 4, 9 if start == 3 else 10)
    axis = graph.weight("axis", np.array([1]))
    products = []
    for name, first in (("a", 0), ("b", start)):
        ends = [graph.weight(f"{name}.{at}", np.array([at])) for at in (first, first + 5)]
        part = graph.op("Slice", [both, *ends, axis], f"{name}.part")
        products.append(graph.op("MatMul", [x, part], name))
    model = finished(graph, graph.op("Mul", products, "times"), ["n", 5])
    feed = np.random.default_rng(0).standard_normal((2, 4)).astype(np.float32)
    before = run(model, x=feed)
    model = normalise(model)
    cut = start == 5
    assert len(layer_graph(model).layers) == (2 if cut else 0)
    assert ("both" in model.graph.initializers) is not cut
    np.testing.assert_allclose(run(model, x=feed), before, rtol=1e-6)
    assert not FoldConstantsPass()(model).modified
