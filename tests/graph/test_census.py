"""Every Conv, Gemm and MatMul is counted: as a layer, or with the reason why it is none."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from mpq_deploy.errors import InfeasibleBudgetError, UsageError
from mpq_deploy.graph.census import Census, take_census
from mpq_deploy.graph.layers import layer_graph
from tests.graphs import GraphBuilder, denoiser_graph
from tests.pipeline.runs import build, recipe_for, save_denoiser


def census_of(graph: GraphBuilder, last: str, rank: int = 3) -> Census:
    graph.op("Neg", [last], "end")
    graph.nodes[-1].output[0] = graph.output("out", [f"size_{axis}" for axis in range(rank)])
    return take_census(layer_graph(ir.from_proto(graph.model())))


def reasons(census: Census) -> dict[str, tuple[int, int]]:
    return {other.reason: (other.nodes, other.bytes) for other in census.others}


def test_layers_and_attention() -> None:
    graph = GraphBuilder()
    x = graph.input("x", ["n", 4, 8])
    q, k = graph.matmul(x, "q", 8, 8), graph.matmul(x, "k", 8, 8)
    turned = graph.op("Transpose", [k], "turn", perm=[0, 2, 1])
    census = census_of(graph, graph.op("MatMul", [q, turned], "scores"))
    assert (census.nodes, census.bytes) == (2, 2 * 2 * 64)
    assert reasons(census) == {"multiply two activations": (1, 0)}
    assert census.text() == (
        "2 of 3 Conv, Gemm and MatMul are layers (0.00 MB in FP16). No layers: 1 multiply two activations."
    )


def test_a_shared_weight_counts_its_nodes_and_its_bytes_once() -> None:
    graph = GraphBuilder()
    x = graph.input("x", ["n", 8])
    w = graph.random("w", 8, 8)
    census = census_of(
        graph, graph.op("MatMul", [graph.op("MatMul", [x, w], "first"), w], "second"), 2
    )
    assert (census.nodes, census.bytes, census.others) == (2, 128, ())


def test_a_weight_computed_from_constants_or_from_inputs() -> None:
    graph = GraphBuilder()
    x = graph.input("x", ["n", 4, 8, 8])
    w = graph.random("w", 4, 4, 3, 3)
    mean = graph.op("ReduceMean", [w], "mean", keepdims=1)
    standard = graph.op("Sub", [w, mean], "standard")
    h = graph.op("Conv", [x, standard], "conv", pads=[1, 1, 1, 1])
    style = graph.input("style", [4, 4, 3, 3])
    h = graph.op("Conv", [h, graph.op("Mul", [w, style], "styled")], "by_style", pads=[1, 1, 1, 1])
    assert reasons(census_of(graph, h, 4)) == {
        "have a weight that the graph computes at run time": (1, 2 * 144),
        "have a weight that depends on the model's inputs": (1, 0),
    }


def test_forms_that_no_scheme_takes_say_why() -> None:
    graph = GraphBuilder()
    x = graph.input("x", [2, 4, 8])
    batch = graph.op("MatMul", [x, graph.random("batch", 2, 8, 8)], "batched")
    left = graph.op("MatMul", [graph.random("left", 4, 4), batch], "left")
    found = reasons(census_of(graph, left))
    assert found == {
        "are left out: a MatMul weight of 3 dimensions is a batch of matrices": (1, 256),
        "are left out: the weight is the left operand, which TensorRT cannot take in INT4 blocks": (
            1,
            32,
        ),
    }


def test_products_of_branches_are_counted() -> None:
    graph = GraphBuilder()
    x = graph.input("x", [8, 8])
    inner = helper.make_graph(
        [helper.make_node("MatMul", ["x", "x"], ["inner"], "inner")],
        "branch",
        [],
        [helper.make_tensor_value_info("inner", TensorProto.FLOAT, [8, 8])],
    )
    condition = graph.input("on", [], TensorProto.BOOL)
    chosen = graph.op("If", [condition], "if", then_branch=inner, else_branch=inner)
    census = census_of(graph, graph.op("Add", [chosen, x], "sum"), 2)
    assert reasons(census) == {"lie inside a subgraph": (2, 0)}


def with_norm_of_weights(folder: Path) -> Path:
    graph = denoiser_graph(channels=16, size=8)
    (last,) = (node for node in graph.nodes if node.output[0] == "out_sample")
    last.output[0] = "before"
    weight = graph.random("late.weight", 3, 3, 64, 64)
    flat = graph.op(
        "ReduceSum", [weight, graph.weight("late.axes", np.array([2, 3]))], "late/sum", keepdims=1
    )
    graph.op("Conv", ["before", flat], "late")
    graph.nodes[-1].output[0] = "out_sample"
    return save_denoiser(folder, graph)


def test_the_export_says_it_and_an_infeasible_budget_says_it_again(tmp_path: Path) -> None:
    recipe = recipe_for(with_norm_of_weights(tmp_path), budget=0.01)
    built = build(recipe, tmp_path / "run", "export")
    facts = json.loads((built.run / "export" / "facts.json").read_text(encoding="utf-8"))
    (line,) = (line for line in built.said if "are layers" in line)
    assert "multiply two activations" in line
    products = facts["products"]
    assert products["layer_nodes"] == facts["layers"] and len(products["others"]) >= 1
    with pytest.raises(InfeasibleBudgetError) as caught:
        build(recipe, tmp_path / "run", "allocate")
    assert line.strip() in str(caught.value)


def test_a_graph_without_layers_says_what_it_has_instead(tmp_path: Path) -> None:
    graph = GraphBuilder()
    x = graph.input("sample", ["N", 3, 8, 8])
    t = graph.input("timestep", ["N"])
    column = graph.op("Reshape", [t, graph.weight("shape", np.array([-1, 1, 1, 1]))], "column")
    product = graph.op("MatMul", [x, x], "square")
    graph.op("Add", [product, column], "sum")
    graph.nodes[-1].output[0] = graph.output("out_sample", ["N", 3, 8, 8])
    path = save_denoiser(tmp_path, graph)
    with pytest.raises(
        UsageError, match=r"0 of 1 Conv, Gemm and MatMul are layers.*two activations"
    ):
        build(recipe_for(path), tmp_path / "run", "export")
