"""A model whose values pass FP16's range in the middle: its loud part computes in FP32, quantized as the rest."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from mpq_deploy.engine.builder import BuildRequest, build_engine
from mpq_deploy.engine.plan_engine import batch_profile, expected_layers
from mpq_deploy.evaluate.evaluation_result import Evaluation
from mpq_deploy.graph.save import constant_bytes
from mpq_deploy.graph.writers.deployed_graphs import (
    DEPLOYED,
    SIMULATED,
    FloatGraph,
    write_quantized,
)
from mpq_deploy.run.view import Run
from mpq_deploy.system.progress import Talk
from tests.graphs import loud_graph
from tests.pipeline.runs import build, recipe_for, save_denoiser

LOUD = {"loud.2", "loud.mix"}


@pytest.fixture(scope="module")
def loud(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("loud")
    recipe = recipe_for(save_denoiser(folder, loud_graph()), budget=0.36)
    build(recipe, folder / "run")
    return Run.opened(folder / "run", Talk())


def halves(path: Path) -> dict[str, int]:
    """The element type of every node's first output, by node name."""
    model = onnx.load(path, load_external_data=False)
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=False)
    types = {v.name: v.type.tensor_type.elem_type for v in inferred.graph.value_info}
    types |= {v.name: v.type.tensor_type.elem_type for v in inferred.graph.output}
    return {node.name: types[node.output[0]] for node in model.graph.node}


def test_loud_layers_are_quantized_and_compute_in_fp32(loud: Run) -> None:
    assert set(loud.calibration.beyond_fp16) >= LOUD
    assert not {"conv_in", "loud.0", "conv_out"} & set(loud.calibration.beyond_fp16)
    types = halves(loud.deployed / DEPLOYED)
    loudest = {name: kind for name, kind in types.items() if name in (*LOUD, "gained_2", "norm")}
    assert set(loudest.values()) == {onnx.TensorProto.FLOAT}, loudest
    assert types["conv_in"] == types["conv_out"] == onnx.TensorProto.FLOAT16
    assert all(loud.plan.schemes[name] != "fp16" for name in LOUD)


def test_its_file_has_the_planned_bytes_and_gives_images(loud: Run, tmp_path: Path) -> None:
    deployed = loud.deployed
    assert constant_bytes(deployed / DEPLOYED) == loud.plan.size_bytes <= loud.plan.budget_bytes
    rng = np.random.default_rng(0)
    sample = rng.standard_normal((2, 3, 8, 8)).astype(np.float32)
    feeds = {"sample": sample, "timestep": np.float32([10, 500])}
    # All of ONNX Runtime's own rewriting is off: it would merge what an engine need not.
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    expected = ort.InferenceSession(deployed / SIMULATED, options).run(None, feeds)[0]
    given = {
        entry.name: feeds[entry.name].astype(np.float16)
        if entry.type == "tensor(float16)"
        else feeds[entry.name]
        for entry in ort.InferenceSession(deployed / DEPLOYED, options).get_inputs()
    }
    half = ort.InferenceSession(deployed / DEPLOYED, options).run(None, given)[0]
    error = np.square(half.astype(np.float32) - expected).sum() / np.square(expected).sum()
    assert error < 1e-3
    # The same file with the loud part in FP16 would give none.
    rewritten = tmp_path / "half"
    rewritten.mkdir()
    source = FloatGraph(loud.exported.path, "timestep", "sample")
    write_quantized(source, [], {}, rewritten)
    broken = ort.InferenceSession(rewritten / DEPLOYED, options).run(None, given)[0]
    assert not np.isfinite(broken).all()
    notes = Evaluation.load(loud.stage("evaluate")).notes
    assert not any("reach beyond" in note for note in notes)


def test_quantizers_of_loud_inputs_read_fp32(loud: Run) -> None:
    """The control's convolutions take INT8 of values that no FP16 holds."""
    path = loud.stage("controls") / "int8-static" / DEPLOYED
    model = onnx.load(path, load_external_data=False)
    readers = {name: node for node in model.graph.node for name in node.input}
    quantize = readers["relu_2_out"]
    types = halves(path)
    assert quantize.op_type == "QuantizeLinear"
    assert types["relu_2"] == types[readers[quantize.output[0]].name] == onnx.TensorProto.FLOAT


@pytest.mark.rtx
def test_its_engine_is_verified(loud: Run, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    request = BuildRequest(loud.deployed / DEPLOYED, loud.target.build_target, batch_profile(loud))
    record = build_engine(request, tmp_path / "engine", expected_layers(loud), Talk())
    assert record.verified, record.problems
