"""The FP16 file against its FP32 twin: equal where FP16 is enough, refused where its range is not."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from mpq_deploy.calibrate.fp16_range import large_values
from mpq_deploy.calls.recorded import RecordedCalls
from mpq_deploy.errors import ModelError
from mpq_deploy.evaluate.half import ComparedFiles, HalfPrecision, half_precision
from mpq_deploy.graph.writers.deployed_graphs import (
    DEPLOYED,
    SIMULATED,
    FloatGraph,
    write_quantized,
)
from mpq_deploy.models.spec import DenoiserSpec, InputSpec
from mpq_deploy.system.progress import Talk
from tests.calls.sets import call_set

SPEC = DenoiserSpec(
    name="tiny",
    source="test",
    sample=InputSpec(name="sample", shape=(3, 8, 8)),
    timestep=InputSpec(name="timestep"),
    scheduler={"_class_name": "DDIMScheduler", "num_train_timesteps": 100},
    output="out_sample",
)


def exported(path: Path, size: float, mended: float = 0.5) -> Path:
    """Write a convolution whose values are ``size`` times too large, a product that mends that, and the timestep."""
    rng = np.random.default_rng(0)
    constants = {
        "up.weight": size * rng.standard_normal((3, 3, 1, 1)),
        "back": np.array(mended / size),
        "column": np.array([1, 2, 3], np.int64),
        "slow": np.array(1e-3),
    }
    nodes = [
        helper.make_node("Conv", ["sample", "up.weight"], ["large"], name="up"),
        helper.make_node("Mul", ["large", "back"], ["usual"], name="mend"),
        helper.make_node("Unsqueeze", ["timestep", "column"], ["late"], name="widen"),
        helper.make_node("Mul", ["late", "slow"], ["slowly"], name="slow_down"),
        helper.make_node("Add", ["usual", "slowly"], ["out_sample"], name="end"),
    ]
    shape = ["n", 3, 8, 8]
    graph = helper.make_graph(
        nodes,
        "denoiser",
        [
            helper.make_tensor_value_info("sample", TensorProto.FLOAT, shape),
            helper.make_tensor_value_info("timestep", TensorProto.FLOAT, ["n"]),
        ],
        [helper.make_tensor_value_info("out_sample", TensorProto.FLOAT, shape)],
        [
            numpy_helper.from_array(v if v.dtype == np.int64 else v.astype(np.float32), k)
            for k, v in constants.items()
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(onnx.shape_inference.infer_shapes(model), path)
    return path


def compared(folder: Path, size: float, mended: float = 0.5) -> HalfPrecision:
    model = exported(folder / "model.onnx", size, mended)
    (folder / "written").mkdir()
    write_quantized(FloatGraph(model, "timestep", "sample"), [], {}, folder / "written")
    rng = np.random.default_rng(1)
    calls = call_set(
        rng.standard_normal((5, 2, 3, 8, 8)).astype(np.float32),
        np.linspace(99, 0, 5),
        np.zeros(2, np.int64),
    )
    written = folder / "written"
    files = ComparedFiles(model, written / DEPLOYED, written / SIMULATED)
    return half_precision(files, RecordedCalls(calls, SPEC), Talk())


def test_fp16_costs_its_rounding_and_no_more(tmp_path: Path) -> None:
    found = compared(tmp_path, 100.0)
    assert 0 < found.deployed < 1e-5 and found.twin < 1e-6 and found.calls == 3
    assert not found.warning
    assert f"{found.deployed:.2e}" in found.note and f"{found.twin:.2e}" in found.note


def test_values_beyond_fp16_are_named_before_an_engine_shows_them(tmp_path: Path) -> None:
    """ONNX Runtime merges the two factors, so its output is as it should be; an engine need not."""
    found = compared(tmp_path, 2e4)
    (large,) = found.beyond
    most = large.most
    assert (large.node, large.op) == ("up", "Conv") and 65504 < most < 1e6
    assert (
        f"up (Conv) {most:.3g}: an engine may give NaN" in found.warning
        and f"up (Conv) {most:.3g}." in found.note
    )


def test_a_graph_of_which_nothing_computes_in_fp16_has_nothing_beyond_it(tmp_path: Path) -> None:
    model = exported(tmp_path / "model.onnx", 2e4)
    rng = np.random.default_rng(1)
    drawn = rng.standard_normal((1, 2, 3, 8, 8)).astype(np.float32)
    calls = RecordedCalls(call_set(drawn, np.array([50.0]), np.zeros(2, np.int64)), SPEC)
    every = [node.name for node in onnx.load(model).graph.node]
    assert [one.node for one in large_values(model, calls, Talk())] == ["up"]
    assert large_values(model, calls, Talk(), every) == ()


def test_an_output_that_is_not_finite_in_fp16_ends_the_build(tmp_path: Path) -> None:
    """The last node's values are beyond FP16, so no runtime can give them."""
    with pytest.raises(
        ModelError,
        match=r"not finite at timestep 99: .* reach beyond: up \(Conv\) \S+, mend \(Mul\)",
    ):
        compared(tmp_path, 2e4, mended=1e5)


def test_an_error_that_fp16_multiplies_is_warned_of() -> None:
    assert "5 times" in HalfPrecision(deployed=1e-3, twin=2e-4, calls=3).warning
    assert not HalfPrecision(deployed=1e-3, twin=9e-4, calls=3).warning
    # Twice hardly anything is hardly anything.
    assert not HalfPrecision(deployed=1e-6, twin=1e-8, calls=3).warning


def test_a_file_without_kernels_here_is_said_to_be_unknown(tmp_path: Path) -> None:
    model = exported(tmp_path / "model.onnx", 1.0)
    foreign = onnx.load(model)
    foreign.graph.node[0].op_type = "NoSuchOperator"
    onnx.save(foreign, tmp_path / "foreign.onnx")
    calls = call_set(np.zeros((1, 1, 3, 8, 8), np.float32), np.zeros(1), np.zeros(1, np.int64))
    files = ComparedFiles(model, tmp_path / "foreign.onnx", model)
    found = half_precision(files, RecordedCalls(calls, SPEC), Talk())
    assert (
        found.warning == found.note and "unknown" in found.note and "NoSuchOperator" in found.note
    )
