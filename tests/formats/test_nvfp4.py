"""NVFP4 against its definition: blocks of 16 in E2M1, E4M3 block scales, one scalar."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from mpq_deploy.formats.nvfp4 import DynamicBlocks, Nvfp4Matrix
from mpq_deploy.formats.scheme import SCHEMES
from mpq_deploy.graph.layers import Layer
from mpq_deploy.graph.save import constant_bytes
from mpq_deploy.graph.writers.deployed_graphs import DEPLOYED, SIMULATED
from mpq_deploy.runtime.ort import make_session
from tests.engine.float_plans import rounded, write_floats
from tests.formats.test_minifloat import defined, nearest_code
from tests.graphs import denoiser_graph

LEVELS = {name: [float(v) for v in defined(name)] for name in ("e2m1", "e4m3")}


def reference(x: np.ndarray, scalar: float) -> np.ndarray:
    """Blocks of 16 of the last axis, one number at a time."""
    flat, given_scale = x.reshape(-1, 16), np.float32(scalar)
    out = np.empty_like(flat)
    for row, block in enumerate(flat):
        wanted = np.float32(np.abs(block).max() / np.float32(6)) / given_scale
        scale = (
            np.float32(LEVELS["e4m3"][nearest_code(defined("e4m3"), float(wanted))]) * given_scale
        )
        for column, value in enumerate(block):
            size = 0.0
            if scale:
                code = nearest_code(defined("e2m1"), float(np.float32(value / scale)))
                size = LEVELS["e2m1"][code] * float(scale)
            out[row, column] = size if value >= 0 else -size
    return out.reshape(x.shape)


@given(
    st.integers(0, 2**31), st.sampled_from([1e-5, 0.3, 1.0, 50.0]), st.sampled_from([(2,), (1, 2)])
)
@settings(max_examples=25, deadline=None)
def test_activations_are_rounded_as_defined(seed: int, size: float, rows: tuple[int, ...]) -> None:
    x = (np.random.default_rng(seed).standard_normal((*rows, 32)) * size).astype(np.float32)
    np.testing.assert_allclose(
        DynamicBlocks(0.0005).rounded(x, np), reference(x, 0.0005), rtol=1e-6
    )


def test_weights_are_codes_times_two_scales() -> None:
    rng = np.random.default_rng(0)
    weight = (rng.standard_normal((12, 64)) * np.exp(rng.standard_normal((12, 1)))).astype(
        np.float32
    )
    matrix = rounded(weight, Layer("fc", "MatMul", "w", (64, 12), 1, 1, ()), SCHEMES["nvfp4"])
    assert isinstance(matrix, Nvfp4Matrix)
    scalar = float(matrix.tensor_scale)
    amax = float(np.abs(weight).max())
    # The first power of two from which the largest block scale is in range.
    assert amax / (6 * 448) <= scalar < 2 * amax / (6 * 448)
    expected = np.empty_like(weight)
    for (row, column), code in np.ndenumerate(matrix.codes):
        level = LEVELS["e2m1"][code % 8] * (-1 if code >= 8 else 1)
        expected[row, column] = level * LEVELS["e4m3"][matrix.scale[row, column // 16]] * scalar
    assert np.array_equal(matrix.dequantize(), expected)
    # FP16 holds every weight, so the FP16 graph and its twin have the same.
    assert np.array_equal(expected.astype(np.float16).astype(np.float32), expected)
    # No block is worse than with its largest value over six as its scale.
    plain = np.maximum(np.abs(weight.reshape(12, 4, 16)).max(axis=2), 1e-9) / 6 / scalar
    steps = np.array(
        [LEVELS["e4m3"][nearest_code(defined("e4m3"), float(p))] for p in plain.ravel()]
    )
    step = np.repeat(steps.reshape(12, 4), 16, axis=1) * scalar
    codes = [nearest_code(defined("e2m1"), float(v)) for v in (weight / step).ravel()]
    values = np.sign(weight) * np.array([LEVELS["e2m1"][c] for c in codes]).reshape(12, 64) * step
    errors = [np.square(weight - w).reshape(12, 4, 16).sum(axis=2) for w in (expected, values)]
    assert (errors[0] <= errors[1] * (1 + 1e-5)).all()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("nvfp4")
    exported = denoiser_graph(size=8).save(path / "exported.onnx")
    written = write_floats(exported, path, lambda *_: "nvfp4")
    taken = [layer.op for layer in written.expected.layers if layer.scheme == "nvfp4"]
    assert set(taken) == {"Gemm", "MatMul"}
    assert constant_bytes(path / DEPLOYED) == written.expected.total_bytes
    return path


def test_the_deployed_file_is_valid_and_of_the_opset_that_has_fp4(folder: Path) -> None:
    model = onnx.load(folder / DEPLOYED)
    onnx.checker.check_model(folder / DEPLOYED)
    opsets = {one.domain: one.version for one in model.opset_import}
    assert opsets[""] >= 23 and opsets["trt"] == 1
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    codes = [name for name, kind in types.items() if kind == TensorProto.FLOAT4E2M1]
    assert codes and all(
        types[name.replace("//codes", "//block_scale")] == TensorProto.FLOAT8E4M3FN
        for name in codes
    )
    dynamic = [node for node in model.graph.node if node.op_type == "TRT_FP4DynamicQuantize"]
    assert dynamic and all(node.domain == "trt" for node in dynamic)


def test_the_twin_reads_the_very_bytes_of_the_deployed_codes(folder: Path) -> None:
    places = []
    for name in (DEPLOYED, SIMULATED):
        model = onnx.load(folder / name, load_external_data=False)
        places.append(
            {
                tensor.name: {entry.key: entry.value for entry in tensor.external_data}
                for tensor in model.graph.initializer
                if tensor.name.endswith("//codes") and tensor.external_data
            }
        )
    assert places[0] and places[0] == places[1]


@pytest.mark.parametrize("as_written", [True, False], ids=["as written", "fused"])
def test_the_twin_computes_what_the_definition_says(
    folder: Path, tmp_path: Path, as_written: bool
) -> None:
    """One product cut out of the twin, on inputs of its own."""
    model = onnx.load(folder / SIMULATED)
    node = next(node for node in model.graph.node if node.name == "attn.to_out")
    deployed = onnx.load(folder / DEPLOYED)
    constants = {t.name: t for t in deployed.graph.initializer}
    codes = constants["attn.to_out.weight//codes"]
    raw = np.frombuffer(codes.raw_data, np.uint8)
    nibbles = np.stack([raw & 15, raw >> 4], axis=-1).reshape(tuple(codes.dims))
    levels = np.array(LEVELS["e2m1"] + [-v for v in LEVELS["e2m1"]], np.float32)
    scales = onnx.numpy_helper.to_array(constants["attn.to_out.weight//block_scale"])
    scalar = onnx.numpy_helper.to_array(constants["attn.to_out.weight//tensor_scale"])
    steps = np.repeat(scales.astype(np.float32), 16, axis=0) * np.float32(scalar)
    weight = levels[nibbles] * steps
    source = next(
        n for n in model.graph.node if n.output[0] == node.input[0]
    )  # the Reshape that ends the rounding of the activation
    tensor = source.name.split("//")[0]
    cut = onnx.utils.Extractor(model).extract_model([tensor], [node.output[0]])
    cut.graph.input[0].CopyFrom(
        helper.make_tensor_value_info(tensor, TensorProto.FLOAT, [None, None, 64])
    )
    onnx.save(cut, tmp_path / "cut.onnx")
    x = np.random.default_rng(0).standard_normal((2, 3, 64)).astype(np.float32)
    session = make_session(tmp_path / "cut.onnx", 1, fake_quant_only=as_written)
    found = session.run(None, {tensor: x})[0]
    expected = reference(x, float(np.float16(0.002))) @ weight
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    "layer, reason",
    [
        (Layer("c", "Conv", "c.weight", (32, 32, 3, 3), 0, 1, ()), "matrices alone"),
        (Layer("f", "MatMul", "f.weight", (40, 32), 1, 1, ()), "blocks of 16 do not divide"),
        (Layer("f", "Gemm", "f.weight", (32, 48), 0, 1, ()), ""),
    ],
)
def test_what_it_cannot_hold(layer: Layer, reason: str) -> None:
    found = SCHEMES["nvfp4"].refusal(layer)
    assert reason in found and bool(reason) == bool(found)
