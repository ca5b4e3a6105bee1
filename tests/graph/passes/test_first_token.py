"""The first token of a text kept apart: the same float graph, and an INT8 range that the other tokens have alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from mpq_deploy.calibrate.activation_shapes import activation_shapes
from mpq_deploy.calls.recorded import RecordedCalls
from mpq_deploy.errors import UsageError
from mpq_deploy.formats.candidates import choices_for, round_candidates, weight_matrix
from mpq_deploy.formats.layer_rounding import InputMoments
from mpq_deploy.formats.scheme import SCHEMES
from mpq_deploy.graph.layers import layer_graph
from mpq_deploy.graph.passes.first_token import (
    SAME_TOKEN,
    FirstTokenPass,
    common_first_token,
    projections,
)
from mpq_deploy.graph.writers.deployed_graphs import (
    DEPLOYED,
    SIMULATED,
    FloatGraph,
    fp16_bytes,
    write_quantized,
)
from mpq_deploy.graph.writers.quantize_layers import LayerRewrite, weight_array
from mpq_deploy.models.spec import DenoiserSpec, InputSpec
from mpq_deploy.rounding.quantizers import Rounding
from mpq_deploy.runtime.ort import session_options
from mpq_deploy.system.progress import Talk
from tests.calls.sets import call_set
from tests.graphs import GraphBuilder

TOKENS, WIDTH, INNER = 6, 16, 8
PROJECTIONS = ("attn2.to_k", "attn2.to_v")


def cross_attention() -> GraphBuilder:
    """Pixels that look at a text: the text's size is read from its shape, too."""
    g = GraphBuilder(seed=1)
    g.input("sample", ["N", 4, 4, 4])
    g.input("text", ["N", TOKENS, WIDTH])
    flat = g.op(
        "Reshape", ["sample", g.weight("flat", np.array([0, 4, 16], np.int64))], "flat/reshape"
    )
    pixels = g.op("Transpose", [flat], "pixels", perm=[0, 2, 1])
    query = g.matmul(pixels, "attn2.to_q", INNER, 4)
    key, value = (g.matmul("text", name, INNER, WIDTH) for name in PROJECTIONS)
    turned = g.op("Transpose", [key], "key/turned", perm=[0, 2, 1])
    # A token thirty times as large must not make the attention look at one token alone.
    scores = g.op(
        "Mul",
        [g.op("MatMul", [query, turned], "scores"), g.weight("small", np.float32([0.02]))],
        "scaled",
    )
    looked = g.op("MatMul", [g.op("Softmax", [scores], "softmax", axis=-1), value], "looked")
    out = g.matmul(looked, "attn2.to_out", 4, INNER)
    back = g.op("Transpose", [out], "back", perm=[0, 2, 1])
    g.op("Reshape", [back, g.weight("square", np.array([0, 4, 4, 4], np.int64))], "square/reshape")
    g.nodes[-1].output[0] = "out_sample"
    g.output("out_sample", ["N", 4, 4, 4])
    return g


def texts(first: float, rows: int = 8, seed: int = 0) -> np.ndarray:
    """Texts [N, T, C] that begin with one token, ``first`` times as large as the others."""
    rng = np.random.default_rng(seed)
    found = rng.standard_normal((rows, TOKENS, WIDTH), np.float32)
    found[:, 0] = first * np.random.default_rng(9).standard_normal(WIDTH, np.float32)
    return found


def feeds(text: np.ndarray) -> dict[str, np.ndarray]:
    sample = np.random.default_rng(1).standard_normal((len(text), 4, 4, 4), np.float32)
    return {"sample": sample, "text": text}


def run(path: Path, text: np.ndarray) -> np.ndarray:
    session = ort.InferenceSession(str(path), session_options(1, fake_quant_only=True))
    return session.run(None, feeds(text))[0]


def saved(folder: Path, text: np.ndarray, apart: bool) -> Path:
    path = cross_attention().save(folder / f"apart-{apart}.onnx")
    if apart:
        model = ir.load(path)
        assert {node.name for node in projections(model, "text")} == set(PROJECTIONS)
        assert FirstTokenPass("text", common_first_token("text", text))(model).modified
        ir.save(model, path)
        onnx.checker.check_model(path, full_check=True)
    return path


def test_the_float_graph_computes_the_same(tmp_path: Path) -> None:
    text = texts(30.0)
    plain, apart = (saved(tmp_path, text, flag) for flag in (False, True))
    expected = run(plain, text)
    np.testing.assert_allclose(run(apart, text), expected, rtol=1e-5, atol=1e-6)
    # The row is a constant: what the text begins with is not looked at any more, all else is.
    other = text.copy()
    other[:, 0] *= -1
    np.testing.assert_array_equal(run(apart, other), run(apart, text))
    assert not np.allclose(run(plain, other), expected, rtol=0.1)
    other[:, 1] *= 3
    assert not np.allclose(run(apart, other), run(apart, text), rtol=0.1)


