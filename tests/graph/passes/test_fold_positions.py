"""Buckets of relative positions, as T5 sorts them, become constants with the numbers of the graph."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from onnx import numpy_helper

from mpq_deploy.graph.load import normalise
from mpq_deploy.graph.passes.fold_positions import FoldPositionsPass
from tests.graphs import GraphBuilder

TOKENS, BUCKETS = 100, 8


def buckets(g: GraphBuilder) -> str:
    """min(4 + log(distance / 4) / log(16) * 4, 7), and the distance itself below 4."""
    places = np.arange(TOKENS)
    away = g.op("Abs", [g.weight("away", places[:, None] - places[None])], "abs")
    few = g.weight("few", np.int64(4))
    wide = g.op("Cast", [away], "wide", to=1)
    log = g.op("Log", [g.op("Div", [wide, g.weight("four", np.float32(4))], "share")], "log")
    scaled = g.op("Mul", [log, g.weight("scale", np.float32(4 / np.log(16)))], "scaled")
    far = g.op("Add", [g.op("Cast", [scaled], "whole", to=7), few], "far")
    most = g.op("Min", [far, g.weight("last", np.int64(BUCKETS - 1))], "most")
    return g.op("Where", [g.op("Less", [away, few], "near"), away, most], "bucket")


def biased() -> GraphBuilder:
    """A bias per bucket, added to scores."""
    g = GraphBuilder(opset=17)
    bias = g.op("Gather", [g.random("bias", BUCKETS, 1, scale=1.0), buckets(g)], "bias_of")
    flat = g.op("Squeeze", [bias, g.weight("axis", np.array([2]))], "flat")
    g.op("Add", [g.input("x", ["n", TOKENS, TOKENS]), flat], "sum")
    g.nodes[-1].output[0] = g.output("out", ["n", TOKENS, TOKENS])
    return g


def test_buckets_of_positions_are_constants() -> None:
    """No logarithm of 0 is left, and the table of biases stays as small as it is."""
    plain = biased().model()
    folded = ir.to_proto(normalise(ir.from_proto(plain)))
    assert {node.op_type for node in folded.graph.node} == {"Gather", "Squeeze", "Add"}
    stored = sum(len(numpy_helper.to_array(one).tobytes()) for one in folded.graph.initializer)
    assert stored < 4 * TOKENS**2 + 100
    feeds = {"x": np.zeros((1, TOKENS, TOKENS), np.float32)}
    here, there = (
        ort.InferenceSession(one.SerializeToString()).run(None, feeds)[0] for one in (plain, folded)
    )
    np.testing.assert_array_equal(here, there)


def test_counting_in_integers_stays() -> None:
    """It is exact in any precision, and smaller than what it gives."""
    g = GraphBuilder(opset=17)
    row = g.weight("row", np.arange(TOKENS)[None] % 2)
    places = g.op("Add", [row, g.weight("column", np.arange(TOKENS)[:, None] % 2)], "places")
    bias = g.op("Gather", [g.random("bias", BUCKETS, 3), places], "bias_of")
    g.op("Add", [g.input("x", ["n", TOKENS, TOKENS, 3]), bias], "sum")
    g.nodes[-1].output[0] = g.output("out", ["n", TOKENS, TOKENS, 3])
    assert not FoldPositionsPass()(ir.from_proto(g.model())).modified
