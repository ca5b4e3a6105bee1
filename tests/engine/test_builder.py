"""Building engines for real, and every way in which a builder may refuse, crash or be absent."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from mpq_deploy.engine import builder as builder_module
from mpq_deploy.engine import trtexec as trtexec_module
from mpq_deploy.engine.build_worker import (
    BuildFailedError,
    BuildJob,
    InputShapes,
    set_capabilities,
)
from mpq_deploy.engine.builder import ENGINE, LAYERS, BatchProfile, BuildRequest, build_engine
from mpq_deploy.engine.expected import ExpectedLayers
from mpq_deploy.engine.failure import known_suspects
from mpq_deploy.engine.layer_information import parse_layer_information
from mpq_deploy.engine.record import RECORD, EngineRecord
from mpq_deploy.engine.target import Target, load_target
from mpq_deploy.engine.trtexec import trtexec_command, trtexec_version
from mpq_deploy.engine.verify import Problem
from mpq_deploy.errors import EngineError, MissingDependencyError, UsageError
from mpq_deploy.system.progress import Talk
from tests.engine.plans import FAMILIES, Written, profile, write_plan
from tests.graphs import GraphBuilder

NOTHING = ExpectedLayers((), 0)


class Listener(Talk):
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    pytest.importorskip("tensorrt_rtx")
    return write_plan(
        tmp_path_factory.mktemp("plan"), lambda number, layer: FAMILIES[number % len(FAMILIES)]
    )


def build(written: Written, out: Path, target: str = "rtx") -> EngineRecord:
    return build_engine(
        BuildRequest(written.model, load_target(target).build_target, profile()),
        out,
        written.expected,
        Talk(),
    )


@pytest.mark.rtx
def test_an_engine_is_built_verified_and_recorded(written: Written, tmp_path: Path) -> None:
    record = build(written, tmp_path / "engine")
    assert sorted(p.name for p in (tmp_path / "engine").iterdir()) == sorted(
        [ENGINE, LAYERS, RECORD]
    )
    assert record.verified
    assert record.require_verified() is record
    assert record.bytes == (tmp_path / "engine" / ENGINE).stat().st_size
    assert record.kernels["correlation Int8"] >= 2
    assert record.timing is not None
    assert record.timing.build_seconds > 0
    loaded = EngineRecord.load(tmp_path / "engine" / RECORD, tmp_path / "engine.timing.json")
    assert loaded == record
    assert loaded.timing == record.timing
    assert "Layers:" in (tmp_path / "engine.log").read_text(encoding="utf-8")
    assert "timing" not in json.loads((tmp_path / "engine" / RECORD).read_text(encoding="utf-8"))


@pytest.mark.rtx
def test_building_twice_gives_the_same_kernels_and_sizes(written: Written, tmp_path: Path) -> None:
    """The engine's own bytes hold numbers that follow memory addresses; everything else repeats."""
    first, second = (build(written, tmp_path / name) for name in ("a", "b"))
    assert (tmp_path / "a" / LAYERS).read_bytes() == (tmp_path / "b" / LAYERS).read_bytes()
    assert (first.weights_bytes, first.activation_bytes) == (
        second.weights_bytes,
        second.activation_bytes,
    )
    assert first.kernels == second.kernels


@pytest.mark.rtx
def test_problems_are_said_and_recorded_and_become_an_error_on_demand(
    written: Written, tmp_path: Path
) -> None:
    listener = Listener()
    wrong = ExpectedLayers(written.expected.layers, 10 * written.expected.total_bytes)
    record = build_engine(
        BuildRequest(written.model, load_target("rtx").build_target, profile()),
        tmp_path / "e",
        wrong,
        listener,
    )
    assert not record.verified
    assert len(record.problems) == len(listener.warnings) == 1
    with pytest.raises(EngineError, match="not what was planned: the engine holds"):
        record.require_verified()


