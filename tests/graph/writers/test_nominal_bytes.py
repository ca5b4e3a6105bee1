"""Simulated schemes in the graph: ONNX Runtime computes what NumPy says, and nominal bytes are those of the codes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from mpq_deploy.errors import MpqError
from mpq_deploy.formats.candidates import (
    Choices,
    LayerCandidates,
    fold_matrix,
    round_candidates,
    weight_matrix,
)
from mpq_deploy.formats.interfaces import ActivationGrid
from mpq_deploy.formats.layer_rounding import InputMoments
from mpq_deploy.formats.scheme import SCHEMES, Scheme
from mpq_deploy.formats.sizes import ACTIVATION_SCALE_BYTES, FP16_BYTES
from mpq_deploy.graph.layers import Layer, LayerGraph, layer_graph
from mpq_deploy.graph.save import constant_bytes
from mpq_deploy.graph.writers.deployed_graphs import (
    DEPLOYED,
    SIMULATED,
    FloatGraph,
    fp16_bytes,
    write_quantized,
)
from mpq_deploy.graph.writers.nominal_bytes import WEIGHTS_KEY, nominal_bytes
from mpq_deploy.graph.writers.quantize_layers import LayerRewrite, weight_array
from mpq_deploy.rounding.quantizers import Rounding
from mpq_deploy.runtime.ort import session_options
from tests.graphs import denoiser_graph

BODIES = ("w2a4-sim", "w3a6-sim", "w4a16-sim", "w5a8-sim", "w8a3-sim")
SHARED = ("w2a4-sim+omq", "w3a6-sim+zres", "w2a16-sim+zres", "w4a16-sim+omq")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return denoiser_graph(channels=16, size=8).save(tmp_path_factory.mktemp("model") / "model.onnx")


def candidates_for(graph: LayerGraph, scheme: Scheme) -> dict[str, LayerCandidates]:
    found = {}
    for number, layer in enumerate(graph.layers):
        taken = scheme.body if layer.group > 1 else scheme
        rng = np.random.default_rng(number)
        x = rng.standard_normal((layer.group, 100, layer.reduction)).astype(np.float32)
        found[layer.name] = round_candidates(
            layer,
            Choices((taken,), {}),
            weight_matrix(layer, weight_array(graph.model, layer)),
            InputMoments(
                np.einsum("gnk,gnj->gkj", x, x) / 100,
                (layer.reduction,),
                amax=np.ones(layer.reduction) if layer.group == 1 else None,
            ),
            Rounding(gptq=True, damping=0.05, refinements=1),
        )
    return found


def grid_of(scheme: Scheme) -> ActivationGrid:
    levels = 2 ** scheme.bits[1] - 1
    below = levels // 3
    return ActivationGrid(float(np.float16(3.0 / levels)), -below, levels - below)


def write(
    path: Path, name: str, folder: Path
) -> tuple[LayerGraph, dict[str, LayerCandidates], int]:
    graph = layer_graph(ir.load(path))
    candidates = candidates_for(graph, SCHEMES[name])
    rewrites = []
    for layer in graph.layers:
        scheme = candidates[layer.name].schemes[0]
        rewrites.append(
            LayerRewrite(layer, scheme, candidates[layer.name].forms[scheme.weight_form])
        )
    form = SCHEMES[name].activation_form
    scales = {tensor + form: grid_of(SCHEMES[name]) for tensor in graph.activations} if form else {}
    folder.mkdir()
    return (
        graph,
        candidates,
        write_quantized(FloatGraph(path, "timestep", "sample"), rewrites, scales, folder),
    )


def feeds() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "sample": rng.standard_normal((2, 3, 8, 8)).astype(np.float32),
        "timestep": np.array([1, 900], np.float32),
    }


def run(model: Path | bytes) -> np.ndarray:
    source = model if isinstance(model, bytes) else str(model)
    return ort.InferenceSession(source, session_options(1, fake_quant_only=True)).run(
        None, feeds()
    )[0]


def faked(
    path: Path, graph: LayerGraph, candidates: dict[str, LayerCandidates], scheme: Scheme
) -> bytes:
    """The float graph with dequantized weights, and Div, Round, Clip, Mul before every layer."""
    reference = onnx.load(path)
    layers = {layer.weight: layer for layer in graph.layers}
    for tensor in reference.graph.initializer:
        array = onnx.numpy_helper.to_array(tensor)
        if tensor.name in layers:
            candidate = candidates[layers[tensor.name].name]
            array = fold_matrix(
                candidate.layer, candidate.weight_matrix(candidate.schemes[0].weight_form)
            )
        elif array.dtype == np.float32 and tensor.name != "time.frequencies":
            array = array.astype(np.float16).astype(np.float32)
        tensor.CopyFrom(onnx.numpy_helper.from_array(np.asarray(array), tensor.name))
    if scheme.activation is None:
        return reference.SerializeToString()
    grid = grid_of(scheme)
    for name, value in (("scale", grid.scale), ("low", grid.quant_min), ("high", grid.quant_max)):
        reference.graph.initializer.append(
            onnx.numpy_helper.from_array(np.asarray(value, np.float32), f"fq.{name}")
        )
    readers = {use.node for layer in graph.layers for use in layer.uses}
    nodes = []
    for node in reference.graph.node:
        if node.name in readers:
            current = node.input[0]
            for op, more in (
                ("Div", ["fq.scale"]),
                ("Round", []),
                ("Clip", ["fq.low", "fq.high"]),
                ("Mul", ["fq.scale"]),
            ):
                made = f"{node.name}/fq/{op}"
                nodes.append(onnx.helper.make_node(op, [current, *more], [made], name=made))
                current = made
            node.input[0] = current
        nodes.append(node)
    del reference.graph.node[:]
    reference.graph.node.extend(nodes)
    return reference.SerializeToString()


@pytest.mark.parametrize("name", [*BODIES, *SHARED])
def test_onnxruntime_computes_what_numpy_says(model: Path, tmp_path: Path, name: str) -> None:
    graph, candidates, _ = write(model, name, tmp_path / "out")
    found, expected = (
        run(tmp_path / "out" / SIMULATED),
        run(faked(model, graph, candidates, SCHEMES[name])),
    )
    # A value on a rounding boundary may fall to either side.
    assert np.sum((found - expected) ** 2) <= 1e-3 * np.sum(expected**2)
    if SCHEMES[name].activation is None:
        np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", [*BODIES, *SHARED])
def test_bytes_are_nominal_and_exact(model: Path, tmp_path: Path, name: str) -> None:
    graph, candidates, written = write(model, name, tmp_path / "out")
    fixed = fp16_bytes(ir.load(model), "timestep", "sample") - FP16_BYTES * sum(
        n.weights for n in graph.layers
    )
    weights = sum(candidates[layer.name].schemes[0].weight_bytes(layer) for layer in graph.layers)
    inputs = (
        {tensor for layer in graph.layers for tensor in layer.inputs}
        if SCHEMES[name].activation
        else set()
    )
    assert written == fixed + weights + ACTIVATION_SCALE_BYTES * len(inputs)
    bits = sum(SCHEMES[name].bits[0] * layer.weights for layer in graph.layers)
    overhead = sum(11 * layer.out_channels + 2 for layer in graph.layers)
    assert bits / 8 <= weights <= bits / 8 + overhead
    # The file itself holds a byte for every code, and more.
    assert constant_bytes(tmp_path / "out" / DEPLOYED) > written


@pytest.mark.parametrize("name", ["w2a4-sim", "w3a6-sim+zres", "w2a4-sim+omq"])
def test_codes_in_the_file_lie_within_their_bits(model: Path, tmp_path: Path, name: str) -> None:
    graph, _, _ = write(model, name, tmp_path / "out")
    loaded = onnx.load(tmp_path / "out" / DEPLOYED)
    arrays = {
        tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in loaded.graph.initializer
    }
    most = SCHEMES[name].bits[0] + (1 if SCHEMES[name].branch else 0)
    for layer in graph.layers:
        assert arrays[f"{layer.weight}//codes"].max() < 2**most
    assert not any(tensor.data_type == onnx.TensorProto.INT4 for tensor in loaded.graph.initializer)
    if SCHEMES[name].bits[1] < 8:
        clips = [node for node in loaded.graph.node if node.name.endswith("/clip")]
        assert clips and all(node.op_type == "Clip" for node in clips)


def broken(folder: Path, change: str, layer: Layer) -> None:
    model = ir.load(folder / DEPLOYED)
    initializers = model.graph.initializers
    if change == "code":
        value = initializers[f"{layer.weight}//codes"]
        array = value.const_value.numpy().copy()
        array.flat[5] = 200
        value.const_value = ir.Tensor(array)
    elif change == "sign":
        value = initializers[f"{layer.weight}//signs0"]
        array = value.const_value.numpy().copy()
        array.flat[np.flatnonzero(array)[0]] = 0
        value.const_value = ir.Tensor(array)
    else:
        model.metadata_props[WEIGHTS_KEY] = model.metadata_props[WEIGHTS_KEY].replace(
            change, change[:-1] + "4", 1
        )
    ir.save(model, folder / DEPLOYED)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("code", "code 200 in a channel of"),
        ("sign", "not -1 and 1"),
        ('"grid_bits": [3', "bits in"),
    ],
)
def test_a_file_that_breaks_its_bits_is_found(
    model: Path, tmp_path: Path, change: str, says: str
) -> None:
    name = "w3a6-sim+zres" if change == "sign" else "w3a6-sim"
    graph, _, _ = write(model, name, tmp_path / "out")
    layer = next(
        n
        for n in graph.layers
        if change != "sign"
        or f"{n.weight}//signs0" in ir.load(tmp_path / "out" / DEPLOYED).graph.initializers
    )
    broken(tmp_path / "out", change, layer)
    with pytest.raises(MpqError, match=says):
        nominal_bytes(tmp_path / "out" / DEPLOYED, graph.layers)
