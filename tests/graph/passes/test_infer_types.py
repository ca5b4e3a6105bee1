"""Graphs whose constants multiply are refused before anything follows their numbers."""

from __future__ import annotations

import time
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from mpq_deploy.errors import ModelError
from mpq_deploy.graph.load import load_model, normalise
from tests.graphs import GraphBuilder


def joined(times: int, path: Path, *, as_node: bool = False, kind: int = TensorProto.INT64) -> Path:
    """A model that doubles a constant of 4 numbers so many times."""
    constant = helper.make_tensor("c", kind, [4], [1, 2, 3, 4])
    nodes = [helper.make_node("Constant", [], ["c"], value=constant)] if as_node else []
    last = "c"
    for number in range(times):
        nodes.append(helper.make_node("Concat", [last, last], [f"v{number}"], axis=0))
        last = f"v{number}"
    nodes.append(helper.make_node("ReduceMax", [last], ["most"], keepdims=0))
    nodes.append(helper.make_node("Cast", ["most"], ["m"], to=TensorProto.FLOAT))
    nodes.append(helper.make_node("Add", ["x", "m"], ["y"]))
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in "xy")
    graph = helper.make_graph(nodes, "g", [x], [y], [] if as_node else [constant])
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path
    )
    return path


@pytest.mark.parametrize("as_node", [False, True])
@pytest.mark.parametrize("kind", [TensorProto.INT64, TensorProto.FLOAT])
def test_concats_that_double_a_constant_are_refused(
    as_node: bool, kind: int, tmp_path: Path
) -> None:
    path = joined(60, tmp_path / "m.onnx", as_node=as_node, kind=kind)
    started = time.monotonic()
    with pytest.raises(ModelError, match="more than 10,000,000 numbers from its constants"):
        normalise(load_model(path))
    assert time.monotonic() - started < 5


def test_a_few_concats_of_constants_are_taken(tmp_path: Path) -> None:
    model = normalise(load_model(joined(8, tmp_path / "m.onnx")))
    assert any(node.op_type == "Concat" for node in model.graph)


def test_concats_of_what_is_computed_at_run_time_are_taken(tmp_path: Path) -> None:
    """Causal convolutions, as of videos: each puts two further frames before its input."""
    graph = GraphBuilder()
    last = graph.input("x", ["n", 4, 3, 4])
    places = [graph.weight(name, [value]) for name, value in (("zero", 0), ("one", 1), ("two", 2))]
    for number in range(20):
        first = graph.op("Slice", [last, *places], f"s{number}")
        longer = graph.op("Concat", [first, first, last], f"v{number}", axis=2)
        last = graph.conv(longer, f"c{number}", 4, 4, pads=[0, 1, 0, 1])
    graph.output(last, ["n", 4, "rows", 4])
    model = normalise(load_model(graph.save(tmp_path / "m.onnx")))
    assert sum(node.op_type == "Concat" for node in model.graph) == 20
