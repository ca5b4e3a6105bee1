"""The denoiser in ONNX Runtime: types, shapes, and what is said about a file that cannot be run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from mpq_deploy.errors import ModelError, UsageError
from mpq_deploy.models.export import ExportedModel, export_denoiser, load_exported
from mpq_deploy.models.open import open_denoiser
from mpq_deploy.models.spec import InputSpec
from mpq_deploy.runtime import ort
from mpq_deploy.runtime.ort import OrtDenoiser, make_session, spare_memory
from mpq_deploy.system.memory import Room
from tests.graphs import GraphBuilder
from tests.tiny_models import tiny_onnx_with_yaml


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> ExportedModel:
    folder = tmp_path_factory.mktemp("ort")
    export_denoiser(open_denoiser(tiny_onnx_with_yaml(folder)), folder / "export")
    return load_exported(folder / "export")


def sample(count: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return np.random.default_rng(0).standard_normal((count, 3, 9, 9), np.float32)


def test_one_timestep_stands_for_all_rows(exported: ExportedModel) -> None:
    run = OrtDenoiser(exported.model, exported.spec, threads=1)
    y = {"y": np.arange(4)}
    one = run(sample(4), 250.0, y)
    assert one.dtype == np.float32 and one.shape == (4, 3, 9, 9)
    np.testing.assert_array_equal(one, run(sample(4), np.full(4, 250.0), y))
    assert np.abs(one - run(sample(4), np.array([250, 250, 250, 900]), y))[3].max() > 1e-4


def test_a_session_without_copies_of_its_weights_computes_the_same(
    exported: ExportedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    y = {"y": np.arange(4)}
    usual = OrtDenoiser(exported.model, exported.spec)(sample(4), 250.0, y)
    spared = []
    monkeypatch.setattr(ort, "spare_memory", lambda options: spared.append(spare_memory(options)))
    OrtDenoiser(exported.model, exported.spec)
    assert not spared
    monkeypatch.setattr(ort, "LARGE_WEIGHTS_BYTES", 1)
    found = OrtDenoiser(exported.model, exported.spec)(sample(4), 250.0, y)
    assert spared
    np.testing.assert_allclose(found, usual, rtol=1e-4, atol=1e-5)


def test_inputs_are_cast_to_the_declared_types(exported: ExportedModel) -> None:
    run = OrtDenoiser(exported.model, exported.spec)
    precise = run(sample(2), 10.0, {"y": np.arange(2)})
    cast = run(
        sample(2).astype(np.float64),
        np.array([10, 10], np.int32),
        {"y": np.arange(2, dtype=np.uint8)},
    )
    np.testing.assert_array_equal(precise, cast)


def test_strided_views_are_accepted(exported: ExportedModel) -> None:
    run = OrtDenoiser(exported.model, exported.spec)
    np.testing.assert_array_equal(
        run(sample(4)[::2], 10.0, {"y": np.arange(4)[::2]}),
        run(sample(4), 10.0, {"y": np.arange(4)})[::2],
    )


def test_what_is_missing_or_of_the_wrong_size_is_named(exported: ExportedModel) -> None:
    run = OrtDenoiser(exported.model, exported.spec)
    with pytest.raises(ModelError, match="'y' is missing"):
        run(sample(2), 1.0, {})
    with pytest.raises(ModelError, match="3 rows for 2 samples"):
        run(sample(2), 1.0, {"y": np.arange(3)})
    with pytest.raises(ModelError, match=r"failed on inputs of shapes"):
        run(sample(2)[:, :2], 1.0, {"y": np.arange(2)})


def scalar_timestep_model(shape: list[int]) -> bytes:
    graph = GraphBuilder()
    x, t = graph.input("sample", ["batch", 1, 2, 2]), graph.input("timestep", shape)
    graph.op("Mul", [x, t], "out")
    graph.nodes[-1].output[0] = graph.output("out", ["batch", 1, 2, 2])
    return graph.model().SerializeToString()


@pytest.mark.parametrize("shape", [[], [1]])
def test_a_timestep_without_batch_axis(exported: ExportedModel, shape: list[int]) -> None:
    spec = exported.spec.model_copy(
        update={
            "sample": InputSpec(name="sample", shape=(1, 2, 2)),
            "timestep": InputSpec(name="timestep", shape=tuple(shape), batched=False),
            "conditions": (),
            "output": "out",
        }
    )
    run = OrtDenoiser(scalar_timestep_model(shape), spec)
    ones = np.ones((3, 1, 2, 2), np.float32)
    assert (run(ones, 7.0, {}) == 7).all() and (run(ones, np.full(3, 7.0), {}) == 7).all()
    with pytest.raises(ModelError, match="one timestep per call"):
        run(ones, np.array([1.0, 2.0, 3.0]), {})


@pytest.mark.parametrize("content", [b"", b"not an onnx file at all", b"\x08\x0a\x12"])
def test_a_file_that_is_no_onnx_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"model\.onnx"):
        make_session(path)
    with pytest.raises(ModelError, match="in memory"):
        make_session(content)


@pytest.mark.parametrize("kept", [0.3, 0.9, 0.999])
def test_a_truncated_file_is_named(exported: ExportedModel, tmp_path: Path, kept: float) -> None:
    whole = onnx.load(exported.model).SerializeToString()
    path = tmp_path / "cut.onnx"
    path.write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(ModelError, match=r"cut\.onnx"):
        make_session(path)


def test_a_missing_file_an_unknown_provider_and_a_wrong_description(
    exported: ExportedModel, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match="There is no file"):
        make_session(tmp_path / "none.onnx")
    with pytest.raises(UsageError, match="CPUExecutionProvider"):
        make_session(exported.model, providers=["CPUExecutionProvidr"])
    renamed = exported.spec.model_copy(update={"timestep": InputSpec(name="time")})
    with pytest.raises(ModelError, match="time"):
        OrtDenoiser(exported.model, renamed)
    with pytest.raises(ModelError, match="no output 'outt'"):
        OrtDenoiser(exported.model, exported.spec.model_copy(update={"output": "outt"}))


def quantized_pair() -> bytes:
    """A MatMul between Q/DQ pairs, which ONNX Runtime fuses into an integer product unless told not to."""
    graph = GraphBuilder()
    x, t = graph.input("sample", ["batch", 64]), graph.input("timestep", ["batch"])
    scale, zero = graph.weight("x.scale", np.float32(0.05)), graph.weight("zero", np.int8(0))
    q = graph.op("QuantizeLinear", [x, scale, zero], "q")
    dq = graph.op("DequantizeLinear", [q, scale, zero], "dq")
    codes = graph.weight("w.codes", graph.rng.integers(-127, 128, (64, 64)).astype(np.int8))
    w = graph.op("DequantizeLinear", [codes, graph.weight("w.scale", np.float32(0.01)), zero], "w")
    axes = graph.weight("axes", np.array([1]))
    column = graph.op("Unsqueeze", [t, axes], "column")
    graph.op("Add", [graph.op("MatMul", [dq, w], "product"), column], "out")
    graph.nodes[-1].output[0] = graph.output("out", ["batch", 64])
    return graph.model().SerializeToString()


def test_fake_quantization_equals_arithmetic_by_hand(exported: ExportedModel) -> None:
    model = quantized_pair()
    spec = exported.spec.model_copy(
        update={
            "sample": InputSpec(name="sample", shape=(64,)),
            "timestep": InputSpec(name="timestep"),
            "conditions": (),
            "output": "out",
        }
    )
    x = np.random.default_rng(1).standard_normal((4, 64), np.float32)
    codes = onnx.numpy_helper.to_array(
        next(t for t in onnx.load_from_string(model).graph.initializer if t.name == "w.codes")
    )
    rounded = np.clip(np.rint(x / np.float32(0.05)), -128, 127) * 0.05
    expected = rounded.astype(np.float64) @ (codes * 0.01)
    got = OrtDenoiser(model, spec, fake_quant_only=True)(x, 0.0, {})
    np.testing.assert_allclose(got, expected, atol=1e-4)


@pytest.mark.parametrize("left", [10**12, 10**4])
def test_a_large_quantized_graph_is_dequantized_in_turn_where_memory_is_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: int
) -> None:
    model, opened = tmp_path / "model.onnx", []
    model.write_bytes(quantized_pair())
    x = np.random.default_rng(1).standard_normal((4, 64), np.float32)

    def outputs() -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        session = make_session(model, fake_quant_only=True)
        feeds = {"sample": x, "timestep": np.zeros(4, np.float32)}
        return np.asarray(session.run(["out"], feeds)[0])

    usual = outputs()
    in_turn = ort.dequantize_in_turn
    monkeypatch.setattr(ort, "dequantize_in_turn", lambda options: opened.append(in_turn(options)))
    monkeypatch.setattr(ort, "LARGE_WEIGHTS_BYTES", 1)
    monkeypatch.setattr(ort, "memory_room", lambda: Room(left, "this machine"))
    np.testing.assert_allclose(outputs(), usual, rtol=1e-5, atol=1e-6)
    assert len(opened) == (left == 10**4)
