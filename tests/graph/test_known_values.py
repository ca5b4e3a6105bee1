"""Values that follow from constants and sizes, against ONNX's reference of each operator."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from mpq_deploy.graph.known_values import known_values
from tests.graphs import GraphBuilder

GRID = np.arange(10).reshape(5, 2)
LAST = -9223372036854775807


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


@pytest.mark.parametrize(
    ("op", "inputs", "attributes"),
    [
        ("Add", [ints(1, 2), np.array(3)], {}),
        ("Div", [ints(7, -7, 7, -7), ints(2, 2, -2, -2)], {}),
        ("Mul", [ints(2, 3), ints(4, 5)], {}),
        ("Equal", [ints(1, 2), ints(1, 3)], {}),
        ("Less", [ints(1, 2), np.array(2)], {}),
        ("Where", [np.array([True, False]), ints(1, 2), ints(3, 4)], {}),
        ("Cast", [ints(0, 2)], {"to": TensorProto.BOOL}),
        ("Concat", [ints(1, 2), ints(3)], {"axis": 0}),
        ("ConstantOfShape", [ints(3)], {"value": numpy_helper.from_array(ints(4))}),
        ("Gather", [ints(4, 5, 6), np.array(-1)], {}),
        ("Gather", [GRID, ints(0, 2)], {"axis": 0}),
        ("Reshape", [GRID, ints(-1)], {}),
        ("Slice", [ints(1, 2, 3), ints(1), ints(9)], {}),
        ("Slice", [GRID, ints(-1), ints(LAST), ints(0), ints(-1)], {}),
        ("Slice", [GRID, ints(1, 0), ints(4, 1), ints(0, 1), ints(2, 1)], {}),
        ("Squeeze", [ints(5), ints(0)], {}),
        ("Squeeze", [GRID[:, :1], ints(1)], {}),
        ("Transpose", [GRID], {}),
        ("Unsqueeze", [ints(1, 2), ints(1)], {}),
    ],
)
def test_an_operator_is_followed(op: str, inputs: list[np.ndarray], attributes: Any) -> None:
    graph = GraphBuilder()
    names = [graph.weight(f"w{place}", array) for place, array in enumerate(inputs)]
    graph.op(op, names, "one", **attributes)
    made = helper.make_graph(
        graph.nodes, "g", [], [helper.make_empty_tensor_value_info("one_out")], graph.weights
    )
    proto = helper.make_model(made, opset_imports=[helper.make_opsetid("", 21)])
    wanted = ReferenceEvaluator(proto).run(None, {})[0]
    found = known_values(proto, {})["one_out"]
    assert found.shape == wanted.shape
    assert found.tolist() == wanted.tolist()


def test_a_size_that_varies_stays_unknown_and_others_do_not() -> None:
    graph = GraphBuilder()
    graph.input("x", ["n", "rows", 3])
    shape = graph.op("Shape", ["x"], "shape")
    rows = graph.op("Gather", [shape, graph.weight("one", np.array(1))], "rows")
    graph.op("Mul", [rows, graph.weight("two", np.array(2))], "twice")
    batch = graph.op("Gather", [shape, graph.weight("zero", np.array(0))], "batch")
    graph.op("Add", [batch, batch], "both")
    graph.op("Size", ["x"], "size")
    graph.op("Neg", ["x"], "end")
    graph.nodes[-1].output[0] = graph.output("out", ["n", "rows", 3])
    values = known_values(graph.model(), {"x": (None, 4, 3)})
    assert values["shape_out"].tolist() == [None, 4, 3]
    assert values["twice_out"].item() == 8
    assert values["both_out"].item() is None
    assert values["size_out"].item() is None


def test_shapes_made_of_values_that_onnx_does_not_follow_are_handed_back() -> None:
    """``local_response_norm`` as TorchScript writes it: pads turned round, then a pooled size."""
    graph = GraphBuilder(opset=17)
    graph.input("x", ["n", 4, "h", "w"])
    h = graph.op(
        "Gather", [graph.op("Shape", ["x"], "shape"), graph.weight("two", np.array([2]))], "h"
    )
    wanted = [graph.weight("batch", ints(-1)), graph.weight("one", ints(1)), h]
    target = graph.op("Concat", [*wanted, graph.weight("rest", ints(32))], "target", axis=0)
    shaped = graph.op("Reshape", ["x", target], "shaped")
    pairs = graph.weight("pairs", np.array([[0, 0], [1, 1], [0, 0], [0, 0]]))
    back = [
        graph.weight(name, ints(v)) for name, v in (("s", -1), ("e", LAST), ("a", 0), ("t", -1))
    ]
    turned = graph.op(
        "Transpose", [graph.op("Slice", [pairs, *back], "back")], "turned", perm=[1, 0]
    )
    pads = graph.op("Reshape", [turned, graph.weight("flat", ints(-1))], "pads")
    pooled = graph.op(
        "MaxPool", [graph.op("Pad", [shaped, pads], "padded")], "pooled", kernel_shape=[2, 2]
    )
    graph.op("Shape", [pooled], "found")
    graph.op("Neg", [pooled], "end")
    graph.nodes[-1].output[0] = graph.output("out", ["n", "a", "b", "c"])
    values = known_values(graph.model(), {"x": (None, 4, 8, 8)})
    assert values["found_out"].tolist() == [None, 1, 9, 31]