def small_graph(product: str) -> onnx.ModelProto:
    """An INT4 weight on the left (``left``), shared by two products (``shared``), or of an odd size (``odd``)."""
    import ml_dtypes

    g = GraphBuilder()
    k, n = (27, 45) if product == "odd" else (128, 128)
    codes = g.weight("fc.weight//codes", g.rng.integers(-7, 8, (k, n)).astype(ml_dtypes.int4))
    block = 27 if product == "odd" else 64
    scale = g.weight("fc.weight//scale", np.full((k // block, n), 0.01, np.float16))
    w = g.op("DequantizeLinear", [codes, scale], "fc/weight_dequantize", axis=0, block_size=block)
    if product == "left":
        g.op("MatMul", [w, "x"], "y")
    elif product == "odd":
        g.op("MatMul", ["x", w], "y")
    else:
        mean = g.op(
            "ReduceMean", ["x", g.weight("axes", np.array([1], np.int64))], "mean", keepdims=1
        )
        g.op(
            "Add", [g.op("MatMul", ["x", w], "fc.long"), g.op("MatMul", [mean, w], "fc.short")], "y"
        )
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT16, ["N", 128, k])]
    outputs = [helper.make_tensor_value_info("y_out", TensorProto.FLOAT16, None)]
    graph = helper.make_graph(g.nodes, "small", inputs, outputs, g.weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def build_small(product: str, folder: Path) -> EngineRecord:
    onnx.save(small_graph(product), folder / "model.onnx")
    width = 27 if product == "odd" else 128
    shapes = BatchProfile(1, 2, 4, {"x": (128, width)})
    return build_engine(
        BuildRequest(folder / "model.onnx", load_target("rtx").build_target, shapes),
        folder / "engine",
        NOTHING,
        Talk(),
    )


@pytest.mark.rtx
@pytest.mark.parametrize(
    ("product", "names"), [("left", "y (its left operand"), ("shared", "fc.long and fc.short")]
)
def test_a_builder_that_crashes_is_an_error_that_names_the_nodes(
    tmp_path: Path, product: str, names: str
) -> None:
    """These forms end the builder's process with a segmentation fault; ours goes on."""
    pytest.importorskip("tensorrt_rtx")
    with pytest.raises(EngineError) as caught:
        build_small(product, tmp_path)
    assert "crashed (SIGSEGV)" in caught.value.message
    assert names in caught.value.message
    assert str(tmp_path / "engine.log") in caught.value.hint
    assert list((tmp_path / "engine").iterdir()) == []
    assert known_suspects(tmp_path / "model.onnx")


@pytest.mark.rtx
def test_a_graph_that_the_builder_refuses_gives_its_reason(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    with pytest.raises(EngineError, match=r"refuses the graph: .*fc/weight_dequantize"):
        build_small("odd", tmp_path)


@pytest.mark.rtx
def test_a_node_that_the_parser_refuses_is_named(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    model = small_graph("odd")
    del model.graph.node[:]
    model.graph.node.append(helper.make_node("Relu", ["x"], ["r"], name="first"))
    model.graph.node.append(
        helper.make_node("BitShift", ["r", "r"], ["y_out"], name="the.bad.one", direction="LEFT")
    )
    del model.graph.initializer[:]
    onnx.save(model, tmp_path / "model.onnx")
    shapes = BatchProfile(1, 1, 1, {"x": (128, 27)})
    with pytest.raises(EngineError, match=r"cannot read the graph: the.bad.one \(BitShift\)"):
        build_engine(
            BuildRequest(tmp_path / "model.onnx", load_target("rtx").build_target, shapes),
            tmp_path / "e",
            NOTHING,
            Talk(),
        )


@pytest.mark.rtx
def test_a_dynamic_input_without_shape_is_named(written: Written, tmp_path: Path) -> None:
    shapes = BatchProfile(1, 1, 1, {"sample": (3, 8, 8)})
    with pytest.raises(EngineError, match="no shape is given for the dynamic inputs timestep"):
        build_engine(
            BuildRequest(written.model, load_target("rtx").build_target, shapes),
            tmp_path / "e",
            written.expected,
            Talk(),
        )


@pytest.mark.rtx
def test_a_version_that_the_target_is_not_for_is_refused(written: Written, tmp_path: Path) -> None:
    old = load_target("rtx").model_copy(update={"versions": ("0.1",)})
    with pytest.raises(EngineError, match=r"is for tensorrt_rtx 0\.1; "):
        build_engine(
            BuildRequest(written.model, old.build_target, profile()),
            tmp_path / "e",
            written.expected,
            Talk(),
        )


def refuse(target: Target, folder: Path) -> None:
    build_engine(
        BuildRequest(folder / "model.onnx", target.build_target, profile()),
        folder / "engine",
        NOTHING,
        Talk(),
    )


def test_a_missing_builder_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(builder_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"tensorrt-rtx.*mpq-deploy\[rtx\]"):
        refuse(load_target("rtx"), tmp_path)
    with pytest.raises(MissingDependencyError, match=r"mpq-deploy\[tensorrt\]"):
        refuse(load_target("tensorrt-10"), tmp_path)


def test_a_target_without_builder_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has no engine builder"):
        refuse(load_target("onnxruntime-cpu"), tmp_path)


def test_trtexec_absent_says_where_to_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trtexec_module, "find_trtexec", lambda: None)
    with pytest.raises(EngineError) as caught:
        refuse(load_target("jetson-agx-orin"), tmp_path)
    assert "trtexec, which is not on this machine" in caught.value.message
    assert "on the device" in caught.value.hint


@pytest.mark.parametrize("sizes", [(0, 1, 1), (2, 1, 4), (1, 8, 4)])
def test_batch_sizes_out_of_order_are_a_usage_error(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(UsageError, match="Invalid batch sizes"):
        profile(*sizes)


def test_the_trtexec_command_line() -> None:
    shapes = {
        "sample": InputShapes((1, 3, 8, 8), (2, 3, 8, 8), (4, 3, 8, 8)),
        "timestep": InputShapes((1,), (2,), (4,)),
    }
    command = trtexec_command("trtexec", Path("/m.onnx"), Path("/e"), Path("/l.json"), shapes)
    assert command[0] == "trtexec"
    assert {
        "--onnx=/m.onnx",
        "--saveEngine=/e",
        "--stronglyTyped",
        "--exportLayerInfo=/l.json",
    } <= set(command)
    assert "--optShapes=sample:2x3x8x8,timestep:2" in command
    assert not any(
        flag in argument for argument in command for flag in ("--fp16", "--int8", "--best")
    )
    assert not any(
        "Shapes" in argument
        for argument in trtexec_command("t", Path("m"), Path("e"), Path("l"), {})
    )


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("&&&& RUNNING TensorRT.trtexec [TensorRT v100300] # x", "10.3.0"),
        ("[TensorRT v101303]", "10.13.3"),
        ("", ""),
    ],
)
def test_the_version_of_trtexec(text: str, version: str) -> None:
    assert trtexec_version(text) == version


def test_layer_information_of_tensorrt_proper_is_read() -> None:
    layer = {
        "Name": "down.conv1",
        "LayerType": "CaskConvolution",
        "Inputs": [
            {
                "Name": "x",
                "Dimensions": [1, 64, 8, 8],
                "Format/Datatype": "Thirty-two wide channel Int8 format",
            }
        ],
        "Outputs": [
            {
                "Name": "y",
                "Dimensions": [1, 64, 8, 8],
                "Format/Datatype": "Row major linear FP16 format",
            }
        ],
        "Weights": {"Type": "Int8", "Count": 36864},
        "Metadata": "[ONNX Layer: down.conv1]",
    }
    log = parse_layer_information(
        json.dumps({"Layers": [layer]}), "Total Weights Memory: 37000 bytes"
    )
    (read,) = log.layers
    assert (read.type, read.nodes, log.weights_bytes) == ("correlation", ("down.conv1",), 37000)
    assert (read.inputs[0].dtype, read.constants[0].dtype, read.outputs[0].dtype) == (
        "Int8",
        "Int8",
        "Half",
    )


@pytest.mark.parametrize("text", ["", "{}", '{"Layers": ["conv1"]}'])
def test_layer_information_that_proves_nothing_is_an_error(text: str) -> None:
    with pytest.raises(EngineError, match="layer information"):
        parse_layer_information(text, "")


def test_a_job_is_saved_and_loaded(tmp_path: Path) -> None:
    job = BuildJob("m", "a", "b", "c", "d", ("SM80",), profile().inputs(), 1 << 30)
    job.save(tmp_path / "job.json")
    assert BuildJob.load(tmp_path / "job.json") == job


def test_many_problems_are_counted(tmp_path: Path) -> None:
    problems = tuple(Problem(f"layer{i}", "is wrong") for i in range(9))
    sizes = {"bytes": 1, "weights_bytes": 1, "activation_bytes": 1, "planned_bytes": 1}
    record = EngineRecord(
        "rtx",
        "tensorrt_rtx",
        "1",
        ENGINE,
        "0",
        **sizes,
        kernels={},
        verified=False,
        problems=problems,
    )
    record.save(tmp_path / RECORD)
    assert EngineRecord.load(tmp_path / RECORD) == record
    with pytest.raises(EngineError, match=r"layer4: is wrong \(and 4 more\)"):
        record.require_verified()


def test_a_builder_without_that_option_builds_for_the_gpu_that_is_there() -> None:
    """TensorRT proper, on a Jetson: its configuration has no compute capabilities."""
    config = SimpleNamespace()
    set_capabilities(SimpleNamespace(), config, ("SM87",))
    assert not vars(config)
    rtx = SimpleNamespace(ComputeCapability=SimpleNamespace(SM75=1, SM120=2, CURRENT=3))
    with pytest.raises(BuildFailedError) as caught:
        set_capabilities(rtx, config, ("SM75", "SM87"))
    message = caught.value.errors[0]["message"]
    assert message == "it builds nothing for SM87, only for SM75, SM120"
