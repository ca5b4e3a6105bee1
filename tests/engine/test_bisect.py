"""Looking for what crashes a builder: the search against made-up crashes, and against TensorRT-RTX's real ones."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from mpq_deploy.engine.bisect import ZEROS, find_suspects, quantized_layers
from mpq_deploy.engine.builder import BatchProfile, BuildRequest, build_engine
from mpq_deploy.engine.expected import ExpectedLayers
from mpq_deploy.engine.target import load_target
from mpq_deploy.errors import EngineError
from mpq_deploy.system.progress import Talk
from tests.engine.plans import FAMILIES, SIZE, write_plan
from tests.graphs import GraphBuilder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A denoiser whose layers take all families in turns."""
    return write_plan(
        tmp_path_factory.mktemp("plan"), lambda number, layer: FAMILIES[number % len(FAMILIES)]
    ).model


def crashing_when(together: set[str]) -> Callable[[Path], bool]:
    """A made-up builder that crashes when all these layers are quantized at once."""

    def trial(path: Path) -> bool:
        # Every trial is a whole graph: ONNX Runtime takes it (not through links, so from a copy).
        with tempfile.TemporaryDirectory() as folder:
            whole = shutil.copytree(path.parent, Path(folder) / "copy")
            onnxruntime.InferenceSession(str(whole / path.name))
        return together <= set(quantized_layers(onnx.load(path, load_external_data=False)))

    return trial


def test_the_smallest_crashing_set_is_found_whatever_it_is(model: Path, tmp_path: Path) -> None:
    layers = quantized_layers(onnx.load(model, load_external_data=False))
    assert len(layers) >= 8
    cases = ({layers[0]}, {layers[-1]}, {layers[1], layers[-2]}, {layers[0], layers[3], layers[5]})
    for number, together in enumerate(cases):
        folder = tmp_path / str(number)
        folder.mkdir()
        found = find_suspects(model, folder, crashing_when(together), max_trials=200)
        assert found is not None
        assert set(found.nodes) == together
        assert found.quantized and found.certain
        assert found.trials < 2 ** min(len(layers), 7)
        if (folder / ZEROS).exists():
            # Sparse: no disk for the weights that became float.
            assert (folder / ZEROS).stat().st_blocks == 0


def test_trials_and_time_are_bounded_and_that_is_said(model: Path, tmp_path: Path) -> None:
    layers = quantized_layers(onnx.load(model, load_external_data=False))
    together = {layers[0], layers[4]}
    for number, (most, seconds) in enumerate(((4, 60.0), (100, 0.0))):
        folder = tmp_path / str(number)
        folder.mkdir()
        found = find_suspects(model, folder, crashing_when(together), most, seconds)
        assert found is not None and not found.certain
        assert found.trials <= most
        assert together <= set(found.nodes)


def test_a_crash_that_does_not_come_again_is_none(model: Path, tmp_path: Path) -> None:
    assert find_suspects(model, tmp_path, lambda path: False) is None


