"""Graphs that hold codes already are refused with the node or the weight that shows it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from mpq_deploy.errors import ModelError
from mpq_deploy.graph.already_quantized import refuse_quantized
from mpq_deploy.models.open import open_denoiser
from tests.graphs import denoiser_graph
from tests.pipeline.runs import describe, save_denoiser

PATH = Path("m.onnx")


def with_node(node: onnx.NodeProto, *weights: onnx.TensorProto) -> ir.Model:
    model = denoiser_graph(channels=16, size=8).model()
    model.graph.node.append(node)
    model.graph.initializer.extend(weights)
    return ir.from_proto(model)


@pytest.mark.parametrize(
    ("op", "domain"),
    [
        *((op, "") for op in ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear")),
        *((op, "") for op in ("QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger")),
        *((op, "com.microsoft") for op in ("MatMulNBits", "QGemm", "QAttention", "MatMulBnb4")),
        ("TRT_FP8QuantizeLinear", "trt"),
    ],
)
def test_operators_of_quantizers(op: str, domain: str) -> None:
    node = helper.make_node(op, ["sample"], ["codes"], "quantizer", domain=domain)
    with pytest.raises(ModelError, match=rf"m.onnx is already quantized: 1 .*'quantizer' \({op}\)"):
        refuse_quantized(with_node(node), PATH)


def test_inside_a_branch_and_a_function() -> None:
    inner = helper.make_node("DequantizeLinear", ["sample"], ["codes"], "inner")
    graph = helper.make_graph([inner], "branch", [], [helper.make_empty_tensor_value_info("codes")])
    branch = helper.make_node("If", ["sample"], ["out"], "if", then_branch=graph, else_branch=graph)
    with pytest.raises(ModelError, match="'inner'"):
        refuse_quantized(with_node(branch), PATH)
    model = denoiser_graph(channels=16, size=8).model()
    opset = [helper.make_opsetid("", 21)]
    model.functions.append(helper.make_function("own", "F", ["sample"], ["codes"], [inner], opset))
    model.opset_import.append(helper.make_opsetid("own", 1))
    with pytest.raises(ModelError, match="'inner'"):
        refuse_quantized(ir.from_proto(model), PATH)


def test_codes_under_a_cast() -> None:
    codes = numpy_helper.from_array(np.ones((4, 4), np.int8), "codes")
    node = helper.make_node("Cast", ["codes"], ["w"], "cast", to=TensorProto.FLOAT)
    with pytest.raises(ModelError, match="its weight 'codes' is stored as INT8"):
        refuse_quantized(with_node(node, codes), PATH)
    mask = helper.make_node("Cast", ["codes"], ["w"], "cast", to=TensorProto.BOOL)
    refuse_quantized(with_node(mask, codes), PATH)


def test_float8_weights() -> None:
    codes = helper.make_tensor("codes", TensorProto.FLOAT8E4M3FN, [4], bytes(4), raw=True)
    node = helper.make_node("Cast", ["codes"], ["w"], "cast", to=TensorProto.FLOAT)
    with pytest.raises(ModelError, match="stored as FLOAT8E4M3FN"):
        refuse_quantized(with_node(node, codes), PATH)


def test_a_float_graph_passes_and_a_quantized_file_is_refused_when_opened(tmp_path: Path) -> None:
    path = save_denoiser(tmp_path)
    assert open_denoiser(path).spec.sample.shape
    model = onnx.load(path)
    model.graph.node.append(
        helper.make_node("DynamicQuantizeLinear", ["sample"], ["a", "b", "c"], "q")
    )
    onnx.save(model, path)
    with pytest.raises(ModelError, match="already quantized"):
        open_denoiser(describe(path))
