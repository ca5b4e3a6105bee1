"""Every pass: a second run changes nothing, and what it requires and ensures is checked."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from mpq_deploy.errors import ModelError
from mpq_deploy.graph import passes
from mpq_deploy.graph.fp16_region import fp16_region
from mpq_deploy.graph.passes.attention_products import AttentionProductsPass
from mpq_deploy.graph.passes.base import GraphPass, run_passes
from mpq_deploy.graph.passes.boolean_where import BooleanWherePass
from mpq_deploy.graph.passes.drop_squeezes import DropSqueezesPass
from mpq_deploy.graph.passes.finite_masks import FiniteMasksPass
from mpq_deploy.graph.passes.first_token import FirstTokenPass
from mpq_deploy.graph.passes.fold_branches import FoldBranchesPass
from mpq_deploy.graph.passes.fold_constants import FoldConstantsPass
from mpq_deploy.graph.passes.fold_positions import FoldPositionsPass
from mpq_deploy.graph.passes.fold_weights import FoldWeightsPass
from mpq_deploy.graph.passes.fp16_arithmetic import Fp16ArithmeticPass
from mpq_deploy.graph.passes.fp16_storage import Fp16StoragePass
from mpq_deploy.graph.passes.group_norm import GroupNormPass
from mpq_deploy.graph.passes.hide_near_neutral import HideNearNeutralPass
from mpq_deploy.graph.passes.infer_types import InferTypesPass
from mpq_deploy.graph.passes.lower_opset import LowerOpsetPass
from mpq_deploy.graph.passes.name_nodes import NameNodesPass
from mpq_deploy.graph.passes.open_batch import OpenBatchPass
from mpq_deploy.graph.passes.raise_opset import RaiseOpsetPass
from mpq_deploy.graph.passes.unroll_sequences import UnrollSequencesPass
from mpq_deploy.graph.passes.widen import WidenPass
from tests.graphs import GraphBuilder

Made = tuple[GraphPass, ir.Model]


def model_of(
    graph: GraphBuilder, last: str, shape: list[int | str], dtype: int = TensorProto.FLOAT
) -> ir.Model:
    graph.op("Neg", [last], "end")
    graph.nodes[-1].output[0] = graph.output("out", shape)
    graph.outputs[-1].type.tensor_type.elem_type = dtype
    return ir.from_proto(graph.model())


def attention_products() -> Made:
    graph = GraphBuilder(opset=23)
    operands = [graph.input(name, ["n", 2, 5, 4]) for name in "qkv"]
    return AttentionProductsPass(), model_of(
        graph, graph.op("Attention", operands, "attend"), ["n", 2, 5, 4]
    )


def boolean_where() -> Made:
    graph = GraphBuilder(opset=20)
    operands = [graph.input(name, ["n", 4], dtype=TensorProto.BOOL) for name in "abc"]
    chosen = graph.op("Where", operands, "choose")
    wide = graph.op("Cast", [chosen], "wide", to=TensorProto.FLOAT)
    return BooleanWherePass(), model_of(graph, wide, ["n", 4])


def drop_squeezes() -> Made:
    graph = GraphBuilder()
    # A number other than one, and a size that the trace left open.
    x = graph.input("x", ["n", "tokens", 3])
    axes = graph.weight("axes", np.array([1, 2]))
    return DropSqueezesPass(), model_of(
        graph, graph.op("Squeeze", [x, axes], "squeeze"), ["n", "tokens", 3]
    )


def finite_masks() -> Made:
    graph = GraphBuilder()
    mask = graph.weight("mask", np.array([0, -np.inf], np.float32))
    return FiniteMasksPass(), model_of(
        graph, graph.op("Add", [graph.input("x", ["n", 2]), mask], "add"), ["n", 2]
    )


def first_token() -> Made:
    graph = GraphBuilder()
    text = graph.input("text", ["n", 5, 4])
    model = model_of(graph, graph.matmul(text, "to_k", 3, 4), ["n", 5, 3])
    return FirstTokenPass("text", np.ones(4)), model


def fold_branches() -> Made:
    graph = GraphBuilder()
    yes, x = graph.weight("yes", np.array(True)), graph.input("x", ["n", 4])
    name = helper.make_tensor_value_info("same", TensorProto.FLOAT, ["n", 4])
    nodes = [helper.make_node("Identity", [x], ["same"], name="hand_on")]
    branch = helper.make_graph(nodes, "branch", [], [name])
    taken = graph.op("If", [yes], "if", then_branch=branch, else_branch=branch)
    return FoldBranchesPass(), model_of(graph, taken, ["n", 4])


def fold_constants() -> Made:
    graph = GraphBuilder()
    weight = graph.op("Transpose", [graph.random("w", 6, 4)], "turn", perm=[1, 0])
    product = graph.op("MatMul", [graph.input("x", ["n", 4]), weight], "product")
    return FoldConstantsPass(), model_of(graph, product, ["n", 6])


def fold_positions() -> Made:
    graph = GraphBuilder()
    fraction = graph.op(
        "Mul", [graph.weight("f", np.float32([0, 1])), graph.weight("o", np.float32(1))], "o_f"
    )
    whole = graph.op("Cast", [fraction], "whole", to=TensorProto.INT64)
    picked = graph.op("Gather", [graph.input("x", [4, 6]), whole], "picked")
    return FoldPositionsPass(), model_of(graph, picked, [2, 6])


def fold_weights() -> Made:
    graph = GraphBuilder()
    half = graph.op("Mul", [graph.random("w", 4, 6), graph.weight("half", np.float32(0.5))], "half")
    product = graph.op("MatMul", [graph.input("x", ["n", 4]), half], "product")
    return FoldWeightsPass(), model_of(graph, product, ["n", 6])


def island() -> ir.Model:
    """A Cos of the timestep, which stays in FP32, added to a product in FP16."""
    graph = GraphBuilder()
    time = graph.op("Cos", [graph.input("timestep", ["n", 1])], "cos")
    product = graph.matmul(graph.input("x", ["n", 4]), "product", 6, 4)
    model = model_of(graph, graph.op("Add", [product, time], "add"), ["n", 6])
    return InferTypesPass()(model).model


def fp16_arithmetic() -> Made:
    model = island()
    return Fp16ArithmeticPass(fp16_region(model, "timestep", "x")), model


def fp16_arithmetic_into_the_island() -> Made:
    """A term that FP16 does not hold reads the result of a product: a Cast to FP32 stands between."""
    graph = GraphBuilder()
    product = graph.matmul(graph.input("x", ["n", 4]), "product", 6, 4)
    total = graph.op("Add", [product, graph.weight("tiny", np.float32(1e-15))], "add")
    model = InferTypesPass()(model_of(graph, total, ["n", 6])).model
    return Fp16ArithmeticPass(fp16_region(model, "", "x")), model


def fp16_storage() -> Made:
    model = island()
    return Fp16StoragePass(fp16_region(model, "timestep", "x")), model


def group_norm() -> Made:
    graph = GraphBuilder()
    weights = [graph.random(name, 4, scale=1.0) for name in ("scale", "bias")]
    normal = graph.op(
        "GroupNormalization", [graph.input("x", ["n", 4, 3]), *weights], "norm", num_groups=2
    )
    return GroupNormPass(), model_of(graph, normal, ["n", 4, 3])


def hide_near_neutral() -> Made:
    graph = GraphBuilder()
    tiny = graph.weight("tiny", np.float32(1e-15))
    return HideNearNeutralPass(), model_of(
        graph, graph.op("Add", [graph.input("x", ["n", 4]), tiny], "add"), ["n", 4]
    )


def infer_types() -> Made:
    graph = GraphBuilder()
    proto = ir.to_proto(
        model_of(graph, graph.op("Relu", [graph.input("x", ["n", 4])], "relu"), ["n", 4])
    )
    del proto.graph.value_info[:]
    return InferTypesPass(), ir.from_proto(proto)


def lower_opset() -> Made:
    graph = GraphBuilder(opset=23)
    return LowerOpsetPass(21), model_of(graph, graph.input("x", ["n", 4]), ["n", 4])


def open_batch() -> Made:
    graph = GraphBuilder()
    shape = graph.weight("shape", np.array([2, 6]))
    flat = graph.op("Reshape", [graph.input("x", [2, 3, 2]), shape], "flat")
    return OpenBatchPass(("x",)), model_of(graph, flat, [2, 6])


def name_nodes() -> Made:
    graph = GraphBuilder()
    x = graph.op("Relu", [graph.input("x", ["n", 4])], "relu")
    model = model_of(graph, x, ["n", 4])
    model.graph[0].name = model.graph[1].name
    return NameNodesPass(), model


def raise_opset() -> Made:
    graph = GraphBuilder(opset=18)
    product = graph.op(
        "MatMul", [graph.input("x", ["n", 40]), graph.random("w", 40, 40)], "product"
    )
    return RaiseOpsetPass(), model_of(graph, product, ["n", 40])


def unroll_sequences() -> Made:
    graph = GraphBuilder()
    split = graph.op("SplitToSequence", [graph.input("x", [2, 4])], "split", axis=1)
    first = graph.op("SequenceAt", [split, graph.weight("first", np.array(0))], "first")
    return UnrollSequencesPass(), model_of(graph, first, [2, 1])


def widen() -> Made:
    graph = GraphBuilder()
    weight = graph.weight("w", np.ones((4, 4), np.float16))
    product = graph.op(
        "MatMul", [graph.input("x", ["n", 4], TensorProto.FLOAT16), weight], "product"
    )
    return WidenPass(), model_of(graph, product, ["n", 4], TensorProto.FLOAT16)


EXAMPLES: list[Callable[[], Made]] = [
    attention_products,
    boolean_where,
    drop_squeezes,
    finite_masks,
    first_token,
    fold_branches,
    fold_constants,
    fold_positions,
    fold_weights,
    fp16_arithmetic,
    fp16_arithmetic_into_the_island,
    fp16_storage,
    group_norm,
    hide_near_neutral,
    infer_types,
    lower_opset,
    name_nodes,
    open_batch,
    raise_opset,
    unroll_sequences,
    widen,
]


def test_every_pass_has_an_example() -> None:
    modules = [
        importlib.import_module(f"{passes.__name__}.{m.name}")
        for m in pkgutil.iter_modules(passes.__path__)
    ]
    classes = {
        one
        for m in modules
        for one in vars(m).values()
        if isinstance(one, type) and issubclass(one, GraphPass)
    }
    assert classes == {GraphPass, *(type(example()[0]) for example in EXAMPLES)}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.__name__)
def test_a_second_run_changes_nothing(example: Callable[[], Made]) -> None:
    one, model = example()
    assert one(model).modified
    first = ir.to_proto(model).SerializeToString(deterministic=True)
    assert not one(model).modified
    assert ir.to_proto(model).SerializeToString(deterministic=True) == first


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.__name__)
def test_what_a_pass_leaves_undone_breaks_what_it_ensures(
    example: Callable[[], Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, model = example()
    monkeypatch.setattr(type(one), "call", lambda self, model: ir.passes.PassResult(model, False))
    with pytest.raises((ir.passes.PostconditionError, ModelError)):
        one(model)


def test_a_region_needs_named_nodes() -> None:
    for example in (fp16_arithmetic, fp16_storage):
        one, model = example()
        model.graph[0].name = model.graph[1].name
        with pytest.raises(ir.passes.PreconditionError, match="NameNodesPass"):
            one(model)


def test_a_norm_needs_known_channels() -> None:
    one, model = group_norm()
    model.graph.inputs[0].shape = None
    with pytest.raises(ModelError, match="'norm' has no known rank and channels"):
        one(model)


def test_a_norm_per_group_needs_weights() -> None:
    one, model = group_norm()
    model.graph.opset_imports[""] = 20
    model.graph.initializers["scale"].const_value = None
    with pytest.raises(
        ModelError, match="'norm' has a scale or bias per group that is not a weight"
    ):
        one(model)


def test_an_opset_is_not_raised_around_functions() -> None:
    one, model = raise_opset()
    body = helper.make_function("d", "F", ["a"], ["b"], [helper.make_node("Neg", ["a"], ["b"])], [])
    function = ir.serde.deserialize_function(body)
    model.functions[function.identifier()] = function
    with pytest.raises(ir.passes.PreconditionError, match="InlinePass"):
        one(model)


def test_a_token_of_another_size_is_refused() -> None:
    _, model = first_token()
    with pytest.raises(ir.passes.PreconditionError, match="'to_k' takes 4 channels"):
        FirstTokenPass("text", np.ones(3))(model)


def test_one_change_of_several_passes_is_said() -> None:
    one, model = fold_constants()
    assert run_passes(model, [NameNodesPass(), one]).modified
    assert not run_passes(model, [NameNodesPass(), one]).modified
