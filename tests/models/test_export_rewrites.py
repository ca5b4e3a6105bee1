"""The exporter's optimizer gives what it gives by itself, without trying every rule at every node."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

pytest.importorskip("onnxscript")

import onnxscript.optimizer
from onnxscript.rewriter import _matcher

from mpq_deploy.models.export_rewrites import optimize
from tests.graphs import GraphBuilder


def graph() -> ir.Model:
    """A chain of what the rules concern: slices that are one Split, casts, reshapes, a Mul by 1."""
    g = GraphBuilder(opset=20)
    x = g.input("x", [4, 8])
    one = g.weight("one", np.float32([1]))
    bounds = {n: g.weight(f"at_{n}", np.array([n], np.int64)) for n in (0, 1, 4, 8)}
    x = g.op("Mul", [g.op("Relu", [g.op("Relu", [x], "first")], "second"), one], "scaled")
    for number in (0, 1):
        x = g.op("Transpose", [x], f"transposed_{number}", perm=[1, 0])
    halves = [
        g.op("Slice", [x, bounds[low], bounds[high], bounds[1]], f"half_{low}")
        for low, high in ((0, 4), (4, 8))
    ]
    g.op("Concat", halves[::-1], "turned", axis=1)
    g.nodes[-1].output[0] = g.output("y", [4, 8])
    return ir.from_proto(g.model())


def test_the_result_is_that_of_the_optimizer_alone() -> None:
    ours, theirs = graph(), graph()
    optimize(ours)
    onnxscript.optimizer.optimize_ir(theirs)
    assert len(list(ours.graph)) < len(list(graph().graph))
    here, there = (
        ir.to_proto(model).SerializeToString(deterministic=True) for model in (ours, theirs)
    )
    assert here == there


def test_a_rule_sees_only_nodes_of_the_operator_that_it_ends_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = []
    original = _matcher.SimplePatternMatcher.match

    def counted(self: Any, model: Any, graph: Any, node: ir.Node, **options: Any) -> Any:
        seen.append((self.pattern.output_nodes[0].op_identifier(), node.op_identifier()))
        return original(self, model, graph, node, **options)

    monkeypatch.setattr(_matcher.SimplePatternMatcher, "match", counted)
    optimize(graph())
    assert seen and all(last in (None, node) for last, node in seen)
    assert _matcher.SimplePatternMatcher.match is counted
