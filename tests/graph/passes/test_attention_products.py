"""Attention as products against ONNX Runtime's own operator, form by form."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from mpq_deploy.graph.load import normalise
from tests.graphs import GraphBuilder

HEADS = {"q": ["n", 4, 5, 8], "k": ["n", 4, 6, 8], "v": ["n", 4, 6, 8]}
GROUPED = {"q": ["n", 4, 5, 8], "k": ["n", 2, 6, 8], "v": ["n", 2, 6, 8]}
FLAT = {"q": ["n", 5, 32], "k": ["n", 6, 16], "v": ["n", 6, 16]}
COUNTS = {"q_num_heads": 4, "kv_num_heads": 2}
Shapes = dict[str, list[int | str]]


def built(shapes: Shapes, mask: tuple[str, list[int | str]] | None, attributes: Any) -> ir.Model:
    graph = GraphBuilder(opset=23)
    inputs = [graph.input(name, shape) for name, shape in shapes.items()]
    if mask is not None:
        kind, shape = mask
        inputs.append(graph.input("mask", shape, getattr(TensorProto, kind)))
    graph.op("Attention", inputs, "attend", **attributes)
    graph.nodes[-1].output[0] = graph.output("out", [None] * len(shapes["q"]))
    return ir.from_proto(graph.model())


def run(model: ir.Model) -> np.ndarray:
    content = ir.to_proto(model).SerializeToString()
    session = ort.InferenceSession(content, providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    feeds = {}
    for value in session.get_inputs():
        drawn = rng.standard_normal([s if isinstance(s, int) else 2 for s in value.shape])
        feeds[value.name] = drawn > -0.5 if "bool" in value.type else drawn.astype(np.float32)
    return session.run(None, feeds)[0]


@pytest.mark.parametrize(
    ("shapes", "mask", "attributes"),
    [
        (HEADS, None, {}),
        (HEADS, None, {"scale": 0.1}),
        (HEADS, None, {"is_causal": 1}),
        (HEADS, None, {"softcap": 2.0}),
        (HEADS, ("FLOAT", [5, 6]), {}),
        (HEADS, ("FLOAT", ["n", 1, 5, 6]), {"softcap": 3.0}),
        (HEADS, ("BOOL", [5, 6]), {}),
        (HEADS, ("BOOL", ["n", 4, 5, 6]), {}),
        (GROUPED, None, {}),
        (FLAT, None, COUNTS),
        (FLAT, ("FLOAT", [5, 6]), {**COUNTS, "scale": 0.3}),
    ],
    ids=lambda value: str(value).replace(" ", "")[:40],
)
def test_products_give_the_same(shapes: Shapes, mask: Any, attributes: Any) -> None:
    old = tuple(map(int, ort.__version__.split(".")[:2])) < (1, 27)
    if old and mask and "softcap" in attributes:
        pytest.skip("ONNX Runtime before 1.27 computes a softcap beside a mask otherwise")
    expected = run(built(shapes, mask, attributes))
    model = normalise(built(shapes, mask, attributes))
    assert "Attention" not in {node.op_type for node in model.graph}
    np.testing.assert_allclose(run(model), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("shapes", "attributes"),
    [
        (
            {"q": ["n", 4, "s", 8], "k": ["n", 4, "s", 8], "v": ["n", 4, "s", 8]},
            {"is_causal": 1},
        ),
        ({"q": ["n", "h", 5, 8], "k": ["n", "h", 6, 8], "v": ["n", "h", 6, 8]}, {}),
        ({"q": ["n", 4, 5, "d"], "k": ["n", 4, 6, "d"], "v": ["n", 4, 6, 8]}, {}),
    ],
)
def test_forms_whose_sizes_are_needed_and_unknown_stay(shapes: Shapes, attributes: Any) -> None:
    model = normalise(built(shapes, None, attributes))
    assert [node.op_type for node in model.graph] == ["Attention"]


def test_further_outputs_stay() -> None:
    graph = GraphBuilder(opset=23)
    inputs = [graph.input(name, shape) for name, shape in HEADS.items()]
    node = helper.make_node("Attention", inputs, ["out", "", "", "scores"], name="attend")
    graph.nodes.append(node)
    graph.output("out", ["n", 4, 5, 8])
    graph.output("scores", ["n", 4, 5, 6])
    model = normalise(ir.from_proto(graph.model()))
    assert [one.op_type for one in model.graph] == ["Attention"]
