"""A convolution that is written as a product over its windows gives what the convolution gives."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from mpq_deploy.formats.candidates import Choices, round_candidates, weight_matrix
from mpq_deploy.formats.layer_rounding import InputMoments
from mpq_deploy.formats.scheme import FP16, SCHEMES
from mpq_deploy.formats.sizes import FP16_BYTES
from mpq_deploy.graph.layers import LayerGraph, layer_graph
from mpq_deploy.graph.load import load_model, normalise
from mpq_deploy.graph.save import constant_bytes
from mpq_deploy.graph.writers.deployed_graphs import (
    DEPLOYED,
    SIMULATED,
    FloatGraph,
    write_quantized,
)
from mpq_deploy.graph.writers.quantize_layers import LayerRewrite, weight_array
from mpq_deploy.latency.conv_products import conv_window
from mpq_deploy.rounding.quantizers import Rounding
from mpq_deploy.runtime.ort import session_options

BODIES = ("w4a16-b32", "w4a16-b64", "w8a16")


def conv_model(
    channels: int, outputs: int, kernel: tuple[int, ...], bias: bool, **attributes: Any
) -> onnx.ModelProto:
    """x [batch, channels, *sizes] -> Conv -> y, of random weights."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((outputs, channels, *kernel)).astype(np.float32)
    constants = [numpy_helper.from_array(weight, "conv.weight")]
    if bias:
        constants.append(
            numpy_helper.from_array(rng.standard_normal(outputs).astype(np.float32), "conv.bias")
        )
    inputs = ["x", *(one.name for one in constants)]
    nodes = [
        helper.make_node("Conv", inputs, ["c"], name="/conv", **attributes),
        # Both graphs end in an operator that is not a layer, and so names the output.
        helper.make_node("Relu", ["c"], ["y"], name="/relu"),
    ]
    shape = ["batch", channels, *(f"s{axis}" for axis in range(len(kernel)))]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    y = helper.make_tensor_value_info(
        "y", TensorProto.FLOAT, ["batch", outputs, *(f"o{axis}" for axis in range(len(kernel)))]
    )
    graph = helper.make_graph(nodes, "g", [x], [y], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def with_windows(graph: LayerGraph) -> LayerGraph:
    nodes = {node.name: node for node in graph.model.graph}
    layers = []
    for layer in graph.layers:
        window, reason = conv_window(layer, [nodes[use.node] for use in layer.uses])
        assert reason == ""
        layers.append(replace(layer, window=window))
    return replace(graph, layers=tuple(layers))


def written(
    model: onnx.ModelProto, scheme: str, folder: Path, gptq: bool = False
) -> tuple[int, int]:
    """Write the model under ``scheme``; return the file's bytes, and those that are counted."""
    onnx.save(model, folder / "float.onnx")
    ir.save(normalise(load_model(folder / "float.onnx")), folder / "export.onnx")
    graph = with_windows(layer_graph(load_model(folder / "export.onnx")))
    (layer,) = graph.layers
    weight = weight_matrix(layer, weight_array(graph.model, layer))
    rng = np.random.default_rng(1)
    seen = rng.standard_normal((layer.reduction + 8, layer.reduction))
    moments = InputMoments((seen.T @ seen)[None] / len(seen), (layer.reduction,))
    chosen = SCHEMES[scheme]
    found = round_candidates(
        layer, Choices((FP16, chosen), {}), weight, moments, Rounding(gptq, 0.05, 2)
    )
    matrix = found.forms[chosen.weight_form]
    (folder / "out").mkdir()
    source = FloatGraph(folder / "export.onnx", "", "x")
    size = write_quantized(source, [LayerRewrite(layer, chosen, matrix)], {}, folder / "out")
    bias = FP16_BYTES * layer.out_channels * (len(model.graph.node[0].input) > 2)
    # Beside it: the model with the dequantized weight in its Conv.
    held = matrix.dequantize().reshape(layer.weight_shape)
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(held, "conv.weight"))
    onnx.save(model, folder / "dequantized.onnx")
    return size, chosen.weight_bytes(layer) + bias


def run(path: Path, x: np.ndarray) -> np.ndarray:
    options = session_options(1, fake_quant_only=True)
    found: np.ndarray = ort.InferenceSession(str(path), options).run(None, {"x": x})[0]
    return found


def agree(folder: Path, x: np.ndarray) -> None:
    expected = run(folder / "dequantized.onnx", x)
    found = run(folder / "out" / SIMULATED, x)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-3)


