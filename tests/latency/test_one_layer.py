"""Graphs of one layer: they hold the scheme's form, and TensorRT-RTX builds what was planned."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from mpq_deploy.device.run import Run
from mpq_deploy.engine.target import load_target
from mpq_deploy.formats.scheme import SCHEMES
from mpq_deploy.graph.dialects import dialect_named
from mpq_deploy.graph.layers import Layer, LayerUse, Window
from mpq_deploy.graph.writers.deployed_graphs import SIMULATED
from mpq_deploy.latency import profile
from mpq_deploy.latency.latency_table import LayerShape
from mpq_deploy.latency.one_layer import OneLayer, write_one_layer
from mpq_deploy.latency.profile import build_one_layer

FORMS = (
    "fp16",
    "w8a8",
    "w8a16",
    "w4a16-b64",
    "w4a8-b64",
    "w4a16-b128+rows2",
    "w4a16-b128+lowrank8",
    "w8a8+cols1",
    "w8a8+scale5",
)


def convolution(scheme: str) -> OneLayer:
    layer = Layer(
        "block.conv",
        "Conv",
        "block.conv.weight",
        (64, 64, 3, 3),
        0,
        1,
        (LayerUse("/conv", "a", "b"),),
    )
    attributes = [ir.AttrInt64s("pads", [1, 1, 1, 1]), ir.AttrInt64s("strides", [2, 2])]
    bias = ir.Value(name="bias", const_value=ir.Tensor(np.ones(64, np.float32)))
    node = ir.Node("", "Conv", [None, None, bias], attributes, name="/conv")
    shape = LayerShape("Conv", (2, 64, 16, 16), (2, 64, 8, 8), (64, 64, 3, 3))
    return OneLayer(layer, node, shape, SCHEMES[scheme])


def windowed(scheme: str) -> OneLayer:
    """The convolution, as a product over its windows where its weight alone is quantized."""
    one = convolution(scheme)
    window = Window((2, 2), (1, 1), (1, 1, 1, 1))
    return replace(one, layer=replace(one.layer, window=window))


def line(scheme: str) -> OneLayer:
    """A 1-D convolution as a product."""
    layer = Layer(
        *("line", "Conv", "line.weight", (64, 64, 3), 0, 1),
        (LayerUse("/line", "a", "b"),),
        window=Window((1,), (1,), (1, 1)),
    )
    node = ir.Node("", "Conv", [None, None], [ir.AttrInt64s("pads", [1, 1])], name="/line")
    shape = LayerShape("Conv", (2, 64, 16), (2, 64, 16), (64, 64, 3))
    return OneLayer(layer, node, shape, SCHEMES[scheme])


def product(scheme: str) -> OneLayer:
    layer = Layer("to_q", "MatMul", "to_q.weight", (128, 64), 1, 1, (LayerUse("/to_q", "a", "b"),))
    node = ir.Node("", "MatMul", [None, None], name="/to_q")
    return OneLayer(
        layer, node, LayerShape("MatMul", (2, 16, 128), (2, 16, 64), (128, 64)), SCHEMES[scheme]
    )


@pytest.mark.parametrize(
    "make", [convolution, windowed, product], ids=["conv", "windowed", "matmul"]
)
@pytest.mark.parametrize("scheme", FORMS)
def test_a_layer_alone_has_its_schemes_bytes_and_shapes(
    make: object, scheme: str, tmp_path: Path
) -> None:
    one: OneLayer = make(scheme)  # type: ignore[operator]
    size = write_one_layer(one, tmp_path, dialect_named("trt-rtx"))
    bias = 2 * 64 if one.layer.op == "Conv" else 0
    form = one.scheme
    # A graph input's producer is no norm: factors of channels are a constant of their own.
    assert size == form.weight_bytes(one.layer) + form.input_bytes(one.layer) + bias
    session = ort.InferenceSession(str(tmp_path / SIMULATED), providers=["CPUExecutionProvider"])
    x = np.random.default_rng(0).standard_normal(one.shape.input_shape).astype(np.float32)
    assert session.run(None, {"x": x})[0].shape == one.shape.output_shape
    nodes = {node.op_type for node in onnx.load(tmp_path / SIMULATED).graph.node}
    assert ("QuantizeLinear" in nodes) == (form.activation is not None)


@pytest.mark.rtx
@pytest.mark.parametrize("scheme", ["fp16", "w8a8", "w4a16-b64", "w4a8-b64", "w4a16-b128+rows2"])
def test_the_builder_makes_of_a_layer_alone_what_its_scheme_means(
    scheme: str, tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt_rtx")
    record = build_one_layer(convolution(scheme), load_target("rtx"), tmp_path)
    assert record.verified, record.problems


@pytest.mark.rtx
@pytest.mark.parametrize(
    "one",
    [
        *(windowed(name) for name in ("w4a16-b64", "w8a16", "w8a8", "w4a16-b128+rows2")),
        *(line(name) for name in ("w4a16-b64", "w8a16")),
    ],
    ids=lambda one: f"{one.layer.name}-{one.scheme.name}",
)
def test_a_product_over_windows_takes_its_weight_packed(one: OneLayer, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    record = build_one_layer(one, load_target("rtx"), tmp_path)
    # Neither wrong nor slow: nothing is unpacked at a call.
    assert record.verified and not record.problems


@pytest.mark.rtx
def test_a_timed_layer_becomes_a_row_with_its_provenance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorrt_rtx")
    # What runs the engine is replaced: no GPU is here.
    times = Run({}, (3.0, 1.0, 2.0), None, "a GPU", "SM86")
    monkeypatch.setattr(profile, "run_engine", lambda *arguments: times)
    wanted = object.__new__(profile.Profile)
    one = product("w8a8")
    wanted.target, wanted.talk, wanted.batch = load_target("rtx"), profile.Talk(), 2
    wanted.jobs = {(one.shape, "w8a8"): one}
    table = wanted.measure(tmp_path / "table.json")
    assert table.entries == {(one.shape, "w8a8"): 2.0}
    assert (table.device, table.source) == ("a GPU", "measured") and table.builder.startswith(
        "tensorrt_rtx 1."
    )
    # A second call finds everything there; on another GPU it refuses to mix.
    monkeypatch.setattr(profile, "time_one_layer", lambda *arguments: pytest.fail("measured again"))
    assert wanted.measure(tmp_path / "table.json").entries == table.entries
    monkeypatch.undo()
    monkeypatch.setattr(profile, "run_engine", lambda *arguments: replace(times, gpu="another GPU"))
    wanted.jobs[one.shape, "fp16"] = product("fp16")
    with pytest.raises(profile.UsageError, match="started on a GPU"):
        wanted.measure(tmp_path / "table.json")


def test_a_layer_that_cannot_be_built_is_said_and_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*arguments: object) -> None:
        raise profile.EngineError("The builder crashed.")

    said: list[str] = []

    class Heard(profile.Talk):
        def warn(self, text: str) -> None:
            said.append(text)

    monkeypatch.setattr(profile, "time_one_layer", fails)
    wanted = object.__new__(profile.Profile)
    wanted.target, wanted.talk, wanted.batch = load_target("rtx"), Heard(), 2
    wanted.jobs = {(product("w8a8").shape, "w8a8"): product("w8a8")}
    assert wanted.measure(tmp_path / "table.json").entries == {}
    assert said == ["to_q as w8a8 is left out: The builder crashed."]
