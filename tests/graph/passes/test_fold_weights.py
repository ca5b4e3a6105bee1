"""Weights that a graph computes from weights become weights, with the numbers that the graph gives."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from mpq_deploy.graph import constant_arithmetic
from mpq_deploy.graph.layers import layer_graph
from mpq_deploy.graph.load import normalise
from mpq_deploy.graph.passes import fold_weights
from mpq_deploy.graph.passes.fold_weights import FoldWeightsPass
from tests.graphs import GraphBuilder

Weight = Callable[[GraphBuilder], str]


def standardized(g: GraphBuilder) -> str:
    """(W - mean) / sqrt(variance + 1e-5), per output channel."""
    w = g.random("conv.weight", 8, 4, 3, 3)
    mean = g.op("ReduceMean", [w], "mean", axes=[1, 2, 3])
    centred = g.op("Sub", [w, mean], "centred")
    square = g.op("ReduceMean", [g.op("Mul", [centred, centred], "sq")], "var", axes=[1, 2, 3])
    shifted = g.op("Add", [square, g.weight("eps", np.float32(1e-5))], "shifted")
    return g.op("Div", [centred, g.op("Sqrt", [shifted], "std")], "standard")


def by_batch_norm(g: GraphBuilder) -> str:
    """As timm's StdConv2d does it: the weight as one image that a norm sees."""
    w = g.random("conv.weight", 8, 4, 3, 3)
    flat = g.op("Reshape", [w, g.weight("flat", np.array([1, 8, -1]))], "as_image")
    ones, zeros = g.weight("ones", np.ones(8, "f4")), g.weight("zeros", np.zeros(8, "f4"))
    normal = g.op("InstanceNormalization", [flat, ones, zeros], "norm")
    return g.op("Reshape", [normal, g.op("Shape", [w], "shape")], "as_weight")


def weight_norm(g: GraphBuilder) -> str:
    v = g.random("conv.parametrizations.weight.original1", 8, 4, 3, 3)
    scale = g.random("conv.parametrizations.weight.original0", 8, 1, 1, 1, scale=1.0)
    norm = g.op("ReduceL2", [v], "norm", axes=[1, 2, 3])
    return g.op("Mul", [g.op("Div", [v, norm], "unit"), scale], "weighted")


def low_rank_sum(g: GraphBuilder) -> str:
    w = g.random("conv.weight", 8, 4, 3, 3)
    down, up = g.random("conv.lora_A", 2, 36), g.random("conv.lora_B", 8, 2)
    product = g.op("MatMul", [up, down], "product")
    shaped = g.op("Reshape", [product, g.weight("shape", np.array([8, 4, 3, 3]))], "shaped")
    return g.op("Add", [w, g.op("Mul", [shaped, g.weight("alpha", np.float32(0.7))], "s")], "sum")


def low_rank_alone(g: GraphBuilder) -> str:
    down, up = g.random("conv.lora_A", 2, 36), g.random("conv.lora_B", 8, 2)
    shape = g.weight("shape", np.array([8, 4, 3, 3]))
    return g.op(
        "Reshape", [g.op("Einsum", [up, down], "product", equation="or,rk->ok"), shape], "w"
    )


def model_of(weight: Weight, opset: int = 17) -> ir.Model:
    g = GraphBuilder(opset=opset, seed=1)
    g.input("x", ["n", 4, 6, 6])
    g.op("Conv", ["x", weight(g), g.random("bias", 8)], "conv", pads=[1] * 4)
    g.nodes[-1].output[0] = g.output("out", ["n", 8, 6, 6])
    return ir.from_proto(g.model())


def run(model: ir.Model) -> np.ndarray:
    # As the graph is: the reference must not fold by itself what the pass folds.
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    content = ir.to_proto(model).SerializeToString()
    session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    x = np.random.default_rng(0).standard_normal((2, 4, 6, 6)).astype(np.float32)
    return session.run(None, {"x": x})[0]