@given(st.data())
def test_any_convolution_of_one_group_equals_its_product(data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, 3), "rank")
    kernel = tuple(data.draw(st.lists(st.integers(1, 4), min_size=rank, max_size=rank), "kernel"))
    strides, dilations = (
        data.draw(st.lists(st.integers(1, 3), min_size=rank, max_size=rank), name)
        for name in ("strides", "dilations")
    )
    pads = data.draw(st.lists(st.integers(0, 3), min_size=2 * rank, max_size=2 * rank), "pads")
    reach = [(k - 1) * step + 1 for k, step in zip(kernel, dilations)]
    sizes = [
        data.draw(st.integers(max(1, need - before - after), need + 6), "size")
        for need, before, after in zip(reach, pads[:rank], pads[rank:])
    ]
    channels, outputs = (data.draw(st.sampled_from([2, 4, 6, 8])) for _ in range(2))
    scheme = data.draw(st.sampled_from(BODIES), "scheme")
    model = conv_model(
        *(channels, outputs, kernel, data.draw(st.booleans(), "bias")),
        **{"strides": strides, "dilations": dilations, "pads": pads},
    )
    batch = data.draw(st.integers(1, 3), "batch")
    x = np.random.default_rng(2).standard_normal((batch, channels, *sizes)).astype(np.float32)
    with tempfile.TemporaryDirectory() as name:
        size, counted = written(model, scheme, Path(name))
        assert size == counted == constant_bytes(Path(name) / "out" / DEPLOYED)
        agree(Path(name), x)
        ops = {node.op_type for node in onnx.load(Path(name) / "out" / DEPLOYED).graph.node}
        assert "Conv" not in ops and "MatMul" in ops


def test_rounding_with_correlations_is_what_is_written(tmp_path: Path) -> None:
    model = conv_model(16, 8, (3, 3), True, pads=[1] * 4)
    written(model, "w4a16-b32", tmp_path, gptq=True)
    x = np.random.default_rng(2).standard_normal((2, 16, 8, 8)).astype(np.float32)
    agree(tmp_path, x)
    # The file itself: positions first, channels within, and blocks along them.
    deployed = onnx.load(tmp_path / "out" / DEPLOYED)
    tensors = {one.name: one for one in deployed.graph.initializer}
    codes = numpy_helper.to_array(tensors["conv.weight//codes"]).astype(np.float32)
    scale = numpy_helper.to_array(tensors["conv.weight//scale"]).astype(np.float32)
    assert codes.shape == (144, 8) and scale.shape[0] > 1
    held = codes * np.repeat(scale, len(codes) // len(scale), axis=0)
    weight = numpy_helper.to_array(onnx.load(tmp_path / "dequantized.onnx").graph.initializer[0])
    np.testing.assert_array_equal(
        held.reshape(3, 3, 16, 8).transpose(3, 2, 0, 1), weight.astype(np.float32)
    )
    assert tensors["conv.weight//codes"].data_type == TensorProto.INT4
    assert codes.astype(ml_dtypes.int4).astype(np.float32).tolist() == codes.tolist()


def test_the_product_has_the_layers_name_and_the_output_stays(tmp_path: Path) -> None:
    written(conv_model(8, 8, (3, 3), True, pads=[1] * 4), "w4a16-b32", tmp_path)
    graph = onnx.load(tmp_path / "out" / DEPLOYED).graph
    named = {node.name: node for node in graph.node}
    assert named["/conv"].op_type == "MatMul"
    (relu,) = (node for node in graph.node if node.op_type == "Relu")
    assert relu.input[0] == "c"
    assert next(node for node in graph.node if "c" in node.output).op_type == "Transpose"


@pytest.mark.parametrize(
    ("attributes", "reason"),
    [({"group": 2}, "2 groups"), ({"auto_pad": "SAME_UPPER"}, "auto_pad SAME_UPPER")],
)
def test_what_cannot_be_a_product_says_why(
    attributes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    model = conv_model(4, 8, (3, 3), False, pads=[1] * 4)
    model.graph.node[0].ClearField("attribute")
    model.graph.node[0].attribute.extend(
        helper.make_attribute(key, value) for key, value in attributes.items()
    )
    if "group" in attributes:
        half = np.zeros((8, 2, 3, 3), np.float32)
        model.graph.initializer[0].CopyFrom(numpy_helper.from_array(half, "conv.weight"))
    onnx.save(model, tmp_path / "m.onnx")
    graph = layer_graph(normalise(load_model(tmp_path / "m.onnx")))
    nodes = {node.name: node for node in graph.model.graph}
    (layer,) = graph.layers
    window, why = conv_window(layer, [nodes[use.node] for use in layer.uses])
    assert window is None and reason in why
