"""Dialects: what is declared lower when a target reads no newer opset, and what the writer refuses to write."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from mpq_deploy.check.check import check_model
from mpq_deploy.engine.target import known_targets, load_target
from mpq_deploy.errors import ModelError, UsageError
from mpq_deploy.formats.scheme import SCHEMES
from mpq_deploy.graph.dialects import DIALECTS, dialect_named
from mpq_deploy.graph.layers import Layer, LayerUse, layer_graph
from mpq_deploy.graph.load import load_model, normalise
from mpq_deploy.graph.passes.lower_opset import LowerOpsetPass
from mpq_deploy.graph.save import save_sharing
from mpq_deploy.graph.writers.deployed_graphs import FloatGraph, refuse_schemes, write_quantized
from mpq_deploy.graph.writers.quantize_layers import LayerRewrite
from tests.graphs import GraphBuilder, awkward_graph, denoiser_graph


def test_every_target_has_a_known_dialect() -> None:
    assert {load_target(name).dialect for name in known_targets()} <= set(DIALECTS)
    with pytest.raises(UsageError, match=r"Unknown dialect 'trt-10\.4'"):
        dialect_named("trt-10.4")


@pytest.mark.parametrize("opset", [22, 23])
def test_a_lowered_graph_computes_the_same(opset: int, tmp_path: Path) -> None:
    source = awkward_graph(opset=21).model()
    source.opset_import[0].version = opset
    onnx.save(source, tmp_path / "new.onnx")
    model = load_model(tmp_path / "new.onnx")
    assert LowerOpsetPass(21)(model).modified
    assert not LowerOpsetPass(21)(model).modified
    save_sharing({"old.onnx": model}, tmp_path, "old.bin")
    onnx.checker.check_model(str(tmp_path / "old.onnx"))
    rng = np.random.default_rng(0)
    feeds = {
        "sample": rng.standard_normal((2, 3, 7, 9)).astype(np.float32),
        "timestep": np.asarray(7, np.float32),
    }
    results = [
        onnxruntime.InferenceSession(str(tmp_path / name)).run(None, feeds)[0]
        for name in ("new.onnx", "old.onnx")
    ]
    if tuple(map(int, onnxruntime.__version__.split(".")[:2])) < (1, 25):
        pytest.skip(
            "ONNX Runtime before 1.25 fuses nodes of opset 21 alone, which rounds differently"
        )
    assert np.array_equal(*results)


def test_a_node_that_the_older_opset_does_not_know_is_named(tmp_path: Path) -> None:
    g = GraphBuilder(opset=23)
    g.input("x", ["N", 8])
    g.op("RMSNormalization", ["x", g.random("w", 8)], "the.norm")
    g.output("the.norm_out", ["N", 8])
    model = load_model(g.save(tmp_path / "m.onnx"))
    assert not LowerOpsetPass(24)(model).modified
    with pytest.raises(
        ModelError, match=r"'the.norm' \(RMSNormalization\) has no counterpart in opset 21"
    ):
        LowerOpsetPass(21)(model)


def test_an_attribute_that_the_older_opset_does_not_know_is_named(tmp_path: Path) -> None:
    g = GraphBuilder(opset=23)
    g.input("x", ["N", 8])
    codes = g.weight("codes", np.ones((8,), np.int8))
    wide = g.op(
        "DequantizeLinear", [codes, g.weight("s", np.float32(0.1))], "the.dq", output_dtype=1
    )
    g.op("Mul", ["x", wide], "y")
    g.output("y_out", ["N", 8])
    with pytest.raises(
        ModelError, match=r"'the.dq' \(DequantizeLinear\) has the attribute output_dtype"
    ):
        LowerOpsetPass(21)(load_model(g.save(tmp_path / "m.onnx")))


@pytest.mark.parametrize("dialect", [name for name, one in DIALECTS.items() if one.tensorrt])
def test_what_is_written_passes_its_own_check(dialect: str, tmp_path: Path) -> None:
    """A graph of opset 23 becomes one that the dialect reads, whatever the dialect."""
    source = denoiser_graph().model()
    source.opset_import[0].version = 23
    onnx.save(source, tmp_path / "m.onnx")
    model = normalise(load_model(tmp_path / "m.onnx"))
    save_sharing({"export.onnx": model}, tmp_path, "export.bin")
    rewrites = [LayerRewrite(layer, SCHEMES["fp16"], None) for layer in layer_graph(model).layers]
    out = tmp_path / "out"
    out.mkdir()
    write_quantized(
        FloatGraph(tmp_path / "export.onnx", "timestep", "sample"),
        rewrites,
        {},
        out,
        dialect_named(dialect),
    )
    target = {
        "trt-10.3": "jetson-agx-orin",
        "trt-10.13": "jetson-thor",
        "trt-11": "tensorrt-11",
        "trt-rtx": "rtx",
    }
    result = check_model(out / "model.onnx", load_target(target[dialect]))
    assert {finding.rule for finding in result.findings} <= {"dynamic-inputs", "shared-input"}
    declared = onnx.load(out / "model.onnx", load_external_data=False).opset_import[0].version
    assert declared == min(23, dialect_named(dialect).opsets[1])


@pytest.mark.parametrize(
    ("dialect", "shape", "refused"),
    [
        ("trt-10.3", (64, 45), True),
        ("trt-rtx", (64, 45), False),
        ("trt-rtx", (27, 45), True),
        ("trt-11", (64, 46), False),
        ("onnxruntime", (27, 45), False),
    ],
)
def test_int4_of_odd_sizes_is_not_written_where_it_is_refused(
    dialect: str, shape: tuple[int, int], refused: bool
) -> None:
    layer = Layer("fc", "MatMul", "fc.weight", shape, 1, 1, (LayerUse("node", "x", "y"),))
    rewrites = [LayerRewrite(layer, SCHEMES["w4a16-b32"], None)]
    if refused:
        with pytest.raises(ModelError, match=r"'fc': its (size|last dimension) is odd"):
            refuse_schemes(rewrites, dialect_named(dialect))
    else:
        refuse_schemes(rewrites, dialect_named(dialect))
