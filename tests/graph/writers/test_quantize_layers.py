"""Quantized graphs against NumPy arithmetic, byte counts against the file, FP16 against FP32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from mpq_deploy.formats.candidates import (
    LayerCandidates,
    choices_for,
    fold_matrix,
    round_candidates,
    weight_matrix,
)
from mpq_deploy.formats.int4 import Int4Weight
from mpq_deploy.formats.layer_rounding import InputMoments
from mpq_deploy.formats.scheme import SCHEMES, Scheme
from mpq_deploy.formats.sizes import ACTIVATION_SCALE_BYTES, FP16_BYTES
from mpq_deploy.graph.fp16_region import fp16_region
from mpq_deploy.graph.layers import Layer, LayerGraph, layer_graph
from mpq_deploy.graph.passes.fp16_arithmetic import Fp16ArithmeticPass
from mpq_deploy.graph.passes.fp16_storage import Fp16StoragePass
from mpq_deploy.graph.save import constant_bytes
from mpq_deploy.graph.writers.deployed_graphs import (
    DEPLOYED,
    SIMULATED,
    FloatGraph,
    fp16_bytes,
    write_quantized,
)
from mpq_deploy.graph.writers.quantize_layers import LayerRewrite, quantize_layers, weight_array
from mpq_deploy.rounding.quantizers import Rounding
from mpq_deploy.runtime.ort import session_options
from tests.graphs import GraphBuilder, denoiser_graph


def even(layer: Layer, scheme: Scheme) -> str:
    """The one rule of the rtx target that matters here."""
    return "odd" if scheme.weight.bits == 4 and layer.weights % 2 else ""


def candidates_for(graph: LayerGraph) -> dict[str, LayerCandidates]:
    found = {}
    for layer in graph.layers:
        choices = choices_for(
            layer,
            # Those of FP8 and FP4 have tests of their own, in tests/formats.
            tuple(
                s
                for s in SCHEMES.values()
                if not (s.branch or s.simulated or s.range.moves or s.weight.generation)
            ),
            even,
        )
        weight = weight_matrix(layer, weight_array(graph.model, layer))
        moments = np.ones((layer.group * layer.reduction, 1, 1))
        widths = (1,) * layer.reduction
        found[layer.name] = round_candidates(
            layer,
            choices,
            weight,
            InputMoments(moments, widths),
            Rounding(gptq=False, damping=0.01),
        )
    return found


def run(path: Path | bytes, feeds: dict[str, np.ndarray]) -> np.ndarray:
    source = path if isinstance(path, bytes) else str(path)
    return ort.InferenceSession(source, session_options(1, fake_quant_only=True)).run(None, feeds)[
        0
    ]


def feeds(size: int = 8, seed: int = 0, dtype: type = np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "sample": rng.standard_normal((3, 3, size, size)).astype(dtype),
        "timestep": np.array([1, 500, 999], np.float32),
    }


def all_of(graph: LayerGraph, scheme: str) -> dict[str, str]:
    candidates = candidates_for(graph)
    return {
        layer.name: scheme if scheme in {s.name for s in candidates[layer.name].schemes} else "fp16"
        for layer in graph.layers
    }


def mixed(graph: LayerGraph, seed: int) -> dict[str, str]:
    rng = np.random.default_rng(seed)
    return {
        name: str(rng.choice([s.name for s in c.schemes]))
        for name, c in candidates_for(graph).items()
    }


def write(path: Path, graph: LayerGraph, schemes: dict[str, str], folder: Path) -> tuple[int, int]:
    """Write the plan; return the bytes in the file and the bytes that the formula expects."""
    folder.mkdir(exist_ok=True)
    candidates = candidates_for(graph)
    rewrites = [
        LayerRewrite(
            layer,
            SCHEMES[schemes[layer.name]],
            candidates[layer.name].forms.get(SCHEMES[schemes[layer.name]].weight_form),
        )
        for layer in graph.layers
    ]
    scales = dict.fromkeys(graph.activations, 0.03)
    written = write_quantized(FloatGraph(path, "timestep", "sample"), rewrites, scales, folder)
    fixed = fp16_bytes(ir.load(path), "timestep", "sample") - FP16_BYTES * sum(
        layer.weights for layer in graph.layers
    )
    quantized = {
        t for layer in graph.layers if SCHEMES[schemes[layer.name]].activation for t in layer.inputs
    }
    expected = fixed + sum(
        SCHEMES[schemes[layer.name]].weight_bytes(layer) for layer in graph.layers
    )
    return written, expected + ACTIVATION_SCALE_BYTES * len(quantized)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return denoiser_graph().save(tmp_path / "model.onnx")


@pytest.mark.parametrize(
    "scheme", ["fp16", "w8a8", "w8a16", "w4a16-b32", "w4a16-b128", "w4a8-b64", "mix0", "mix1"]
)
def test_the_file_holds_exactly_the_planned_bytes(model: Path, tmp_path: Path, scheme: str) -> None:
    graph = layer_graph(ir.load(model))
    schemes = mixed(graph, int(scheme[3:])) if scheme.startswith("mix") else all_of(graph, scheme)
    written, expected = write(model, graph, schemes, tmp_path / "out")
    assert written == expected
    assert constant_bytes(tmp_path / "out" / SIMULATED) == written
    # An independent count: onnx loads all tensors, 4-bit ones by their packed bytes.
    loaded = onnx.load(tmp_path / "out" / DEPLOYED)
    assert (
        sum(
            len(t.raw_data) or onnx.numpy_helper.to_array(t).nbytes
            for t in loaded.graph.initializer
        )
        == written
    )


@pytest.mark.parametrize("scheme", ["w8a16", "w4a16-b64", "w4a8-b32", "w8a8"])
def test_quantized_weights_compute_what_numpy_says(
    model: Path, tmp_path: Path, scheme: str
) -> None:
    """Replace each float weight by its dequantized one and fake-quantize activations in NumPy terms: same output."""
    graph = layer_graph(ir.load(model))
    schemes = all_of(graph, scheme)
    write(model, graph, schemes, tmp_path / "out")
    reference = onnx.load(model)
    candidates = candidates_for(graph)
    for tensor in reference.graph.initializer:
        layer = next((layer for layer in graph.layers if layer.weight == tensor.name), None)
        array = onnx.numpy_helper.to_array(tensor)
        if layer is not None:
            form = SCHEMES[schemes[layer.name]].weight_form
            array = fold_matrix(layer, candidates[layer.name].weight_matrix(form))
        elif array.dtype == np.float32 and tensor.name != "time.frequencies":
            array = array.astype(np.float16).astype(np.float32)
        tensor.CopyFrom(onnx.numpy_helper.from_array(np.asarray(array), tensor.name))
    if SCHEMES[scheme].activation:
        scale = float(np.float16(0.03))
        quantized = {
            t
            for layer in graph.layers
            if SCHEMES[schemes[layer.name]].activation
            for t in layer.inputs
        }
        reference = fake_quantize_in_float(reference, graph, schemes, quantized, scale)
    expected = run(reference.SerializeToString(), feeds())
    found = run(tmp_path / "out" / SIMULATED, feeds())
    # A value on a rounding boundary may fall to either side: a few steps of one activation, no more.
    assert np.sum((found - expected) ** 2) <= 1e-4 * np.sum(expected**2)
    if not SCHEMES[scheme].activation:
        np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())


def fake_quantize_in_float(
    reference: onnx.ModelProto,
    graph: LayerGraph,
    schemes: dict[str, str],
    tensors: set[str],
    scale: float,
) -> onnx.ModelProto:
    """Insert Div, Round, Clip, Mul for each tensor, for the readers that are INT8."""
    constants = {"fq.scale": scale, "fq.low": -128.0, "fq.high": 127.0}
    for name, value in constants.items():
        reference.graph.initializer.append(
            onnx.numpy_helper.from_array(np.asarray(value, np.float32), name)
        )
    readers = {
        use.node
        for layer in graph.layers
        if SCHEMES[schemes[layer.name]].activation
        for use in layer.uses
    }
    nodes = []
    done: set[str] = set()
    for node in reference.graph.node:
        if node.name in readers and node.input[0] in tensors:
            x = node.input[0]
            if x not in done:
                chain = [
                    ("Div", "fq.scale"),
                    ("Round", None),
                    ("Clip", "fq.low"),
                    ("Mul", "fq.scale"),
                ]
                current = x
                for op, constant in chain:
                    inputs = [
                        current,
                        *([constant] if constant else []),
                        *(["fq.high"] if op == "Clip" else []),
                    ]
                    nodes.append(
                        onnx.helper.make_node(op, inputs, [f"{x}/fq/{op}"], name=f"{x}/fq_{op}")
                    )
                    current = f"{x}/fq/{op}"
                done.add(x)
            node.input[0] = f"{x}/fq/Mul"
        nodes.append(node)
    del reference.graph.node[:]
    reference.graph.node.extend(nodes)
    return reference


@pytest.mark.skipif(
    tuple(map(int, ort.__version__.split(".")[:2])) < (1, 30),
    reason="ONNX Runtime before 1.30 computes FP16 less exactly on a CPU: 0.27 % here",
)
def test_the_fp16_graph_computes_like_its_fp32_twin(model: Path, tmp_path: Path) -> None:
    graph = layer_graph(ir.load(model))
    write(model, graph, mixed(graph, 3), tmp_path / "out")
    twin = run(tmp_path / "out" / SIMULATED, feeds())
    half = run(
        tmp_path / "out" / DEPLOYED, {**feeds(dtype=np.float16), "timestep": feeds()["timestep"]}
    )
    assert half.dtype == np.float16
    assert np.sum((half.astype(np.float64) - twin) ** 2) <= 2e-3 * np.sum(
        twin.astype(np.float64) ** 2
    )


def test_the_timestep_stays_in_fp32_up_to_the_first_layer(model: Path) -> None:
    loaded = ir.load(model)
    region = fp16_region(loaded, "timestep", "sample")
    Fp16ArithmeticPass(region)(loaded)
    types = {node.name: node.outputs[0].dtype for node in loaded.graph}
    assert {types[f"time/{name}"] for name in ("unsqueeze", "angle", "sin", "cos", "concat")} == {
        ir.DataType.FLOAT
    }
    assert types["time.linear_1"] == ir.DataType.FLOAT16
    assert loaded.graph.initializers["time.frequencies"].dtype == ir.DataType.FLOAT
    assert (
        loaded.graph.initializers["scales"].dtype == ir.DataType.FLOAT
    )  # Resize takes its scales in FP32


@pytest.mark.parametrize("run_pass", [Fp16ArithmeticPass, Fp16StoragePass])
def test_a_second_run_of_a_pass_changes_nothing(model: Path, run_pass) -> None:  # type: ignore[no-untyped-def]
    loaded = ir.load(model)
    region = fp16_region(loaded, "timestep", "sample")
    first = run_pass(region)(loaded).modified
    nodes = [node.name for node in loaded.graph]
    second = run_pass(region)(loaded).modified
    assert first and not second
    assert nodes == [node.name for node in loaded.graph]


def test_int8_readers_of_one_tensor_share_its_quantizer_and_fp16_readers_bypass_it(
    model: Path,
) -> None:
    loaded = ir.load(model)
    graph = layer_graph(loaded)
    schemes = {**all_of(graph, "fp16"), "attn.to_q": "w8a8", "attn.to_k": "w4a8-b64"}
    candidates = candidates_for(graph)
    rewrites = [
        LayerRewrite(
            layer,
            SCHEMES[schemes[layer.name]],
            candidates[layer.name].forms.get(SCHEMES[schemes[layer.name]].weight_form),
        )
        for layer in graph.layers
    ]
    quantize_layers(loaded, rewrites, dict.fromkeys(graph.activations, 0.03))
    nodes = {node.name: node for node in loaded.graph}
    q, k, v = (nodes[f"attn.to_{n}"] for n in "qkv")
    assert q.inputs[0] is k.inputs[0]
    assert q.inputs[0].producer().op_type == "DequantizeLinear"
    assert v.inputs[0].producer().name == "attn/tokens"
    scales = [name for name in loaded.graph.initializers if name.endswith("_out//scale")]
    assert [tuple(loaded.graph.initializers[name].shape) for name in scales] == [()]


def test_a_weight_shared_by_two_layers_is_stored_once_and_copied_per_use(tmp_path: Path) -> None:
    g = GraphBuilder()
    g.input("sample", ["N", 3, 8, 8])
    g.input("timestep", ["N"])
    x = g.conv("sample", "conv_in", 64, 3)
    x = g.op("Relu", [g.conv(x, "tied", 64, 64)], "relu")
    g.nodes.append(
        onnx.helper.make_node("Conv", [x, "tied.weight"], ["half"], name="tied_again", pads=[1] * 4)
    )
    column = g.op("Unsqueeze", ["timestep", g.weight("ax", np.array([1, 2, 3], np.int64))], "t4")
    g.nodes[-1].name = "time/unsqueeze"
    g.nodes.append(onnx.helper.make_node("Add", ["half", column], ["out_sample"], name="sum"))
    g.output("out_sample", ["N", 64, 8, 8])
    path = g.save(tmp_path / "model.onnx")
    graph = layer_graph(ir.load(path))
    tied = next(layer for layer in graph.layers if layer.name == "tied")
    assert [use.node for use in tied.uses] == ["tied", "tied_again"]
    written, expected = write(
        path, graph, {"conv_in": "fp16", "tied": "w4a16-b64"}, tmp_path / "out"
    )
    assert written == expected
    names = [
        t.name
        for t in onnx.load(tmp_path / "out" / DEPLOYED, load_external_data=False).graph.initializer
    ]
    assert {"tied.weight//codes", "tied.weight//codes//use1"} <= set(names)
    plain = run(path, feeds())
    assert np.sum((run(tmp_path / "out" / SIMULATED, feeds()) - plain) ** 2) < 0.02 * np.sum(
        plain**2
    )


def test_what_is_no_layer_says_why(tmp_path: Path) -> None:
    g = GraphBuilder()
    g.input("sample", ["N", 8, 8, 8])
    up = g.op("ConvTranspose", ["sample", g.random("up.weight", 8, 6, 2, 2)], "up", strides=[2, 2])
    left = g.op("MatMul", [g.random("left.weight", 16, 16), up], "left")
    batch = g.op("MatMul", [left, g.random("batch.weight", 6, 16, 16)], "batch")
    g.nodes.append(onnx.helper.make_node("Relu", [batch], ["out_sample"], name="relu"))
    g.output("out_sample", ["N", 6, 16, 16])
    graph = layer_graph(ir.load(g.save(tmp_path / "model.onnx")))
    assert not graph.layers
    reasons = {other.name: other.reason for other in graph.others}
    assert "ConvTranspose" in reasons["up.weight"]
    assert "left operand" in reasons["left.weight"]
    assert "batch of matrices" in reasons["batch.weight"]


@pytest.mark.parametrize(
    ("reduction", "nominal", "expected"),
    [
        (64, 32, 32),
        (100, 64, 50),
        (27, 32, 27),
        (16, 128, 16),
        (67, 32, None),
        (288, 64, 72),
        (320, 128, 160),
    ],
)
def test_a_block_divides_the_reduction_or_there_is_none(
    reduction: int, nominal: int, expected: int | None
) -> None:
    layer = Layer("l", "MatMul", "layer.weight", (reduction, 8), 1, 1, ())
    assert Int4Weight(nominal).block(layer) == expected


def test_masks_survive_fp16_and_infinities_stay(tmp_path: Path) -> None:
    g = GraphBuilder()
    g.input("sample", ["N", 3, 8, 8])
    g.input("timestep", ["N"])
    mask = g.weight("mask", np.array([-3.4e38, -np.inf, 1.0, 2.0, 0, 0, 0, 0], np.float32))
    g.nodes.append(onnx.helper.make_node("Add", ["sample", mask], ["out_sample"], name="add"))
    g.output("out_sample", ["N", 3, 8, 8])
    loaded = ir.load(g.save(tmp_path / "model.onnx"))
    Fp16ArithmeticPass(fp16_region(loaded, "timestep", "sample"))(loaded)
    half = loaded.graph.initializers["mask"].const_value.numpy()
    assert half[0] == -65504 and np.isneginf(half[1])