def test_layers_stay_what_they_are_and_bytes_grow_by_the_rows(tmp_path: Path) -> None:
    text = texts(1.0)
    plain, apart = (ir.load(saved(tmp_path, text, flag)) for flag in (False, True))
    before, after = (
        {layer.name: layer for layer in layer_graph(model).layers} for model in (plain, apart)
    )
    assert {n: (x.weight, x.weight_shape) for n, x in before.items()} == {
        n: (x.weight, x.weight_shape) for n, x in after.items()
    }
    assert after["attn2.to_k"].inputs == after["attn2.to_v"].inputs != before["attn2.to_k"].inputs
    assert after["attn2.to_q"].inputs == before["attn2.to_q"].inputs
    # Two rows in FP16, and five whole numbers: three bounds and [1, 1].
    grown = fp16_bytes(apart, "", "sample") - fp16_bytes(plain, "", "sample")
    assert grown == 2 * len(PROJECTIONS) * INNER + 5 * 8


def test_a_second_run_changes_nothing(tmp_path: Path) -> None:
    text = texts(1.0)
    model = ir.load(saved(tmp_path, text, True))
    before = ir.to_proto(model).SerializeToString()
    assert not FirstTokenPass("text", common_first_token("text", text))(model).modified
    assert ir.to_proto(model).SerializeToString() == before


def int8_error(folder: Path, first: float, apart: bool) -> float:
    """Relative error of the output with INT8 keys and values, scales from the largest value that is observed."""
    (folder / "out").mkdir(parents=True)
    text = texts(first, rows=16)
    path = saved(folder, text, apart)
    expected = run(path, text)
    graph = layer_graph(ir.load(path))
    rewrites, scales = [], {}
    for layer in graph.layers:
        scheme = SCHEMES["w8a8" if layer.name in PROJECTIONS else "fp16"]
        weight = weight_matrix(layer, weight_array(graph.model, layer))
        choices = choices_for(layer, (SCHEMES["w8a8"], SCHEMES["fp16"]), lambda *_: "")
        ones = InputMoments(np.ones((layer.reduction, 1, 1)), (1,) * layer.reduction)
        rounded = round_candidates(layer, choices, weight, ones, Rounding(gptq=False, damping=0.01))
        rewrites.append(LayerRewrite(layer, scheme, rounded.forms.get(scheme.weight_form)))
        scales.update({tensor: observed(path, tensor, text) / 127 for tensor in layer.inputs})
    write_quantized(FloatGraph(path, "", "sample"), rewrites, scales, folder / "out")
    found = run(folder / "out" / SIMULATED, text)
    return float(np.sum((found - expected) ** 2) / np.sum(expected**2))


def observed(path: Path, tensor: str, text: np.ndarray) -> float:
    """The largest absolute value of ``tensor``."""
    proto = onnx.load(path)
    if tensor in feeds(text):
        return float(np.abs(feeds(text)[tensor]).max())
    proto.graph.output.append(
        onnx.helper.make_tensor_value_info(tensor, onnx.TensorProto.FLOAT, None)
    )
    session = ort.InferenceSession(proto.SerializeToString(), session_options(1))
    return float(np.abs(session.run([tensor], feeds(text))[0]).max())


def test_a_large_first_token_no_longer_sets_the_others_range(tmp_path: Path) -> None:
    with_it, without = (
        int8_error(tmp_path / f"large-{flag}", 30.0, flag) for flag in (True, False)
    )
    assert with_it < without / 20
    alike = [int8_error(tmp_path / f"alike-{flag}", 1.0, flag) for flag in (True, False)]
    assert 0.5 < alike[0] / alike[1] < 1.2
    # Kept apart, the others have the error that they have beside a token like themselves.
    assert with_it < 2 * alike[0]


def test_shapes_are_found_along_the_batch(tmp_path: Path) -> None:
    text = texts(1.0)
    graph = layer_graph(ir.load(saved(tmp_path, text, True)))
    spec = DenoiserSpec(
        name="any",
        source="any",
        sample=InputSpec(name="sample", shape=(4, 4, 4)),
        timestep=None,
        conditions=(InputSpec(name="text", shape=(TOKENS, WIDTH)),),
        scheduler={},
    )
    recorded = call_set(feeds(text)["sample"][None], [0.0], np.arange(len(text)), spec, text=text)
    found = activation_shapes(graph, RecordedCalls(recorded, spec), Talk())
    rest = found[next(layer.inputs[0] for layer in graph.layers if layer.name == "attn2.to_k")]
    assert (rest.shape, rest.batch_axis) == ((1, TOKENS - 1, WIDTH), 0)


@pytest.mark.rtx
def test_tensorrt_builds_it_in_int8(tmp_path: Path) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    int8_error(tmp_path / "run", 30.0, True)
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    assert parser.parse_from_file(str(tmp_path / "run" / "out" / DEPLOYED)), parser.get_error(0)
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    for name, shape in {"sample": (4, 4, 4), "text": (TOKENS, WIDTH)}.items():
        profile.set_shape(name, *((batch, *shape) for batch in (1, 2, 4)))
    config.add_optimization_profile(profile)
    assert builder.build_serialized_network(network, config) is not None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (texts(1.0)[:, :1], "has only 1 token"),
        (np.ones((2, 3, 4)) * np.array([1, 1 + 2 * SAME_TOKEN])[:, None, None], "differ"),
    ],
)
def test_texts_that_begin_differently_are_refused(text: np.ndarray, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        common_first_token("text", text)
