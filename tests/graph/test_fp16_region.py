"""What stays in FP32: scalars that FP16 does not hold, and what follows them."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto
from onnx.helper import (
    make_graph,
    make_model,
    make_node,
    make_opsetid,
    make_tensor,
    make_tensor_value_info,
)
from onnx.numpy_helper import from_array

from mpq_deploy.graph.fp16_region import fp16_region
from mpq_deploy.graph.passes.fp16_arithmetic import Fp16ArithmeticPass
from mpq_deploy.graph.passes.fp16_storage import Fp16StoragePass


def ratio(op: str, scalar: float, *between: str) -> ir.Model:
    """y = x / f(x op scalar), after a convolution's weight would have made x: no position is read."""
    nodes = [
        make_node("Relu", ["x"], ["r"], name="relu"),
        make_node(op, ["r", "c"], ["d0"], name="term"),
    ]
    for number, root in enumerate(between):
        nodes.append(make_node(root, [f"d{number}"], [f"d{number + 1}"], name=root))
    nodes.append(make_node("Div", ["x", f"d{len(between)}"], ["q"], name="quotient"))
    nodes.append(make_node("Neg", ["q"], ["y"], name="after"))
    values = [make_tensor_value_info(name, TensorProto.FLOAT, [2, 4]) for name in ("r", "q", "y")]
    values += [
        make_tensor_value_info(f"d{number}", TensorProto.FLOAT, [2, 4])
        for number in range(len(between) + 1)
    ]
    graph = make_graph(
        nodes,
        "g",
        [
            make_tensor_value_info("x", TensorProto.FLOAT, [2, 4]),
            make_tensor_value_info("t", TensorProto.FLOAT, [1]),
        ],
        [make_tensor_value_info("y", TensorProto.FLOAT, [2, 4])],
        [from_array(np.array(scalar, np.float32), "c")],
        value_info=[value for value in values if value.name != "y"],
    )
    return ir.from_proto(make_model(graph, opset_imports=[make_opsetid("", 21)], ir_version=10))


@pytest.mark.parametrize(
    ("op", "scalar", "between", "kept"),
    [
        ("Add", 1e-15, (), {"term", "quotient"}),
        ("Max", 1e-12, ("Sqrt",), {"term", "Sqrt", "quotient"}),
        ("Sub", -1e-30, ("Sqrt", "Reciprocal"), {"term", "Sqrt", "Reciprocal", "quotient"}),
        ("Mul", 1e6, (), {"term", "quotient"}),
        ("Add", 1e-6, (), set()),  # in FP16 a subnormal number, not 0
        ("Add", 0.0, (), set()),
        ("Add", -3.4e38, (), set()),  # a mask's
        ("Mul", 3.0, ("Sqrt",), set()),
    ],
)
def test_scalars_beyond_fp16_keep_their_nodes_in_fp32(
    op: str, scalar: float, between: tuple[str, ...], kept: set[str]
) -> None:
    assert fp16_region(ratio(op, scalar, *between), "t", "x").nodes32 == kept


