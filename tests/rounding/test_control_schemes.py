"""Which controls a target takes, and which scheme each layer has under them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mpq_deploy.engine.target import load_target
from mpq_deploy.graph.layers import LayerGraph, layer_graph
from mpq_deploy.graph.load import load_model
from mpq_deploy.rounding.control_schemes import (
    control_plans,
    layer_counts,
    tensor_ranks,
)
from tests.graphs import GraphBuilder, denoiser_graph

QKV = {"attn.to_q", "attn.to_k", "attn.to_v"}


def opened(graph: GraphBuilder, folder: Path) -> LayerGraph:
    return layer_graph(load_model(graph.save(folder / "model.onnx")))


@pytest.fixture
def graph(tmp_path: Path) -> LayerGraph:
    return opened(denoiser_graph(channels=16, size=8), tmp_path)


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("rtx", {"int8", "int8-static", "int4"}),
        ("rtx-ada", {"int8", "int8-static", "int4", "fp8"}),
        ("rtx-blackwell", {"int8", "int8-static", "int4", "fp8", "fp4", "nvidia"}),
        ("jetson-thor", {"int8", "int8-static", "int4", "fp8"}),
        ("jetson-thor-jp7", {"int8", "int8-static", "int4", "fp8", "fp4", "nvidia"}),
        ("simulate", {"int8", "int8-static", "int4"}),
    ],
)
def test_controls_follow_the_target(graph: LayerGraph, target: str, expected: set[str]) -> None:
    plans = control_plans(graph, load_target(target))
    assert set(plans) == expected
    assert all(set(plan) == {layer.name for layer in graph.layers} for plan in plans.values())


def test_everything_in_one_format_and_nvidias_rule(graph: LayerGraph) -> None:
    plans = control_plans(graph, load_target("rtx-blackwell"))
    for layer in graph.layers:
        scheme = {name: plan[layer.name].name for name, plan in plans.items()}
        conv = layer.op == "Conv"
        assert scheme["fp8"] == "f8a8"
        assert scheme["fp4"] == ("f8a8" if conv else "nvfp4")
        by_rule = "f8a8" if conv else "fp16" if layer.name in QKV else "nvfp4"
        assert scheme["nvidia"] == by_rule
    assert layer_counts(s.name for s in plans["nvidia"].values()) == {
        "f8a8": sum(layer.op == "Conv" for layer in graph.layers),
        "nvfp4": sum(layer.op != "Conv" for layer in graph.layers) - 3,
        "fp16": 3,
    }


def test_where_fp4_is_not_possible_fp4_has_fp8_and_nvidias_rule_fp16(tmp_path: Path) -> None:
    """Blocks of 16 do not divide one layer's reduction; the other's input has four dimensions."""
    g = GraphBuilder()
    g.input("x", ["N", 4, 8, 24])
    wide = g.matmul("x", "uneven", 32, 24)
    g.matmul(wide, "four", 16, 32)
    flat = g.op("Flatten", [g.nodes[-1].output[0]], "flat", axis=3)
    g.output(g.matmul(flat, "two", 16, 16), ["M", 16])
    graph = opened(g, tmp_path)
    assert tensor_ranks(graph)["x"] == 4
    plans = control_plans(graph, load_target("rtx-blackwell"))
    names = ("uneven", "four", "two")
    assert [plans["fp4"][name].name for name in names] == ["f8a8", "f8a8", "nvfp4"]
    assert [plans["nvidia"][name].name for name in names] == ["fp16", "fp16", "nvfp4"]
    # With no layer left for FP4, both would be something else under its name.
    left = replace(graph, layers=graph.layers[:2])
    assert {"fp4", "nvidia"}.isdisjoint(control_plans(left, load_target("rtx-blackwell")))