@pytest.mark.parametrize(
    ("weight", "name"),
    [
        (standardized, "conv.weight"),
        (by_batch_norm, "conv.weight"),
        (weight_norm, "conv.weight"),
        (low_rank_sum, "conv.weight"),
        (low_rank_alone, "conv.lora_A"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
@pytest.mark.parametrize("kept", [1, 1 << 16])
def test_a_computed_weight_is_a_layer(
    weight: Weight, name: str, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fold_weights, "KEPT", kept)
    expected = run(model_of(weight))
    model = normalise(model_of(weight))
    assert [node.op_type for node in model.graph] == ["Conv"]
    assert [layer.weight for layer in layer_graph(model).layers] == [name]
    assert set(model.graph.initializers) == {name, "bias"}
    lazy = isinstance(model.graph.initializers[name].const_value, ir.LazyTensor)
    assert lazy == (kept == 1)
    np.testing.assert_allclose(run(model), expected, rtol=1e-5, atol=1e-6)


def test_a_weight_that_is_read_elsewhere_keeps_its_name() -> None:
    """Two products of one matrix, one of them standardized: the table of words that is an output layer too."""
    g = GraphBuilder(opset=17)
    table, x = g.random("table", 16, 16), g.input("x", ["n", 16])
    doubled = g.op("Mul", [table, g.weight("two", np.float32(2))], "double")
    first = g.op("MatMul", [x, doubled], "first")
    g.op("MatMul", [first, table], "second")
    g.nodes[-1].output[0] = g.output("out", ["n", 16])
    model = normalise(ir.from_proto(g.model()))
    assert [layer.weight for layer in layer_graph(model).layers] == ["table.folded", "table"]


def test_parts_of_one_computed_weight_are_layers_each() -> None:
    g = GraphBuilder(opset=17)
    x = g.input("x", ["n", 16])
    scaled = g.op("Mul", [g.random("qkv", 16, 32), g.weight("two", np.float32(2))], "double")
    g.op("Split", [scaled], "parts", axis=1)
    g.nodes[-1].output[:] = ["q", "k"]
    both = [g.op("MatMul", [x, part], f"to_{part}") for part in "qk"]
    g.op("Add", both, "sum")
    g.nodes[-1].output[0] = g.output("out", ["n", 16])
    proto = g.model()
    model = normalise(ir.from_proto(proto))
    assert [layer.weight for layer in layer_graph(model).layers] == ["qkv.folded", "qkv.folded.2"]
    found = ir.to_proto(model)
    x_array = np.random.default_rng(0).standard_normal((2, 16)).astype(np.float32)
    values = [
        ort.InferenceSession(one.SerializeToString()).run(None, {"x": x_array})[0]
        for one in (proto, found)
    ]
    np.testing.assert_allclose(values[0], values[1], rtol=1e-5)


def spread(g: GraphBuilder) -> str:
    """A table that is many times what it is made of, and no weight of a layer."""
    return g.op(
        "Expand", [g.random("row", 1, 8, 1, 1), g.weight("to", np.array([1, 8, 6, 6]))], "t"
    )


def drawn(g: GraphBuilder) -> str:
    noise = g.op("RandomNormalLike", [g.random("like", 1, 8, 6, 6)], "noise")
    return g.op("Neg", [noise], "negative")


def dequantized(g: GraphBuilder) -> str:
    codes = g.weight("codes", np.ones((1, 8, 6, 6), np.int8))
    return g.op("DequantizeLinear", [codes, g.weight("scale", np.float32(0.5))], "floats")


@pytest.mark.parametrize("term", [spread, drawn, dequantized])
def test_what_stays(term: Weight) -> None:
    g = GraphBuilder(opset=17)
    conv = g.conv(g.input("x", ["n", 4, 6, 6]), "conv", 8, 4)
    g.op("Add", [conv, term(g)], "end")
    g.nodes[-1].output[0] = g.output("out", ["n", 8, 6, 6])
    model = ir.from_proto(g.model())
    assert not FoldWeightsPass()(model).modified


def test_what_is_too_large_stays_and_is_never_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """An outer product of two long vectors would fill the memory."""
    g = GraphBuilder(opset=17)
    x = g.input("x", ["n", 1 << 20])
    column, row = g.random("column", 1 << 20, 1), g.random("row", 1, 1 << 20)
    g.op("MatMul", [x, g.op("Mul", [column, row], "outer")], "end")
    g.nodes[-1].output[0] = g.output("out", ["n", 1 << 20])
    assert not FoldWeightsPass()(ir.from_proto(g.model())).modified


@pytest.mark.parametrize(
    ("op", "shapes", "attributes"),
    [
        ("Add", [(5, 1), (1, 7)], {}),
        ("Concat", [(5, 2), (5, 3)], {"axis": 1}),
        ("Einsum", [(3, 4), (4, 5)], {"equation": "ij,jk->ik"}),
        ("Expand", [(3, 1), np.array([2, 1, 4])], {}),
        ("Gather", [(6, 3), np.array([[0, 1], [2, 2]])], {"axis": 0}),
        ("Gemm", [(4, 3), (5, 4)], {"transA": 1, "transB": 1}),
        ("MatMul", [(2, 3, 4), (4, 5)], {}),
        ("MatMul", [(4,), (4, 5)], {}),
        ("MatMul", [(3, 4), (4,)], {}),
        ("MatMul", [(2, 3, 4), (2, 4, 5)], {}),
        ("Tile", [(2, 3), np.array([2, 5])], {}),
        ("ReduceSum", [(2, 3)], {}),
    ],
)
def test_the_bound_on_a_value_holds(op: str, shapes: list, attributes: dict) -> None:
    g = GraphBuilder()
    arrays = [s if isinstance(s, np.ndarray) else np.ones(s, np.float32) for s in shapes]
    g.op(op, [g.weight(f"w{i}", array) for i, array in enumerate(arrays)], "one", **attributes)
    made = constant_arithmetic._evaluated(g.nodes[-1], arrays, 21)[0]
    assert made.size <= constant_arithmetic.largest_output(g.nodes[-1], arrays) <= made.size * 8