@pytest.mark.parametrize("finish", [Fp16ArithmeticPass, Fp16StoragePass])
def test_a_term_that_keeps_a_divisor_from_zero_still_does(finish: object) -> None:
    model = ratio("Add", 1e-15)
    region = fp16_region(model, "t", "x")
    finish(region)(model)  # type: ignore[operator]
    session = ort.InferenceSession(
        ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    kind = np.float16 if "float16" in session.get_inputs()[0].type else np.float32
    x = np.array([[0, 0, 1, 2], [0, 3, 0, 4]], kind)
    (y,) = session.run(
        None, {"x": x, **({"t": np.zeros(1, np.float32)} if len(session.get_inputs()) > 1 else {})}
    )
    np.testing.assert_array_equal(y, -(x > 0).astype(kind))


def test_operators_that_take_no_fp16_stay_in_fp32() -> None:
    """Range and Celu are defined for FP32 alone: ONNX Runtime refused the FP16 graph."""
    nodes = [
        make_node("Celu", ["x"], ["a"], name="celu"),
        make_node("Range", ["c0", "c4", "c1"], ["r"], name="range"),
    ]
    nodes.append(make_node("Mul", ["a", "r"], ["y"], name="mul"))
    rows = make_tensor_value_info("x", TensorProto.FLOAT, [2, 4])
    graph = make_graph(
        nodes,
        "g",
        [rows, make_tensor_value_info("t", TensorProto.FLOAT, [1])],
        [make_tensor_value_info("y", TensorProto.FLOAT, [2, 4])],
        [from_array(np.array(n, np.float32), f"c{n}") for n in (0, 1, 4)],
        value_info=[
            make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("a", [2, 4]), ("r", [4]))
        ],
    )
    model = ir.from_proto(make_model(graph, opset_imports=[make_opsetid("", 21)], ir_version=10))
    region = fp16_region(model, "t", "x")
    assert region.nodes32 == {"celu", "range"}
    Fp16ArithmeticPass(region)(model)
    session = ort.InferenceSession(
        ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    x = np.array([[1, -1, 2, 0.5], [0, 3, -2, 1]], np.float16)
    feeds = {"x": x, "t": np.zeros(1, np.float32)}
    given = {
        i.name: feeds[i.name].astype({"tensor(float16)": np.float16}.get(i.type, np.float32))
        for i in session.get_inputs()
    }
    expected = np.where(x > 0, x, np.exp(np.minimum(x.astype(np.float32), 0)) - 1) * np.arange(4)
    np.testing.assert_allclose(session.run(None, given)[0], expected, rtol=2e-3)


def test_what_an_attribute_or_an_operator_makes_fp32_has_one_type() -> None:
    """EyeLike by its ``dtype``, the mean of a norm by definition; a mask's lowest number stays finite."""
    fill = make_tensor("value", TensorProto.FLOAT, [1], [float(np.finfo(np.float32).min)])
    nodes = [
        make_node("Shape", ["x"], ["s"], name="shape"),
        make_node("EyeLike", ["x"], ["eye"], name="eye", dtype=TensorProto.FLOAT),
        make_node("ConstantOfShape", ["s"], ["low"], name="low", value=fill),
        make_node("Mul", ["low", "zeros"], ["none"], name="none"),
        make_node("LayerNormalization", ["x", "ones"], ["n", "mean", "scale"], name="norm"),
        make_node("Sum", ["n", "mean", "eye", "none"], ["y"], name="sum"),
    ]
    values = [("low", [4, 4]), ("eye", [4, 4]), ("none", [4, 4]), ("n", [4, 4]), ("mean", [4, 1])]
    values.append(("scale", [4, 1]))
    graph = make_graph(
        nodes,
        "g",
        [
            make_tensor_value_info("x", TensorProto.FLOAT, [4, 4]),
            make_tensor_value_info("t", TensorProto.FLOAT, [1]),
        ],
        [make_tensor_value_info("y", TensorProto.FLOAT, [4, 4])],
        [from_array(np.zeros(4, np.float32), "zeros"), from_array(np.ones(4, np.float32), "ones")],
        value_info=[make_tensor_value_info(n, TensorProto.FLOAT, shape) for n, shape in values],
    )
    model = ir.from_proto(make_model(graph, opset_imports=[make_opsetid("", 21)], ir_version=10))
    Fp16ArithmeticPass(fp16_region(model, "t", "x"))(model)
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    x = np.random.default_rng(0).standard_normal((4, 4)).astype(np.float16)
    given = {i.name: x if i.name == "x" else np.zeros(1, np.float32) for i in session.get_inputs()}
    mean = x.astype(np.float32).mean(1, keepdims=True)
    normed = (x - mean) / np.sqrt(np.var(x.astype(np.float32), 1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(session.run(None, given)[0], normed + mean + np.eye(4), atol=5e-3)


def test_positions_that_are_made_of_constants_stay_in_fp32() -> None:
    """LTX' rotary embedding: Cos of a constant beyond FP16 was Cos(inf), which is NaN."""
    nodes = [
        make_node("Shape", ["x"], ["s"], name="shape"),
        make_node("Expand", ["big", "s"], ["p"], name="expand"),
        make_node("Mul", ["p", "two"], ["angle"], name="angles"),
        make_node("Cos", ["angle"], ["c"], name="cos"),
        make_node("Mul", ["x", "c"], ["y"], name="rotate"),
    ]
    graph = make_graph(
        nodes,
        "g",
        [
            make_tensor_value_info("x", TensorProto.FLOAT, [2, 4]),
            make_tensor_value_info("t", TensorProto.FLOAT, [1]),
        ],
        [make_tensor_value_info("y", TensorProto.FLOAT, [2, 4])],
        [
            from_array(np.array([4e4], np.float32), "big"),
            from_array(np.array([2.0], np.float32), "two"),
        ],
        value_info=[
            make_tensor_value_info(n, TensorProto.FLOAT, [2, 4]) for n in ("p", "angle", "c")
        ]
        + [make_tensor_value_info("s", TensorProto.INT64, [2])],
    )
    model = ir.from_proto(make_model(graph, opset_imports=[make_opsetid("", 21)], ir_version=10))
    region = fp16_region(model, "t", "x")
    assert region.nodes32 == {"expand", "angles", "cos"} | ({"shape"} & region.nodes32)
    Fp16ArithmeticPass(region)(model)
    session = ort.InferenceSession(
        ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    feeds = {"x": np.ones((2, 4), np.float16), "t": np.zeros(1, np.float32)}
    given = {i.name: feeds[i.name] for i in session.get_inputs()}
    np.testing.assert_allclose(session.run(None, given)[0], np.cos(8e4), rtol=2e-3)
