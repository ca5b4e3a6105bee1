"""Fused attention gives the values of the graph as it is written, holds fewer scores, and leaves the rest alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpq_deploy.runtime import fused_attention
from mpq_deploy.runtime.fused_attention import LEAST_SCORES, fuse_attention, fused_proto
from mpq_deploy.runtime.ort import make_session
from tests.graphs import GraphBuilder

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Shape:
    """``heads`` 0: operands without an axis for them; ``factor``: after the scores, "" none."""

    heads: int = 4
    queries: int = 260
    keys: int = 260
    size: int = 8
    value_size: int = 8
    factor: str = ""
    mask: bool = False
    watched: bool = False
    axis: int = -1


def graph(shape: Shape) -> ir.Model:
    """Return Relu(softmax(Q K^T) V) of inputs q, k (transposed) and v."""
    g = GraphBuilder(21)
    middle = [shape.heads] if shape.heads else []
    q = g.input("q", ["N", *middle, shape.queries, shape.size])
    k = g.input("k", ["N", *middle, shape.size, shape.keys])
    v = g.input("v", ["N", *middle, shape.keys, shape.value_size])
    scores = g.op("MatMul", [q, k], "scores")
    if shape.factor:
        scores = g.op(shape.factor, [scores, g.weight("factor", np.float32(0.4))], "scaled")
    if shape.mask:
        mask = np.where(np.arange(shape.keys) % 3, 0, -9).astype(np.float32)
        scores = g.op("Add", [scores, g.weight("mask", mask)], "masked")
    soft = g.op("Softmax", [scores], "soft", axis=shape.axis)
    g.output(
        g.op("Relu", [g.op("MatMul", [soft, v], "product")], "out"),
        ["N", *middle, shape.queries, shape.value_size],
    )
    if shape.watched:
        g.output(soft, ["N", *middle, shape.queries, shape.keys])
    model: ir.Model = ir.from_proto(g.model())
    return model


def feeds(shape: Shape, rows: int) -> dict[str, Array]:
    random = np.random.default_rng(0)
    middle = [shape.heads] if shape.heads else []
    sizes = {
        "q": [shape.queries, shape.size],
        "k": [shape.size, shape.keys],
        "v": [shape.keys, shape.value_size],
    }
    return {n: random.standard_normal((rows, *middle, *s), np.float32) for n, s in sizes.items()}


def as_written(model: bytes, given: dict[str, Array]) -> list[Array]:
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    return list(session.run(None, given))


shapes = st.builds(
    Shape,
    heads=st.sampled_from([0, 1, 2, 3]),
    queries=st.integers(1, 40),
    keys=st.integers(1, 40),
    size=st.integers(1, 20),
    value_size=st.integers(1, 20),
    factor=st.sampled_from(["", "Mul", "Div"]),
)


@settings(max_examples=40, deadline=None)
@given(shapes, st.integers(1, 3))
def test_the_values_are_those_of_the_graph_as_it_is_written(shape: Shape, rows: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused_attention, "LEAST_SCORES", 0)
        proto = ir.to_proto(graph(shape))
        fused = fused_proto(proto)
    assert fused is not None and b"MultiHeadAttention" in fused
    onnx.checker.check_model(proto)
    given = feeds(shape, rows)
    expected = as_written(proto.SerializeToString(), given)
    np.testing.assert_allclose(as_written(fused, given)[0], expected[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "shape",
    [
        Shape(mask=True),
        Shape(watched=True),
        Shape(axis=2, queries=260, keys=260),
        Shape(heads=1, queries=16, keys=16),
    ],
    ids=["mask", "watched", "over the queries", "small"],
)
def test_what_is_no_plain_large_attention_stays(shape: Shape) -> None:
    model = graph(shape)
    before = ir.to_proto(model).SerializeToString()
    assert fuse_attention(model) == 0
    assert ir.to_proto(model).SerializeToString() == before


def test_a_session_of_the_file_is_fused_and_the_file_is_not(tmp_path: Any) -> None:
    shape = Shape()
    path = tmp_path / "model.onnx"
    content = ir.to_proto(graph(shape)).SerializeToString()
    path.write_bytes(content)
    assert shape.heads * shape.queries * shape.keys >= LEAST_SCORES
    session = make_session(path)
    assert path.read_bytes() == content
    given = feeds(shape, 2)
    found = session.run(None, given)[0]
    np.testing.assert_allclose(found, as_written(content, given)[0], rtol=1e-5, atol=1e-5)
    # The names of the outputs are what the caller asks for.
    assert [value.name for value in session.get_outputs()] == ["out_out"]


def test_doing_it_twice_changes_nothing() -> None:
    model = graph(replace(Shape(), factor="Mul"))
    assert fuse_attention(model) == 1
    assert fuse_attention(model) == 0