def test_a_crash_without_quantization_is_found_by_halving(model: Path, tmp_path: Path) -> None:
    proto = onnx.load(model, load_external_data=False)
    plain = [
        node.name
        for node in proto.graph.node
        if node.op_type in ("Sigmoid", "Mul", "Add", "Softmax")
    ]
    bad = plain[len(plain) // 2]

    def trial(path: Path) -> bool:
        return bad in {node.name for node in onnx.load(path, load_external_data=False).graph.node}

    found = find_suspects(model, tmp_path, trial)
    assert found is not None and not found.quantized and found.certain
    assert found.nodes == (bad,)


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A STAND-IN for trtexec on the path, which dies when told to; returns the file that counts its calls."""
    (tmp_path / "bin").mkdir()
    script = Path(__file__).with_name("crashing_trtexec.py")
    trtexec = tmp_path / "bin" / "trtexec"
    trtexec.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{script}" "$@"\n', encoding="utf-8")
    trtexec.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("CRASH_COUNT", str(tmp_path / "count"))
    return tmp_path / "count"


def build_by_trtexec(model: Path, folder: Path) -> EngineError:
    profile = BatchProfile(1, 1, 2, {"sample": (3, SIZE, SIZE), "timestep": ()})
    with pytest.raises(EngineError) as caught:
        build_engine(
            BuildRequest(model, load_target("jetson-agx-orin").build_target, profile),
            folder,
            ExpectedLayers((), 0),
            Talk(),
        )
    assert list(folder.iterdir()) == []
    return caught.value


def test_a_crash_of_trtexec_is_searched_too(
    model: Path, stand_in: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a STAND-IN that dies of a signal: no trtexec was at hand."""
    layers = quantized_layers(onnx.load(model, load_external_data=False))
    bad = [layers[1], layers[-2]]
    monkeypatch.setenv("CRASH_WHEN", json.dumps({"quantized": bad}))
    said = build_by_trtexec(model, tmp_path / "engine").message
    assert "crashed (SIGSEGV)" in said
    assert f"these are quantized together: {', '.join(bad)}; but not when nothing is" in said
    # The first call was the build itself.
    trials = len(stand_in.read_text(encoding="utf-8")) - 1
    assert f"Suspects by {trials} smaller builds" in said and "ended early" not in said


def test_a_crash_of_trtexec_without_quantization(
    model: Path, stand_in: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beginnings of the graph may lack an input, whose name trtexec would refuse; here a shell script runs it."""
    monkeypatch.setenv("CRASH_VIA_SHELL", "1")
    nodes = [
        node.name
        for node in onnx.load(model, load_external_data=False).graph.node
        if node.op_type == "Sigmoid"
    ]
    monkeypatch.setenv("CRASH_WHEN", json.dumps({"present": nodes[:1]}))
    said = build_by_trtexec(model, tmp_path / "engine").message
    assert f"even without quantization, once the graph reaches {nodes[0]}." in said


def test_a_device_without_onnx_is_told_what_happened_and_no_more(
    model: Path, stand_in: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *more: None if name == "onnx" else real(name, *more),
    )
    monkeypatch.setenv("CRASH_WHEN", json.dumps({"present": []}))
    said = build_by_trtexec(model, tmp_path / "engine").message
    assert (
        "crashed (SIGSEGV)" in said
        and "onnx is not installed" in said
        and "smaller builds" not in said
    )
    assert stand_in.read_text(encoding="utf-8") == "x"


def test_a_trtexec_that_the_dialect_is_not_written_for_is_refused(
    model: Path, stand_in: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The STAND-IN says 10.3, as JetPack 6 does."""
    monkeypatch.setenv("CRASH_WHEN", json.dumps({"present": ["nothing"]}))
    profile = BatchProfile(1, 1, 2, {"sample": (3, SIZE, SIZE), "timestep": ()})
    with pytest.raises(
        EngineError, match=r"'jetson-thor' is for TensorRT 10\.13, but trtexec is 10\.3\.0"
    ):
        build_engine(
            BuildRequest(model, load_target("jetson-thor").build_target, profile),
            tmp_path / "engine",
            ExpectedLayers((), 0),
            Talk(),
        )


def test_a_refusal_of_trtexec_is_no_crash(
    model: Path, stand_in: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CRASH_WHEN", json.dumps({"present": ["nothing"]}))
    profile = BatchProfile(1, 1, 2, {"nobody": (3, SIZE, SIZE)})
    with pytest.raises(
        EngineError,
        match=r"trtexec refuses the graph: .*Cannot find input tensor with name 'nobody'",
    ):
        build_engine(
            BuildRequest(model, load_target("jetson-agx-orin").build_target, profile),
            tmp_path / "engine",
            ExpectedLayers((), 0),
            Talk(),
        )
    assert stand_in.read_text(encoding="utf-8") == "x"


def shared_weight(products: int) -> onnx.ModelProto:
    """Products that each have an INT4 weight of their own, but the last two, which share one at unlike shapes."""
    import ml_dtypes

    g = GraphBuilder()

    def weight(name: str) -> str:
        codes = g.weight(f"{name}//codes", g.rng.integers(-7, 8, (128, 128)).astype(ml_dtypes.int4))
        scale = g.weight(f"{name}//scale", np.full((2, 128), 0.01, np.float16))
        return g.op("DequantizeLinear", [codes, scale], f"{name}/dequantize", axis=0, block_size=64)

    x = "x"
    for number in range(products):
        x = g.op("MatMul", [x, weight(f"w{number}")], f"fine{number}")
    both = weight("shared")
    mean = g.op("ReduceMean", [x, g.weight("axes", np.array([1], np.int64))], "mean", keepdims=1)
    g.op(
        "Add", [g.op("MatMul", [x, both], "fc.long"), g.op("MatMul", [mean, both], "fc.short")], "y"
    )
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT16, ["N", 128, 128])]
    outputs = [helper.make_tensor_value_info("y_out", TensorProto.FLOAT16, None)]
    graph = helper.make_graph(g.nodes, "shared", inputs, outputs, g.weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


@pytest.mark.rtx
def test_two_products_that_share_an_int4_weight_are_found_by_the_real_builder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT-RTX really crashes on it; our list of known forms is emptied, so that only the search can tell."""
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setattr("mpq_deploy.engine.failure.known_suspects", lambda model: [])
    onnx.save(shared_weight(3), tmp_path / "model.onnx")
    profile = BatchProfile(1, 1, 2, {"x": (128, 128)})
    with pytest.raises(EngineError) as caught:
        build_engine(
            BuildRequest(tmp_path / "model.onnx", load_target("rtx").build_target, profile),
            tmp_path / "engine",
            ExpectedLayers((), 0),
            Talk(),
        )
    assert "crashed (SIGSEGV)" in caught.value.message
    assert (
        "these are quantized together: fc.long, fc.short; but not when nothing is"
        in caught.value.message
    )
    assert "fine" not in caught.value.message.split("Suspects by")[1]
    assert list((tmp_path / "engine").iterdir()) == []
