"""FP8 and 4-bit storage with FP8 compute: codes, files and graphs against arithmetic written out here."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpq_deploy.engine.target import load_target
from mpq_deploy.errors import UsageError
from mpq_deploy.formats.fp8 import FP8_INPUT, E4M3Matrix, FloatGrid, RequantizedMatrix
from mpq_deploy.formats.layer_rounding import InputMoments, LayerRounding
from mpq_deploy.formats.scheme import NEW_FAMILIES, SCHEMES
from mpq_deploy.graph.layers import Layer
from mpq_deploy.graph.save import constant_bytes
from mpq_deploy.graph.writers.deployed_graphs import DEPLOYED, SIMULATED
from mpq_deploy.recipe import load_recipe
from mpq_deploy.rounding.quantizers import Rounding
from mpq_deploy.run.recipe_check import check_recipe
from mpq_deploy.runtime.ort import make_session
from tests.engine.float_plans import write_floats
from tests.graphs import denoiser_graph

E4M3 = ml_dtypes.float8_e4m3fn
BLOCKS = ("w4f8-b32", "w4f8-b64")


def linear(reduction: int, channels: int) -> Layer:
    return Layer("fc", "MatMul", "fc.weight", (reduction, channels), 1, 1, ())


def correlated(reduction: int, seed: int = 0) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal((4 * reduction, reduction))
    x[:, 1:] += 0.8 * x[:, :-1]
    return (x.T @ x / len(x)).astype(np.float32)


def rounded(name: str, weight: np.ndarray, hessian: np.ndarray, gptq: bool) -> object:
    layer = linear(weight.shape[1], len(weight))
    inputs = InputMoments(hessian[None], (len(hessian),))
    how = Rounding(gptq, 0.05, 2 if gptq else 0)
    scheme = SCHEMES[name]
    work = LayerRounding(layer, weight, inputs, how)
    return scheme.weight.rounder([scheme], work)[scheme.weight_form]


def seen(weight: np.ndarray, matrix: object, hessian: np.ndarray) -> float:
    error = (weight - matrix.dequantize()).astype(np.float64)
    return float(np.einsum("ok,kl,ol->", error, hessian, error))


@pytest.mark.parametrize("name", ["f8a8", *BLOCKS, "nvfp4"])
def test_error_compensated_rounding_is_better_than_nearest(name: str) -> None:
    weight = np.random.default_rng(1).standard_normal((32, 128)).astype(np.float32) * 0.1
    hessian = correlated(128)
    compensated, plain = (rounded(name, weight, hessian, gptq) for gptq in (True, False))
    assert seen(weight, compensated, hessian) < 0.7 * seen(weight, plain, hessian)
    assert np.array_equal(compensated.scale, plain.scale)


def test_scales_are_no_worse_than_the_largest_value_over_448() -> None:
    rng = np.random.default_rng(2)
    weight = (rng.standard_normal((64, 96)) * np.exp(rng.standard_normal((64, 1)))).astype(
        np.float32
    )
    matrix = rounded("f8a8", weight, np.eye(96, dtype=np.float32), False)
    assert isinstance(matrix, E4M3Matrix)
    scale = (np.abs(weight).max(axis=1) / 448).astype(np.float16).astype(np.float32)[:, None]
    plain = np.clip(weight / scale, -448, 448).astype(E4M3).astype(np.float32) * scale
    errors = [np.square(weight - w).sum(axis=1) for w in (matrix.dequantize(), plain)]
    assert (errors[0] <= errors[1] * (1 + 1e-5)).all()


@given(st.integers(0, 2**31), st.floats(1e-4, 10.0))
@settings(max_examples=40, deadline=None)
def test_fp16_and_fp32_give_the_same_fp8_codes_of_4_bit_weights(seed: int, size: float) -> None:
    """What an engine does in FP16 between the INT4 codes and E4M3, a step at a time."""
    weight = (np.random.default_rng(seed).standard_normal((8, 64)) * size).astype(np.float32)
    matrix = rounded("w4f8-b32", weight, np.eye(64, dtype=np.float32), False)
    assert isinstance(matrix, RequantizedMatrix)
    assert matrix.codes.min() >= -8 and matrix.codes.max() <= 7
    scale, channel = np.repeat(matrix.scale, 32, axis=1), matrix.channel_scale[:, None]
    half = matrix.codes.astype(np.float16) * scale
    half = np.clip((half / channel).astype(np.float16), -448, 448).astype(E4M3)
    assert np.array_equal(half.astype(np.float32) * channel.astype(np.float32), matrix.dequantize())


def quantized_weights(path: Path) -> dict[str, np.ndarray]:
    """The dequantized weight of each layer, from the file by ml_dtypes and NumPy alone."""
    model = onnx.load(path)
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    found = {}
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0].endswith("//codes"):
            codes, scale = (constants[name] for name in node.input)
            shape = [1] * codes.ndim
            shape[onnx.helper.get_node_attr_value(node, "axis")] = len(scale)
            weight = node.input[0].removesuffix("//codes")
            found[weight] = codes.astype(np.float32) * scale.astype(np.float32).reshape(shape)
    return found


@pytest.mark.parametrize("scheme", ["f8a8", "f8a16", *BLOCKS])
def test_files_hold_the_planned_bytes(tmp_path: Path, scheme: str) -> None:
    exported = denoiser_graph(size=8).save(tmp_path / "exported.onnx")
    written = write_floats(exported, tmp_path, lambda *_: scheme)
    taken = [layer for layer in written.expected.layers if layer.scheme == scheme]
    assert len(taken) >= 5
    assert constant_bytes(tmp_path / DEPLOYED) == constant_bytes(tmp_path / SIMULATED)
    assert constant_bytes(tmp_path / DEPLOYED) == written.expected.total_bytes
    onnx.checker.check_model(tmp_path / DEPLOYED)


@pytest.mark.parametrize("as_written", [True, False], ids=["as written", "fused"])
def test_onnxruntime_computes_what_the_definition_says(tmp_path: Path, as_written: bool) -> None:
    """f8a8 everywhere: the float graph with E4M3 weights from the file, and activations rounded by Cast."""
    exported = denoiser_graph(size=8).save(tmp_path / "exported.onnx")
    written = write_floats(exported, tmp_path, lambda *_: "f8a8")
    nodes = {node for layer in written.expected.layers for node in layer.nodes}
    weights = quantized_weights(tmp_path / DEPLOYED)
    assert len(weights) == len(written.expected.layers)
    reference = onnx.load(exported)
    for tensor in reference.graph.initializer:
        array = onnx.numpy_helper.to_array(tensor)
        if tensor.name in weights:
            array = weights[tensor.name]
        elif array.dtype == np.float32 and tensor.name != "time.frequencies":
            array = array.astype(np.float16).astype(np.float32)
        tensor.CopyFrom(onnx.numpy_helper.from_array(np.asarray(array), tensor.name))
    steps = {"rq.scale": float(np.float16(0.02)), "rq.low": -448.0, "rq.high": 448.0}
    reference.graph.initializer.extend(
        onnx.numpy_helper.from_array(np.asarray(value, np.float32), name)
        for name, value in steps.items()
    )
    rewritten = []
    for number, node in enumerate(reference.graph.node):
        if node.name in nodes:
            names = [f"rq{number}.{step}" for step in range(5)]
            make = onnx.helper.make_node
            rewritten += [
                make("Div", [node.input[0], "rq.scale"], [names[0]], name=names[0]),
                make("Clip", [names[0], "rq.low", "rq.high"], [names[1]], name=names[1]),
                make(
                    "Cast", [names[1]], [names[2]], name=names[2], to=onnx.TensorProto.FLOAT8E4M3FN
                ),
                make("Cast", [names[2]], [names[3]], name=names[3], to=onnx.TensorProto.FLOAT),
                make("Mul", [names[3], "rq.scale"], [names[4]], name=names[4]),
            ]
            node.input[0] = names[4]
        rewritten.append(node)
    del reference.graph.node[:]
    reference.graph.node.extend(rewritten)
    onnx.save(reference, tmp_path / "reference.onnx")
    rng = np.random.default_rng(0)
    feeds = {
        "sample": rng.standard_normal((2, 3, 8, 8)).astype(np.float32),
        "timestep": np.array([5, 900], np.float32),
    }
    found, expected = (
        make_session(tmp_path / name, 1, fake_quant_only=as_written).run(None, feeds)[0]
        for name in (SIMULATED, "reference.onnx")
    )
    # A value between two levels may fall to either: a few of one activation, no more.
    assert np.sum((found - expected) ** 2) <= 1e-3 * np.sum(expected**2)


def test_a_quantizers_levels_are_those_of_the_type() -> None:
    x = np.random.default_rng(3).standard_normal(1000).astype(np.float32) * 8
    expected = np.clip(x / np.float32(0.02), -448, 448).astype(E4M3).astype(np.float32) * 0.02
    np.testing.assert_allclose(FloatGrid(0.02).rounded(x, np), expected, rtol=1e-6)
    assert FP8_INPUT.form == "+e4m3"


@pytest.mark.parametrize(
    "kernel, refused", [((3, 3), ""), ((4, 8), ""), ((6, 6), "6x6"), ((3, 3, 4), "3x3x4")]
)
def test_kernels_that_fall_back_are_no_candidates(kernel: tuple[int, ...], refused: str) -> None:
    layer = Layer("c", "Conv", "c.weight", (32, 32, *kernel), 0, 1, ())
    for name in ("f8a8", "w4f8-b32"):
        assert (
            (refused in SCHEMES[name].refusal(layer))
            if refused
            else not SCHEMES[name].refusal(layer)
        )


@pytest.mark.parametrize(
    "target, name, generation, nearest",
    [
        ("rtx", "f8a8", "Ada", "w8a8"),
        ("rtx", "nvfp4", "Blackwell", "w4a8"),
        ("rtx-ada", "nvfp4", "Blackwell", "w4f8"),
        ("jetson-agx-orin", "f8a8", "Ada", "w8a8"),
    ],
)
def test_a_target_without_the_format_names_the_nearest_and_the_generation(
    target: str, name: str, generation: str, nearest: str
) -> None:
    reason = load_target(target).refusal(linear(64, 64), SCHEMES[name])
    assert generation in reason and reason.endswith(f"nearest: {nearest}") and "\n" not in reason
    recipe = load_recipe(None, {"target": target, "allocate.schemes": ["fp16", name]})
    with pytest.raises(UsageError, match=f"does not take '{name}'.*{generation}"):
        check_recipe(recipe)


def test_targets_that_list_a_format_choose_from_it_by_default() -> None:
    taken = {
        name: set(load_recipe(None, {"target": name}).allocate.schemes) & set(NEW_FAMILIES)
        for name in ("rtx", "rtx-ada", "rtx-blackwell", "onnxruntime-cpu")
    }
    assert taken == {
        "rtx": set(),
        "rtx-ada": {"f8a8", "f8a16", "w4f8"},
        "rtx-blackwell": set(NEW_FAMILIES),
        "onnxruntime-cpu": set(),
    }
    explicit = load_recipe(None, {"target": "rtx-ada", "allocate.schemes": ["fp16", "w8a8"]})
    assert explicit.allocate.schemes == ("fp16", "w8a8")


def test_a_users_target_that_lists_fp8_gives_its_rate(tmp_path: Path) -> None:
    text = "extends: rtx\nname: mine\nschemes: {MatMul: [fp16, w8a8, w8a16, w4a16, w4a8, f8a8]}\n"
    (tmp_path / "mine.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match="schemes list f8a8, and fp8_ops_per_s is not given"):
        load_target(tmp_path / "mine.yaml")
    rate = "fp8_ops_per_s: {value: 1.0e12, source: ours}\n"
    (tmp_path / "mine.yaml").write_text(text + rate, encoding="utf-8")
    assert load_target(tmp_path / "mine.yaml").refusal(linear(64, 64), SCHEMES["f8a8"]) == ""
