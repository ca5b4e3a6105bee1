"""A Where between booleans becomes And and Or, and no other does."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from onnx import TensorProto, helper

from mpq_deploy.graph.passes.boolean_where import BooleanWherePass


def choosing(kind: int) -> ir.Model:
    """``Where(condition, first, second)`` of one element type, the second of one row."""
    inputs = [
        helper.make_tensor_value_info("condition", TensorProto.BOOL, ["n", 2]),
        helper.make_tensor_value_info("first", kind, ["n", 2]),
        helper.make_tensor_value_info("second", kind, [1, 2]),
    ]
    output = helper.make_tensor_value_info("chosen", kind, ["n", 2])
    node = helper.make_node("Where", ["condition", "first", "second"], ["chosen"])
    graph = helper.make_graph([node], "choosing", inputs, [output])
    opsets = [helper.make_opsetid("", 20)]
    return ir.from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=10))


def test_booleans_are_chosen_by_and_and_or() -> None:
    model = choosing(TensorProto.BOOL)
    assert BooleanWherePass()(model).modified
    assert [node.op_type for node in model.graph] == ["Not", "And", "And", "Or"]
    assert not BooleanWherePass()(model).modified
    rows = np.array(list(itertools.product([False, True], repeat=2)))
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    session = ort.InferenceSession(proto.SerializeToString())
    for second in ([[False, True]], [[True, False]]):
        feeds = {"condition": rows, "first": rows[::-1].copy(), "second": np.array(second)}
        expected = np.where(rows, rows[::-1], second)
        assert np.array_equal(session.run(None, feeds)[0], expected)


def test_a_where_of_numbers_stays() -> None:
    model = choosing(TensorProto.FLOAT)
    assert not BooleanWherePass()(model).modified
    assert [node.op_type for node in model.graph] == ["Where"]
