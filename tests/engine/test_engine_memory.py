"""What an engine takes on its device: bytes counted by hand, and against TensorRT-RTX's own figures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from mpq_deploy.device.generate.residency import RUNTIME_BYTES
from mpq_deploy.engine.builder import BuildRequest, build_engine
from mpq_deploy.engine.engine_memory import (
    COPIES,
    WORKSPACE_BYTES,
    estimate_memory,
    refuse_too_large,
)
from mpq_deploy.engine.target import load_target
from mpq_deploy.errors import UsageError
from mpq_deploy.system.progress import Talk
from tests.engine.plans import FAMILIES, SIZE, profile, write_plan


def chain(folder: Path) -> Path:
    """x [N, 10] -> a, b = relu(x), exp(a); y = a + b: at the sum a, b and y live; x has gone."""
    nodes = [
        helper.make_node("Relu", ["x"], ["a"], name="a"),
        helper.make_node("Exp", ["a"], ["b"], name="b"),
        helper.make_node("Mul", ["b", "half"], ["c"], name="c"),
        helper.make_node("Add", ["a", "c"], ["y"], name="y"),
    ]
    half = numpy_helper.from_array(np.array(0.5, np.float16), "half")
    sides = [helper.make_tensor_value_info(name, TensorProto.FLOAT16, ["N", 10]) for name in "xy"]
    graph = helper.make_graph(nodes, "chain", sides[:1], sides[1:], [half])
    path = folder / "chain.onnx"
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path
    )
    return path


@pytest.mark.parametrize("batch", [1, 7])
def test_what_lives_at_once_is_counted_by_hand(batch: int, tmp_path: Path) -> None:
    found = estimate_memory(chain(tmp_path), {"x": (batch, 10)}, 1000)
    # Three tensors of 10 halves live at any node but the first, where there are two.
    assert found.activation_bytes == WORKSPACE_BYTES + COPIES * 3 * 2 * 10 * batch
    assert found.unpacked_bytes == 0
    assert found.total_bytes == 1000 + found.activation_bytes + RUNTIME_BYTES


@pytest.mark.parametrize(("channels", "fused"), [(16, False), (64, True), (160, False)])
def test_scores_of_an_attention_in_one_kernel_are_nowhere(
    channels: int, fused: bool, tmp_path: Path
) -> None:
    nodes = [
        helper.make_node("MatMul", ["q", "k"], ["scores"]),
        helper.make_node("Softmax", ["scores"], ["shares"]),
        helper.make_node("MatMul", ["shares", "v"], ["y"]),
    ]
    shapes = {"q": (2, 512, channels), "k": (2, channels, 512), "v": (2, 512, channels)}
    sides = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT16, shape)
        for name, shape in {**shapes, "y": shapes["v"]}.items()
    ]
    graph = helper.make_graph(nodes, "attention", sides[:3], sides[3:])
    opset = [helper.make_opsetid("", 21)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=10), tmp_path / "model.onnx")
    found = estimate_memory(tmp_path / "model.onnx", shapes, 1000)
    # Of one kernel q, k and v; else the scores twice, or once beside all three.
    one, scores = 2 * 2 * 512 * channels, 2 * 2 * 512 * 512
    alive = 3 * one if fused else max(2 * scores + one, scores + 3 * one)
    assert found.activation_bytes == WORKSPACE_BYTES + COPIES * alive


def test_more_batch_takes_more_and_weights_are_no_activations(tmp_path: Path) -> None:
    written = write_plan(tmp_path, lambda number, layer: FAMILIES[number % len(FAMILIES)])
    found = [
        estimate_memory(
            written.model, {"sample": (n, 3, SIZE, SIZE), "timestep": (n,)}, 10
        ).activation_bytes
        for n in (1, 2, 4)
    ]
    steps = np.diff(found)
    assert steps[0] > 0 and steps[1] == 2 * steps[0]


@pytest.mark.rtx
def test_the_builders_own_figure_is_near(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    written = write_plan(tmp_path, lambda number, layer: FAMILIES[number % len(FAMILIES)])
    record = build_engine(
        BuildRequest(written.model, load_target("rtx").build_target, profile()),
        tmp_path / "engine",
        written.expected,
        Talk(),
    )
    found = estimate_memory(written.model, {"sample": (4, 3, SIZE, SIZE), "timestep": (4,)}, 10)
    assert record.activation_bytes is not None
    assert 0.35 < record.activation_bytes / found.activation_bytes < 2


def test_a_target_without_the_memory_is_refused_one_that_does_not_tell_is_not(
    tmp_path: Path,
) -> None:
    found = estimate_memory(chain(tmp_path), {"x": (1, 10)}, int(12e9))
    with pytest.raises(
        UsageError, match=r"take 12\.51 GB at batch 1 .*rtx has 12\.00 GB \(GeForce RTX 3060"
    ):
        refuse_too_large(found, load_target("rtx"), 1)
    refuse_too_large(found, load_target("jetson-agx-orin"), 1)
    refuse_too_large(found, load_target("tensorrt-10"), 1)
