"""Attentions are found by their products, and projections by what their outputs feed, whatever nodes are called."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx import helper

from mpq_deploy.graph.attention import (
    attended_layers,
    attentions,
    operand_names,
    projections,
    separate_operands,
)
from mpq_deploy.graph.layers import layer_graph
from tests.graphs import GraphBuilder

WIDTH, HEADS, TOKENS = 16, 2, 6


class Drawn(GraphBuilder):
    """A graph of attentions; projections are named as given."""

    def heads(self, x: str, name: str, turned: bool = False) -> str:
        """[N, T, C] -> [N, heads, T, C / heads], or with the last two axes turned."""
        shape = self.weight("heads", np.array([0, TOKENS, HEADS, WIDTH // HEADS], np.int64))
        split = self.op("Reshape", [x, shape], f"{name}/split")
        return self.op(
            "Transpose", [split], f"{name}/turn", perm=[0, 2, 3, 1] if turned else [0, 2, 1, 3]
        )

    def project(self, x: str, name: str) -> str:
        """A product and its bias."""
        bias = self.random(f"{name}.bias", WIDTH)
        return self.op("Add", [self.matmul(x, name, WIDTH, WIDTH), bias], f"{name}/bias")

    def attend(self, q: str, k: str, v: str, name: str, mask: str = "") -> str:
        """softmax(q k^T) v of tokens."""
        k = self.heads(k, f"{name}/k", turned=True)
        scores = self.op("MatMul", [self.heads(q, f"{name}/q"), k], f"{name}/first")
        scale = self.weight("scale", np.float32(0.35))
        scores = self.op("Mul", [scores, scale], f"{name}/scale")
        if mask:
            scores = self.op("Add", [scores, mask], f"{name}/mask")
        soft = self.op("Softmax", [scores], f"{name}/soft", axis=-1)
        out = self.op("MatMul", [soft, self.heads(v, f"{name}/v")], f"{name}/second")
        out = self.op("Transpose", [out], f"{name}/back", perm=[0, 2, 1, 3])
        shape = self.weight("joined", np.array([0, TOKENS, WIDTH], np.int64))
        return self.op("Reshape", [out, shape], f"{name}/joined")


def drawn(opset: int = 21) -> tuple[Drawn, str]:
    g = Drawn(opset)
    return g, g.op("Relu", [g.input("x", ["N", TOKENS, WIDTH])], "x/relu")


def groups(g: Drawn, *outputs: str) -> list[list[str]]:
    for output in outputs:
        g.output(output, ["N", TOKENS, WIDTH])
    found = projections(layer_graph(ir.from_proto(g.model())))
    return [[layer.name for layer in group] for group in found]


def test_queries_keys_and_values_of_one_input_are_a_group_and_of_a_text_keys_and_values() -> None:
    g, x = drawn()
    text = g.op("Relu", [g.input("text", ["N", TOKENS, WIDTH])], "text/relu")
    attended = x
    for block in "ab":
        names = [f"{block}.{part}" for part in ("one", "two", "three", "four", "five", "six")]
        q, k, v = (g.project(attended, name) for name in names[:3])
        attended = g.project(g.attend(q, k, v, f"{block}.self"), f"{block}.out")
        q = g.project(attended, names[3])
        k, v = (g.project(text, name) for name in names[4:])
        attended = g.project(g.attend(q, k, v, f"{block}.cross"), f"{block}.last")
    assert groups(g, attended) == [
        ["a.one", "a.two", "a.three"],
        ["a.five", "a.six"],
        ["b.one", "b.two", "b.three"],
        ["b.five", "b.six"],
    ]
    assert len(attentions(ir.from_proto(g.model()))) == 4


def test_what_feeds_anything_else_is_no_projection() -> None:
    g, x = drawn()
    q, k, v, gate = (g.project(x, name) for name in ("q", "k", "v", "gate"))
    attended = g.attend(q, k, v, "self")
    gated = g.op("Mul", [attended, g.op("Sigmoid", [gate], "sigmoid")], "gated")
    assert groups(g, g.op("Add", [gated, v], "skip")) == [["q", "k"]]


def test_masks_norms_rotary_positions_and_joint_tokens_are_seen_through() -> None:
    g, x = drawn()
    mask = g.input("mask", ["N", 1, TOKENS, TOKENS])
    rows = g.weight("rows", np.array([WIDTH // 2, WIDTH // 2], np.int64))
    gain, cosine = (g.random(name, WIDTH) for name in ("gain", "cosine"))

    def rotated(tokens: str, name: str) -> str:
        normed = g.op("LayerNormalization", [tokens, gain], f"{name}/norm", axis=-1)
        halves = [f"{name}/left", f"{name}/right"]
        g.nodes.append(helper.make_node("Split", [normed, rows], halves, f"{name}/halves", axis=-1))
        turned = g.op(
            "Concat", [g.op("Neg", [halves[1]], f"{name}/neg"), halves[0]], f"{name}/both", axis=-1
        )
        kept = g.op("Mul", [normed, cosine], f"{name}/cosine")
        return g.op("Add", [kept, g.op("Mul", [turned, cosine], f"{name}/sine")], f"{name}/sum")

    q, k = (rotated(g.project(x, name), name) for name in ("q", "k"))
    other = g.op("Relu", [g.input("y", ["N", TOKENS, WIDTH])], "y/relu")
    q, k, v = (
        g.op("Add", [one, g.project(other, f"y.{name}")], f"{name}/joint")
        for name, one in (("q", q), ("k", k), ("v", g.project(x, "v")))
    )
    assert groups(g, g.attend(q, k, v, "joint", mask)) == [["q", "k", "v"], ["y.q", "y.k", "y.v"]]


def test_the_operator_of_opset_23_and_transposed_products_are_attentions_too() -> None:
    g, x = drawn(opset=23)
    q, k, v = (g.heads(g.project(x, name), name) for name in "qkv")
    whole = g.op("Attention", [q, k, v], "whole")
    q, k, v = (g.project(x, f"t.{name}") for name in "qkv")
    scores = g.op("MatMul", [g.heads(k, "t.k2"), g.heads(q, "t.q2", turned=True)], "t.first")
    soft = g.op("Softmax", [scores], "t.soft", axis=-2)
    turned = g.op("MatMul", [g.heads(v, "t.v2", turned=True), soft], "t.second")
    back = g.op("Transpose", [turned], "t.back", perm=[0, 1, 3, 2])
    assert groups(g, g.op("Add", [whole, back], "sum")) == [["q", "k", "v"], ["t.q", "t.k", "t.v"]]


@pytest.mark.parametrize("axes", [False, True])
def test_products_without_a_softmax_and_convolutions_are_none(axes: bool) -> None:
    g, x = drawn()
    q, k, v = (g.project(x, name) for name in "qkv")
    scores = g.op("MatMul", [g.heads(q, "q2"), g.heads(k, "k2", turned=True)], "first")
    scores = g.op("Relu", [scores], "relu") if axes else scores
    out = g.op("MatMul", [scores, g.heads(v, "v2")], "second")
    assert groups(g, out) == [] and attentions(ir.from_proto(g.model())) == []


def test_operands_that_something_else_reads_are_left_alone() -> None:
    g, x = drawn()
    own = g.attend(*(g.project(x, f"own.{name}") for name in "qkv"), "own")
    q, k, v = (g.project(x, name) for name in "qkv")
    shared = g.attend(q, k, v, "shared")
    seen = g.op("ReduceMean", ["shared/soft_out"], "seen", keepdims=0)
    g.output(g.op("Add", [g.op("Add", [own, shared], "sum"), seen], "end"), ["N", TOKENS, WIDTH])
    model = ir.from_proto(g.model())
    (found,) = separate_operands(model)
    assert (found.name, found.scores) == ("own/second", "own/first")
    assert found.tensors == ("own/q/turn_out", "own/k/turn_out", "own/v/turn_out")
    assert found.probabilities == "own/soft_out"
    assert operand_names(model) == found.tensors


def test_attended_are_the_projections_of_queries_keys_and_values_alone() -> None:
    g, x = drawn()
    q, k, v = (g.project(x, name) for name in ("q", "k", "v"))
    g.output(g.project(g.attend(q, k, v, "one"), "out"), ["N", TOKENS, WIDTH])
    assert attended_layers(layer_graph(ir.from_proto(g.model()))) == {"q", "k", "v"}


def test_what_no_attention_multiplies_is_not_attended() -> None:
    g = GraphBuilder()
    g.input("x", ["N", 8, 16])
    plain = g.matmul("x", "first", 16, 16)
    g.op("MatMul", [plain, g.weight("stack", g.rng.normal(size=(1, 16, 4)))], "stacked")
    g.output(g.nodes[-1].output[0], ["N", 8, 4])
    assert attended_layers(layer_graph(ir.from_proto(g.model()))) == frozenset()
