"""Every operator of the table against ONNX Runtime, form by form."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import helper, numpy_helper

torch = pytest.importorskip("torch")

from mpq_deploy.onnx_torch.operators import OPERATORS  # noqa: E402
from mpq_deploy.onnx_torch.torch_graph import TorchGraph, UnsupportedOperator  # noqa: E402

pytestmark = pytest.mark.torch


@dataclass
class Case:
    op: str
    inputs: list[Any]
    attributes: dict[str, Any] = field(default_factory=dict)
    opset: int = 21
    outputs: int = 1
    constants: tuple[int, ...] = ()

    @property
    def id(self) -> str:
        shapes = "-".join(
            "none" if x is None else "x".join(map(str, np.shape(x))) for x in self.inputs
        )
        return f"{self.op}-{shapes}-{','.join(f'{k}={v}' for k, v in self.attributes.items())}-{self.opset}"


def floats(*shape: int, seed: int = 0, positive: bool = False) -> Any:
    values = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return np.abs(values) + np.float32(0.1) if positive else values


def ints(*values: int) -> Any:
    return np.array(values, np.int64)


def scalar(value: Any, dtype: Any = np.float32) -> Any:
    return np.array(value, dtype)


X = floats(2, 3, 4, 5)
PAIR = [floats(2, 3, 4), floats(3, 1, seed=1)]
BOOLS = [floats(2, 3) > 0, floats(2, 3, seed=1) > 0]
IMAGE = floats(2, 4, 7, 9)


def elementwise() -> list[Case]:
    plain = [
        "Abs",
        "Ceil",
        "Cos",
        "Erf",
        "Exp",
        "Floor",
        "HardSwish",
        "Identity",
        "Mish",
        "Neg",
        "Relu",
        "Round",
    ]
    plain += [
        "Sigmoid",
        "Sign",
        "Sin",
        "Softplus",
        "Softsign",
        "Tanh",
        "Dropout",
        "Gelu",
        "LeakyRelu",
        "Selu",
        "Elu",
    ]
    plain += ["HardSigmoid", "Softmax", "LogSoftmax"]
    cases = [Case(op, [X * 3]) for op in plain]
    cases += [Case(op, [floats(2, 3, positive=True)]) for op in ("Log", "Reciprocal", "Sqrt")]
    cases += [Case(op, PAIR) for op in ("Add", "Div", "Max", "Mean", "Min", "Mul", "Sub", "Sum")]
    cases += [Case(op, [X, X[:1], floats(5)]) for op in ("Max", "Mean", "Min", "Sum")]
    cases += [
        Case(op, PAIR) for op in ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual")
    ]
    cases += [Case(op, BOOLS) for op in ("And", "Or", "Xor")]
    cases += [Case("IsNaN", [np.array([1.0, np.nan, np.inf], np.float32)])]
    cases += [Case("Not", BOOLS[:1]), Case("Where", [BOOLS[0], floats(2, 3), floats(3, seed=2)])]
    cases += [
        Case("Div", [ints(7, -7, 7, -7), ints(2, 2, -2, -2)]),
        Case("Mod", [ints(7, -7, 7, -7), ints(3, 3, -3, -3)]),
        Case("Mod", [floats(6), floats(6, seed=1)], {"fmod": 1}),
        Case("Pow", [floats(2, 3, positive=True), floats(3, seed=1)]),
        Case("Pow", [floats(2, 3), scalar(2, np.int64)]),
        Case("Clip", [X, scalar(-0.5), scalar(0.7)]),
        Case("Clip", [X, None, scalar(0.7)]),
        Case("Clip", [X, scalar(0.0)]),
        Case("Gelu", [X], {"approximate": "tanh"}),
        Case("LeakyRelu", [X], {"alpha": 0.3}),
        Case("HardSigmoid", [X], {"alpha": 0.3, "beta": 0.4}),
        Case("PRelu", [X, floats(3, 1, 1)]),
        Case("Softmax", [X], {"axis": 1}),
        Case("Cast", [X * 3], {"to": onnx.TensorProto.INT64}),
        Case("Cast", [ints(0, 1, 2)], {"to": onnx.TensorProto.BOOL}),
        Case("Cast", [ints(0, 1, 2)], {"to": onnx.TensorProto.FLOAT}),
        Case("Cast", [X], {"to": onnx.TensorProto.DOUBLE}),
        Case("CastLike", [ints(1, 2), floats(1)]),
    ]
    return cases


def shapes() -> list[Case]:
    return [
        Case("Shape", [X]),
        Case("Shape", [X], {"start": 1, "end": -1}),
        Case("Size", [X]),
        Case("Reshape", [X, ints(0, -1, 5)], constants=(1,)),
        Case("Reshape", [X[:0], ints(0, 7)], {"allowzero": 1}, constants=(1,)),
        Case("Flatten", [X]),
        Case("Flatten", [X], {"axis": 0}),
        Case("Flatten", [X], {"axis": -1}),
        Case("Transpose", [X]),
        Case("Transpose", [X], {"perm": [0, 2, 3, 1]}),
        Case("Concat", [X, X[:, :1]], {"axis": -3}),
        Case("Split", [X, ints(1, 2)], {"axis": 1}, outputs=2),
        Case("Split", [X], {"axis": 3, "num_outputs": 2}, outputs=2),
        Case("Split", [X], {"axis": 2}, opset=13, outputs=2),
        Case("Slice", [X, ints(1), ints(9223372036854775807)]),
        Case("Slice", [X, ints(0, -3), ints(3, -1), ints(2, -1)]),
        Case("Slice", [X, ints(0), ints(5), ints(3), ints(2)]),
        Case("Slice", [X, ints(-1), ints(-9223372036854775807), ints(3), ints(-2)]),
        Case("Slice", [X, ints(3), ints(1), ints(2), ints(1)]),
        Case("Gather", [X, ints(2, -1, 0)], {"axis": 1}),
        Case("Gather", [X, scalar(1, np.int64)]),
        Case("Gather", [ints(5, 6, 7), scalar(-1, np.int64)]),
        Case("Gather", [floats(10, 4), np.array([[1, 2], [3, -1]], np.int64)]),
        Case("GatherElements", [floats(3, 4), np.array([[0, -1], [2, 1]], np.int64)], {"axis": 1}),
        Case("GatherND", [X, np.array([[0, 1], [1, -1]], np.int64)]),
        Case("GatherND", [floats(4, 5), ints(2, -1)]),
        Case("GatherND", [X, np.array([[[0], [-1]], [[2], [1]]], np.int64)], {"batch_dims": 1}),
        Case("GatherND", [X, np.full((2, 3, 2), [1, -2])], {"batch_dims": 2}),
        Case("OneHot", [ints(1, 0, -1), ints(4), floats(2)]),
        Case("OneHot", [np.array([[1, 0], [3, 9]], np.int64), ints(4), floats(2)], {"axis": 1}),
        Case("ScatterElements", [floats(3, 4), np.array([[0, -1]], np.int64), floats(1, 2)]),
        Case("ScatterElements", [X, np.full((2, 3, 4, 1), -2), floats(2, 3, 4, 1)], {"axis": 3}),
        Case("ScatterND", [X, np.array([[0], [1]], np.int64), floats(2, 3, 4, 5, seed=1)]),
        Case("ScatterND", [floats(4, 5), np.array([[0, 1], [-1, 4]], np.int64), floats(2)]),
        Case("ScatterND", [floats(4), np.array([[2]]), floats(1)], {"reduction": "none"}),
        Case(
            "ScatterND",
            [floats(4), np.array([[1], [1]], np.int64), floats(2)],
            {"reduction": "add"},
        ),
        Case("ArgMax", [X], {"axis": 1}),
        Case("ArgMin", [X], {"axis": -1, "keepdims": 0}),
        Case("TopK", [X, ints(2)], outputs=2),
        Case("TopK", [X, ints(2)], {"axis": 1, "largest": 0}, outputs=2),
        Case("Unsqueeze", [X, ints(0, -1)]),
        Case("Squeeze", [X[:1, :, :1], ints(0, -2)]),
        Case("Squeeze", [X[:1]]),
        Case("Expand", [floats(3, 1), ints(2, 1, 6)]),
        Case("Expand", [floats(3, 4), ints(1)]),
        Case("Tile", [floats(2, 3), ints(2, 3)]),
        Case("Range", [scalar(2, np.int64), scalar(11, np.int64), scalar(3, np.int64)]),
        Case("Range", [scalar(3.0), scalar(-1.0), scalar(-0.5)]),
        Case("ConstantOfShape", [ints(2, 3)]),
        Case(
            "ConstantOfShape",
            [ints(2)],
            {"value": numpy_helper.from_array(np.array([7], np.int64))},
        ),
        Case("Constant", [], {"value": numpy_helper.from_array(floats(2, 2))}),
        Case("Constant", [], {"value_float": 1.5}),
        Case("Constant", [], {"value_ints": [1, 2]}),
        Case("Pad", [X, ints(0, 0, 1, 2, 0, 0, 3, 1)]),
        Case("Pad", [X, ints(1, 2), scalar(3.0), ints(-1)]),
        Case("Pad", [X, ints(0, 0, -1, 0, 0, 0, 0, -2)]),
        Case("Pad", [X, ints(0, 0, 1, 2, 0, 0, 3, 4)], {"mode": "reflect"}),
        Case("Pad", [X, ints(1, 0, 1, 2, 0, 1, 3, 1)], {"mode": "edge"}),
        Case("Pad", [X, ints(0, 0, 1, 2, 0, 0, 3, 1)], {"mode": "wrap"}),
        Case("Trilu", [floats(2, 4, 5), scalar(1, np.int64)]),
        Case("Trilu", [floats(4, 5), scalar(-1, np.int64)], {"upper": 0}),
        Case("CumSum", [floats(3, 4), scalar(1, np.int64)]),
        Case("CumSum", [floats(3, 4), scalar(0, np.int64)], {"exclusive": 1, "reverse": 1}),
        Case("DepthToSpace", [floats(2, 8, 3, 4)], {"blocksize": 2}),
        Case("DepthToSpace", [floats(2, 8, 3, 4)], {"blocksize": 2, "mode": "CRD"}),
        Case("SpaceToDepth", [floats(2, 3, 4, 6)], {"blocksize": 2}),
    ]


def products() -> list[Case]:
    a, b = floats(3, 4), floats(4, 5, seed=1)
    return [
        Case("MatMul", [floats(2, 3, 4), b]),
        Case("MatMul", [floats(2, 3, 4), floats(2, 4, 5)]),
        Case("MatMul", [floats(4), b]),
        Case("Gemm", [a, b]),
        Case("Gemm", [a, b, floats(5)], {"alpha": 0.5, "beta": 2.0}),
        Case("Gemm", [a.T.copy(), b.T.copy(), floats(3, 1)], {"transA": 1, "transB": 1}),
        Case("Einsum", [floats(2, 3, 4), floats(2, 5, 4)], {"equation": "bij, bkj -> bik"}),
        *(
            Case(op, [X * 2, ints(1, -1)], {"keepdims": keep}, opset=21)
            for op in (
                "ReduceMean",
                "ReduceSum",
                "ReduceMax",
                "ReduceMin",
                "ReduceL1",
                "ReduceL2",
                "ReduceProd",
            )
            for keep in (0, 1)
        ),
        Case("ReduceSumSquare", [X, ints(2)]),
        Case("ReduceLogSumExp", [X, ints(2)]),
        Case("ReduceMean", [X]),
        Case("ReduceMean", [X], {"axes": [2, 3]}, opset=17),
        Case("ReduceSum", [X, ints()], {"noop_with_empty_axes": 1}),
        Case("ReduceSum", [ints(1, 2, 3), ints(0)]),
    ]


def windows() -> list[Case]:
    w = floats(6, 4, 3, 3, seed=1)
    strided = {"strides": [2, 2], "pads": [0, 0, 1, 1]}
    grouped = floats(6, 2, 3, 3, seed=1)
    depthwise = floats(8, 1, 3, 3, seed=1)
    transposed = floats(4, 3, 3, 3, seed=1)
    return [
        Case("Conv", [IMAGE, w]),
        Case("Conv", [IMAGE, w, floats(6)], {"pads": [1, 1, 1, 1]}),
        Case("Conv", [IMAGE, w], strided),
        Case("Conv", [IMAGE, w], {"dilations": [2, 1], "pads": [2, 1, 2, 1]}),
        Case("Conv", [IMAGE, w], {"auto_pad": "SAME_UPPER", "strides": [2, 3]}),
        Case("Conv", [IMAGE, w], {"auto_pad": "SAME_LOWER", "strides": [2, 2]}),
        Case("Conv", [IMAGE, w], {"auto_pad": "VALID"}),
        Case("Conv", [IMAGE, grouped], {"group": 2}),
        Case("Conv", [IMAGE, depthwise], {"group": 4, "pads": [1, 0, 2, 1]}),
        Case(
            "Conv", [floats(2, 4, 9), floats(5, 4, 3), floats(5)], {"pads": [1, 2], "strides": [2]}
        ),
        Case("Conv", [floats(1, 2, 4, 5, 6), floats(3, 2, 2, 2, 2)]),
        Case(
            "ConvTranspose",
            [IMAGE, transposed, floats(3)],
            {"strides": [2, 2], "pads": [1, 1, 1, 1]},
        ),
        Case("ConvTranspose", [IMAGE, transposed], {"strides": [2, 2], "output_padding": [1, 1]}),
        Case("ConvTranspose", [IMAGE, transposed], {"strides": [2, 1], "pads": [0, 1, 1, 0]}),
        Case("ConvTranspose", [IMAGE, floats(4, 2, 2, 2)], {"group": 2, "dilations": [2, 2]}),
        Case("ConvTranspose", [floats(2, 4, 9), floats(4, 3, 4)], {"strides": [2], "pads": [1, 1]}),
        Case("MaxPool", [IMAGE], {"kernel_shape": [2, 3], "strides": [2, 2], "pads": [1, 1, 0, 1]}),
        Case("MaxPool", [IMAGE], {"kernel_shape": [3, 2], "strides": [2, 2], "ceil_mode": 1}),
        Case("AveragePool", [IMAGE], {"kernel_shape": [2, 2], "strides": [2, 2]}),
        Case("AveragePool", [IMAGE], {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}),
        Case("AveragePool", [IMAGE], {"kernel_shape": [3, 3], "pads": [0, 1, 1, 1]}),
        Case(
            "AveragePool",
            [IMAGE],
            {"kernel_shape": [3, 3], "pads": [0, 1, 1, 1], "count_include_pad": 1},
        ),
        Case("AveragePool", [floats(2, 3, 9)], {"kernel_shape": [2], "auto_pad": "SAME_UPPER"}),
        Case("GlobalAveragePool", [IMAGE]),
        Case("GlobalMaxPool", [IMAGE]),
    ]


def resizes() -> list[Case]:
    double, third = np.array([1, 1, 2, 2], np.float32), np.array([1, 1, 0.6, 1.7], np.float32)
    cases = []
    for form in ("asymmetric", "half_pixel", "pytorch_half_pixel", "align_corners"):
        for scales in (double, third):
            for mode, nearest in (
                ("linear", "floor"),
                ("nearest", "floor"),
                ("nearest", "round_prefer_ceil"),
            ):
                attributes = {
                    "mode": mode,
                    "coordinate_transformation_mode": form,
                    "nearest_mode": nearest,
                }
                cases.append(Case("Resize", [IMAGE, None, scales], attributes, constants=(2,)))
    attributes = {
        "mode": "nearest",
        "coordinate_transformation_mode": "asymmetric",
        "nearest_mode": "floor",
    }
    cases += [
        Case("Resize", [IMAGE, None, None, ints(2, 4, 14, 18)], attributes, constants=(3,)),
        Case(
            "Resize",
            [IMAGE, None, None, ints(2, 4, 5, 20)],
            {**attributes, "mode": "linear"},
            constants=(3,),
        ),
        Case(
            "Resize", [IMAGE, None, double], {"nearest_mode": "round_prefer_floor"}, constants=(2,)
        ),
        Case("Resize", [IMAGE, None, third], {"nearest_mode": "ceil"}, constants=(2,)),
        Case(
            "Resize", [IMAGE, None, double[2:]], {"axes": [2, 3], "mode": "linear"}, constants=(2,)
        ),
    ]
    return cases


def norms() -> list[Case]:
    c4, c4b = floats(4, seed=1), floats(4, seed=2)
    qkv = [floats(2, 4, 5, 8), floats(2, 4, 6, 8, seed=1), floats(2, 4, 6, 8, seed=2)]
    flat = [floats(2, 5, 32), floats(2, 6, 16, seed=1), floats(2, 6, 16, seed=2)]
    heads = {"q_num_heads": 4, "kv_num_heads": 2}
    return [
        Case("InstanceNormalization", [IMAGE, c4, c4b], {"epsilon": 0.01}),
        Case("InstanceNormalization", [floats(2, 4, 30), c4, c4b]),
        Case("InstanceNormalization", [IMAGE, np.ones(4, np.float32), np.zeros(4, np.float32)]),
        Case("InstanceNormalization", [IMAGE, np.ones(4, np.float32), c4b]),
        Case("GroupNormalization", [IMAGE, c4, c4b], {"num_groups": 2, "epsilon": 0.01}),
        Case("GroupNormalization", [IMAGE, c4, c4b], {"num_groups": 1}),
        Case("LayerNormalization", [floats(2, 3, 8), floats(8), floats(8, seed=1)]),
        Case("LayerNormalization", [floats(2, 3, 8), floats(3, 8)], {"axis": 1, "epsilon": 0.1}),
        Case("BatchNormalization", [IMAGE, c4, c4b, c4, floats(4, positive=True)]),
        Case("RMSNormalization", [floats(2, 3, 8), floats(8)], {"epsilon": 0.1}, opset=23),
        Case("Attention", qkv, opset=23),
        Case("Attention", qkv, {"scale": 0.1, "is_causal": 1}, opset=23),
        Case("Attention", [*qkv, floats(5, 6)], opset=23),
        Case("Attention", flat, heads, opset=23),
    ]


def scalars() -> list[Case]:
    """Inputs and outputs without any axis, as exporters write single sizes and timesteps."""
    one, whole, vector = scalar(1.5), scalar(3, np.int64), ints(5, 6, 7)
    return [
        *(Case(op, [one, scalar(-2.0)]) for op in ("Add", "Div", "Max", "Min", "Mul", "Pow")),
        *(Case(op, [whole, scalar(2, np.int64)]) for op in ("Add", "Div", "Equal", "Mod", "Mul")),
        *(Case(op, [one]) for op in ("Cos", "Neg", "Shape", "Size", "Transpose")),
        *(Case(op, [floats(4)]) for op in ("ReduceMax", "ReduceMean", "ReduceSum", "ReduceProd")),
        *(Case(op, [floats(4)], {"keepdims": 0}) for op in ("ReduceMin", "ReduceMean", "ReduceL2")),
        Case("Cast", [whole], {"to": onnx.TensorProto.FLOAT}),
        Case("Unsqueeze", [whole, ints(0)]),
        Case("Squeeze", [ints(4), ints(0)]),
        Case("Squeeze", [ints(4)]),
        Case("Reshape", [ints(4), ints()], constants=(1,)),
        Case("Reshape", [one, ints(-1)], constants=(1,)),
        Case("Expand", [one, ints()]),
        Case("Expand", [one, ints(2, 3)]),
        Case("ConstantOfShape", [ints()]),
        Case("Where", [scalar(True, np.bool_), one, scalar(2.0)]),
        Case("Flatten", [floats(3)], {"axis": 0}),
        Case("Slice", [vector, ints(-2), ints(9)]),
        Case("Split", [vector, ints(1, 2)], outputs=2),
        Case("MatMul", [floats(4), floats(4, seed=1)]),
        Case("Einsum", [floats(4), floats(4, seed=1)], {"equation": "i,i->"}),
        Case("GatherElements", [vector, ints(2, -1)]),
        Case("Softmax", [floats(4)]),
        Case("Clip", [one, scalar(0.0), scalar(1.0)]),
        Case("Not", [scalar(True, np.bool_)]),
    ]


CASES = [*elementwise(), *shapes(), *scalars(), *products(), *windows(), *resizes(), *norms()]


def model_of(case: Case) -> onnx.ModelProto:
    names = ["" if x is None else f"in{i}" for i, x in enumerate(case.inputs)]
    outputs = [f"out{i}" for i in range(case.outputs)]
    node = helper.make_node(case.op, names, outputs, name="the_node", **case.attributes)
    fed = [
        helper.make_tensor_value_info(f"in{i}", helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)
        for i, x in enumerate(case.inputs)
        if x is not None and i not in case.constants
    ]
    constants = [numpy_helper.from_array(case.inputs[i], f"in{i}") for i in case.constants]
    results = [onnx.ValueInfoProto(name=name) for name in outputs]
    graph = helper.make_graph([node], "one", fed, results, constants)
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", case.opset)], ir_version=10
    )


def reference(case: Case, model: onnx.ModelProto) -> list[Any]:
    feeds = {
        f"in{i}": x for i, x in enumerate(case.inputs) if x is not None and i not in case.constants
    }
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_operator_agrees_with_onnxruntime(case: Case) -> None:
    model = model_of(case)
    expected = reference(case, model)
    graph = TorchGraph(ir.from_proto(model))
    feeds = {
        f"in{i}": x for i, x in enumerate(case.inputs) if x is not None and i not in case.constants
    }
    found = graph.run(graph.feed(feeds))
    for name, value in zip(graph.outputs, expected, strict=True):
        actual = found[name].numpy()
        assert actual.shape == value.shape
        assert actual.dtype == value.dtype
        np.testing.assert_allclose(actual, value, rtol=1e-4, atol=1e-5)


def test_every_operator_of_the_table_is_compared() -> None:
    # Swish is of opset 24, which ONNX Runtime does not run yet; its reference is x * sigmoid(alpha x).
    assert set(OPERATORS) - {case.op for case in CASES} == {"Swish"}


def test_swish_is_x_times_sigmoid() -> None:
    model = ir.from_proto(model_of(Case("Swish", [X], {"alpha": 1.5}, opset=24)))
    graph = TorchGraph(model)
    found = graph.run(graph.feed({"in0": X}))["out0"].numpy()
    np.testing.assert_allclose(found, X / (1 + np.exp(-1.5 * X)), rtol=1e-5)


@pytest.mark.parametrize(
    "case",
    [
        Case("Det", [floats(3, 3)]),
        Case(
            "Resize",
            [IMAGE, None, np.array([1, 1, 2, 2], np.float32)],
            {"mode": "cubic"},
            constants=(2,),
        ),
        Case("AveragePool", [IMAGE], {"kernel_shape": [2, 2], "dilations": [2, 2]}),
    ],
    ids=lambda case: case.op,
)
def test_what_is_outside_the_table_is_named(case: Case) -> None:
    with pytest.raises(UnsupportedOperator) as caught:
        graph = TorchGraph(ir.from_proto(model_of(case)))
        graph.run(graph.feed({"in0": case.inputs[0]}))
    assert caught.value.op == case.op
    assert caught.value.node == "the_node"
    assert case.op in caught.value.message and "the_node" in caught.value.message


def test_group_norm_before_opset_21_has_one_scale_per_group() -> None:
    case = Case(
        "GroupNormalization",
        [IMAGE, floats(2, seed=1), floats(2, seed=2)],
        {"num_groups": 2},
        opset=18,
    )
    wide = [IMAGE, *(v.repeat(2) for v in case.inputs[1:])]
    graph = TorchGraph(ir.from_proto(model_of(case)))
    found = graph.run(graph.feed({f"in{i}": x for i, x in enumerate(case.inputs)}))["out0"].numpy()
    newer = TorchGraph(ir.from_proto(model_of(Case("GroupNormalization", wide, {"num_groups": 2}))))
    expected = newer.run(newer.feed({f"in{i}": x for i, x in enumerate(wide)}))["out0"].numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("nodes", "fused"),
    [
        ([("Sigmoid", "x", "s"), ("Mul", "x s", "y")], True),
        ([("Sigmoid", "x", "s"), ("Mul", "s x", "y")], True),
        (
            [
                ("Sigmoid", "x", "s"),
                ("Mul", "x s", "t"),
                ("Sigmoid", "t", "u"),
                ("Mul", "u t", "y"),
            ],
            True,
        ),
        ([("Sigmoid", "x", "s"), ("Neg", "x", "n"), ("Mul", "n s", "y")], False),
        ([("Sigmoid", "x", "s"), ("Mul", "x s", "t"), ("Add", "t s", "y")], False),
        ([("Sigmoid", "x", "s"), ("Mul", "s s", "y")], False),
        ([("Sigmoid", "x", "y"), ("Mul", "x y", "z")], False),
    ],
)
def test_a_gated_sigmoid_is_one_operator_where_nothing_else_reads_it(
    nodes: list[tuple[str, str, str]], fused: bool
) -> None:
    made = [
        helper.make_node(op, given.split(), [out], name=f"{op}_{out}") for op, given, out in nodes
    ]
    ends = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, X.shape) for name in ("x", "y")
    ]
    graph = helper.make_graph(made, "gates", ends[:1], ends[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    evaluated = TorchGraph(ir.from_proto(model))
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found = evaluated.run(evaluated.feed({"x": X}), keep=evaluated.values)
    np.testing.assert_allclose(
        found["y"].numpy(), session.run(None, {"x": X})[0], rtol=1e-5, atol=1e-6
    )
    assert ("s" not in evaluated.values) == (fused or "s" not in {out for _, _, out in nodes})


@pytest.mark.parametrize("shape", [(2, 3, 5, 4), (2, 5, 4)], ids=["heads", "no heads"])
@pytest.mark.parametrize(
    ("nodes", "fused"),
    [
        ([("MatMul", "q k", "s"), ("Softmax", "s", "p"), ("MatMul", "p v", "y")], True),
        (
            [
                ("MatMul", "q k", "s"),
                ("Add", "s s", "t"),
                ("Softmax", "t", "p"),
                ("MatMul", "p v", "y"),
            ],
            False,
        ),
        (
            [
                ("MatMul", "q k", "s"),
                ("Softmax", "s", "p"),
                ("MatMul", "p v", "t"),
                ("MatMul", "p t", "y"),
            ],
            False,
        ),
        (
            [
                ("MatMul", "q k", "s"),
                ("Softmax", "s", "p"),
                ("MatMul", "p s", "t"),
                ("MatMul", "t v", "y"),
            ],
            False,
        ),
        ([("MatMul", "q k", "s"), ("Softmax 1", "s", "p"), ("MatMul", "p v", "y")], False),
    ],
)
def test_attention_is_one_operator_where_nothing_else_reads_its_scores(
    shape: tuple[int, ...], nodes: list[tuple[str, str, str]], fused: bool
) -> None:
    made = []
    for op, given, out in nodes:
        op, *axis = op.split()
        made.append(
            helper.make_node(
                op, given.split(), [out], name=f"{op}_{out}", **({"axis": 1} if axis else {})
            )
        )
    tokens = shape[-2]
    shapes = {"q": shape, "k": (*shape[:-2], shape[-1], tokens), "v": shape}
    random = np.random.default_rng(0)
    feeds = {name: random.standard_normal(size).astype(np.float32) for name, size in shapes.items()}
    inputs = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, size)
        for name, size in shapes.items()
    ]
    output = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, shape)
    graph = helper.make_graph(made, "attention", inputs, [output])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    evaluated = TorchGraph(ir.from_proto(model))
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found = evaluated.run(evaluated.feed(feeds), keep=evaluated.values)
    np.testing.assert_allclose(
        found["y"].numpy(), session.run(None, feeds)[0], rtol=1e-4, atol=1e-5
    )
    assert ("s" not in evaluated.values) == fused


def test_the_gradients_of_attention_are_those_of_its_products() -> None:
    q, k, v = (
        torch.randn(2, 3, 5, 4, generator=torch.manual_seed(n), requires_grad=True)
        for n in range(3)
    )
    nodes = [
        helper.make_node("MatMul", ["q", "k"], ["s"]),
        helper.make_node("Softmax", ["s"], ["p"]),
        helper.make_node("MatMul", ["p", "v"], ["y"]),
    ]
    shapes = {"q": (2, 3, 5, 4), "k": (2, 3, 4, 5), "v": (2, 3, 5, 4)}
    inputs = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, size)
        for name, size in shapes.items()
    ]
    output = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, shapes["q"])
    model = helper.make_model(
        helper.make_graph(nodes, "attention", inputs, [output]),
        opset_imports=[helper.make_opsetid("", 21)],
    )
    found = TorchGraph(ir.from_proto(model)).run({"q": q, "k": k.transpose(-2, -1), "v": v})["y"]
    direct = torch.softmax(q @ k.transpose(-2, -1), -1) @ v
    for one, other in zip(
        torch.autograd.grad(found.square().sum(), (q, k, v)),
        torch.autograd.grad(direct.square().sum(), (q, k, v)),
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_weights_share_memory_with_the_model() -> None:
    weight = floats(8, 4)
    model = ir.from_proto(model_of(Case("MatMul", [floats(2, 8), weight], constants=(1,))))
    model.graph.initializers["in1"].const_value = ir.Tensor(weight)
    graph = TorchGraph(model)
    assert graph.constants["in1"].data_ptr() == weight.ctypes.data
