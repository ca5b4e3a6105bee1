"""Shifted channels of INT8 inputs: the written graph is the layer on what NumPy rounds, borders included."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from mpq_deploy.check.check import check_model
from mpq_deploy.engine.build_target import BuildTarget
from mpq_deploy.engine.builder import BatchProfile, BuildRequest, build_engine
from mpq_deploy.engine.expected import ExpectedLayers
from mpq_deploy.engine.record import EngineRecord
from mpq_deploy.engine.target import load_target
from mpq_deploy.errors import EngineError
from mpq_deploy.formats.branches.prescaled import ScaledMatrix
from mpq_deploy.formats.candidates import fold_matrix, weight_matrix
from mpq_deploy.formats.interfaces import ActivationGrid
from mpq_deploy.formats.ranges import RangeTable
from mpq_deploy.formats.scheme import SCHEMES
from mpq_deploy.formats.shifts import SHIFT_FORMS
from mpq_deploy.formats.sizes import FP16_BYTES
from mpq_deploy.graph.dialects import dialect_named
from mpq_deploy.graph.layers import Layer, layer_graph
from mpq_deploy.graph.save import constant_bytes
from mpq_deploy.graph.writers.deployed_graphs import (
    DEPLOYED,
    SIMULATED,
    FloatGraph,
    fp16_bytes,
    write_quantized,
)
from mpq_deploy.graph.writers.quantize_layers import LayerRewrite, weight_array
from mpq_deploy.recover.torch_quantizers import ActivationScale
from mpq_deploy.rounding.quantizers import QuantizedMatrix
from mpq_deploy.runtime.ort import make_session
from mpq_deploy.sensitivity.layer_numpy import fake_quantize
from mpq_deploy.sensitivity.layer_weights import InputRounding
from mpq_deploy.sensitivity.torch_projection import lost_by_rounding
from mpq_deploy.system.progress import Talk
from tests.graphs import GraphBuilder

CHANNELS, OUT = 16, 24
KNOTS, RATIOS = np.array([0.0, 400.0, 999.0]), np.array([0.125, 1.0, 0.5])
# Kernel, and what else a Conv may say.
CONVS = {
    "plain": ((3, 3), {"pads": [1, 1, 1, 1]}),
    "1x1": ((1, 1), {}),
    "strides": ((3, 3), {"pads": [1, 1, 1, 1], "strides": [2, 2]}),
    "dilation": ((3, 3), {"pads": [2, 2, 2, 2], "dilations": [2, 2]}),
    "asymmetric": ((3, 2), {"pads": [0, 1, 2, 0]}),
    "1-D": ((3,), {"pads": [1, 1]}),
    "3-D": ((1, 3, 3), {"pads": [0, 1, 1, 0, 1, 1]}),
}
SCHEME_NAMES = (
    "w8a8+scale5",
    "w8a8-timestep",
    "w8a8-timestep+scale5",
    "w8a8-dynamic",
    "w8a8-dynamic+scale5",
)
FACTORS = np.exp2(np.linspace(-1, 1, CHANNELS)).astype(np.float16)
RNG = np.random.default_rng(3)
ZEROS = RNG.integers(-40, 60, CHANNELS)


def network(how: str, bias: bool) -> GraphBuilder:
    """A Conv behind an Add, and a use of the timestep that changes nothing."""
    kernel, attributes = CONVS[how]
    g = GraphBuilder()
    g.input("sample", ["N", CHANNELS, *(7 for _ in kernel)])
    g.input("timestep", ["N"])
    nothing = g.op(
        "ReduceSum", [g.op("Mul", ["timestep", g.weight("zero", np.float32(0))], "none")], "sum"
    )
    inputs = [g.op("Add", ["sample", nothing], "x"), g.random("w", OUT, CHANNELS, *kernel)]
    inputs += [g.random("b", OUT)] if bias else []
    g.nodes.append(onnx.helper.make_node("Conv", inputs, ["y"], name="layer", **attributes))
    g.output("y", ["N", OUT, *(None for _ in kernel)])
    return g


def grid_of(scale: float, zeros: np.ndarray = ZEROS) -> ActivationGrid:
    table = RangeTable.of(KNOTS, RATIOS)
    return ActivationGrid(scale, table=table, zeros=tuple(zeros.tolist()), reach=1.7)


def matrix_of(layer: Layer, model: ir.Model, scheme: str) -> QuantizedMatrix:
    """INT8 per channel, of the weight divided by the factors if any."""
    weight = weight_matrix(layer, weight_array(model, layer))
    if "+scale" in scheme:
        weight = weight / np.repeat(FACTORS.astype(np.float32), layer.taps)
    scale = (np.abs(weight).max(axis=1, keepdims=True) / 127).astype(np.float16)
    codes = np.clip(np.rint(weight / scale.astype(np.float32)), -127, 127).astype(np.int8)
    return QuantizedMatrix(codes, scale)


def write(
    path: Path, scheme: str, grid: ActivationGrid, folder: Path, dialect: str = "trt-rtx"
) -> tuple[int, Layer]:
    graph, kind = layer_graph(ir.load(path)), SCHEMES[scheme]
    (layer,) = graph.layers
    body = matrix_of(layer, graph.model, scheme)
    matrix = ScaledMatrix(body, FACTORS) if kind.branch else body
    folder.mkdir()
    scales = {layer.uses[0].input + kind.activation_form: grid}
    rewrites = [LayerRewrite(layer, kind, matrix)]
    source = FloatGraph(path, "timestep", "sample")
    return write_quantized(source, rewrites, scales, folder, dialect_named(dialect)), layer


def expected(path: Path, scheme: str, grid: ActivationGrid, x: np.ndarray, t: float) -> np.ndarray:
    """The float node on the input that NumPy rounds and the rounded weight, by ONNX Runtime."""
    graph, kind = layer_graph(ir.load(path)), SCHEMES[scheme]
    (layer,) = graph.layers
    shape = (1, -1, *(1,) * (x.ndim - 2))
    factors = FACTORS.astype(np.float64).reshape(shape) if kind.branch else 1.0
    step, seen = grid.scale, x.astype(np.float64) * factors
    if kind.range.kind == "timestep":
        step = step * np.interp(t, KNOTS, RATIOS)
    if kind.range.kind == "dynamic":
        widest = np.abs(seen).max(axis=tuple(range(1, x.ndim)), keepdims=True)
        step = np.maximum(widest / (127 * grid.reach), step / 128)
    zeros = np.array(grid.zeros or (0,)).reshape(shape)
    rounded = (np.clip(np.rint(seen / step - zeros), -128, 127) + zeros) * step / factors
    body = matrix_of(layer, graph.model, scheme).dequantize()
    if kind.branch:
        body = body * np.repeat(FACTORS.astype(np.float32), layer.taps)
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        array = onnx.numpy_helper.to_array(tensor)
        if tensor.name == layer.weight:
            array = fold_matrix(layer, body)
        elif tensor.name == "b":
            array = array.astype(np.float16).astype(np.float32)
        tensor.CopyFrom(onnx.numpy_helper.from_array(np.asarray(array), tensor.name))
    feeds = {"sample": rounded.astype(np.float32), "timestep": np.full(len(x), t, np.float32)}
    return np.asarray(make_session(model.SerializeToString(), 1).run(None, feeds)[0])


def sample_of(how: str, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((3, CHANNELS, *(7 for _ in CONVS[how][0]))).astype(np.float32)
    return x * np.array([0.1, 0.4, 1.0], np.float32).reshape(-1, *(1,) * (x.ndim - 1))


def relative(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.sum((found - wanted) ** 2) / np.sum(wanted**2))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("how", CONVS)
@pytest.mark.parametrize("scheme", SCHEME_NAMES)
def test_what_runs_is_the_layer_on_the_input_rounded_around_its_middle(
    tmp_path: Path, scheme: str, how: str, bias: bool
) -> None:
    path = network(how, bias).save(tmp_path / "model.onnx")
    grid = grid_of(float(np.float16(0.03)))
    written, layer = write(path, scheme, grid, tmp_path / "out")
    onnx.checker.check_model(str(tmp_path / "out" / SIMULATED), full_check=True)
    session = make_session(tmp_path / "out" / SIMULATED, 1, fake_quant_only=True)
    x = sample_of(how)
    for timestep in (0.0, 250.0, 999.0):
        feeds = {"sample": x, "timestep": np.full(3, timestep, np.float32)}
        found = np.asarray(session.run(None, feeds)[0])
        assert (
            relative(found, expected(path, scheme, grid, x, timestep)) < 1e-4
        )  # values on a boundary fall to either side
    # Byte for byte as the formulas say.
    kind = SCHEMES[scheme]
    pads = tuple(CONVS[how][1].get("pads", ()))
    noted = noted_layer(layer, kind.activation_form, pads)
    fixed = fp16_bytes(ir.load(path), "timestep", "sample") - FP16_BYTES * layer.weights
    shared = sum(kind.range.shared_bytes().values())
    planned = fixed + kind.weight_bytes(noted) + kind.input_bytes(noted) + shared
    assert written == planned == constant_bytes(tmp_path / "out" / DEPLOYED)


def noted_layer(layer: Layer, form: str, pads: tuple[int, ...]) -> Layer:
    return replace(layer, shifted=frozenset({form}), pads=pads)


@pytest.mark.parametrize("how", CONVS)
def test_without_rounding_the_form_is_the_float_layer(tmp_path: Path, how: str) -> None:
    """Inputs that are whole codes lose nothing, at borders neither."""
    path = network(how, True).save(tmp_path / "model.onnx")
    grid = grid_of(0.03125)
    write(path, "w8a8-timestep", grid, tmp_path / "out")
    session = make_session(tmp_path / "out" / SIMULATED, 1, fake_quant_only=True)
    x = np.rint(sample_of(how) * 20).clip(-60, 60).astype(np.float32) * np.float32(0.03125)
    feeds = {"sample": x, "timestep": np.full(3, 400, np.float32)}
    plain = ActivationGrid(0.03125, table=grid.table)
    exact = expected(path, "w8a8-timestep", plain, x, 400.0)
    found = np.asarray(session.run(None, feeds)[0])
    # The weight's product with the shift is held in FP16.
    assert np.abs(found - exact).max() <= 2e-3 * np.abs(exact).max()


@pytest.mark.torch
@pytest.mark.parametrize("scheme", ["w8a8+scale5", "w8a8-dynamic", "w8a8-dynamic+scale5"])
def test_probes_and_recovery_round_as_numpy_does(tmp_path: Path, scheme: str) -> None:
    kind, x = SCHEMES[scheme], sample_of("plain")
    path = network("plain", True).save(tmp_path / "model.onnx")
    (layer,) = layer_graph(ir.load(path)).layers
    factors = FACTORS if kind.branch else None
    grid, kept = grid_of(0.03125), np.empty(0, np.int32)
    rounding = InputRounding(grid, kept, factors, kind.range)
    by_numpy = fake_quantize(x, rounding, layer)
    by_torch = torch.from_numpy(x)
    by_torch = by_torch - lost_by_rounding(by_torch, rounding, layer)
    assert relative(by_torch.numpy(), by_numpy) < 1e-5
    wide = FACTORS.astype(np.float32).reshape(1, -1, 1, 1) if kind.branch else np.float32(1)
    learned = ActivationScale(grid, kept, kind.range).quantize(torch.from_numpy(x * wide), 1)
    assert relative(learned.detach().numpy() / wide, by_numpy) < 1e-5


@pytest.mark.rtx
@pytest.mark.parametrize("how", ["plain", "1x1", "strides", "1-D"])
@pytest.mark.parametrize("scheme", ["w8a8+scale5", "w8a8-timestep+scale5", "w8a8-dynamic+scale5"])
def test_the_engine_computes_it_in_int8(tmp_path: Path, scheme: str, how: str) -> None:
    pytest.importorskip("tensorrt_rtx")
    built(tmp_path, scheme, how, load_target("rtx").build_target).require_verified()
    found = check_model(tmp_path / "out" / DEPLOYED, load_target("rtx")).findings
    assert {finding.effect for finding in found} <= {"note"}


def built(
    folder: Path, scheme: str, how: str, target: BuildTarget, dialect: str = "trt-rtx"
) -> EngineRecord:
    """Build a shifted convolution; its graph is in ``folder / "out"``."""
    path = network(how, True).save(folder / "model.onnx")
    written, layer = write(path, scheme, grid_of(0.03), folder / "out", dialect)
    inputs = {"sample": (CHANNELS, *(7 for _ in CONVS[how][0])), "timestep": ()}
    expected_of_it = ExpectedLayers.of([layer], {layer.name: SCHEMES[scheme]}, written)
    request = BuildRequest(folder / "out" / DEPLOYED, target, BatchProfile(1, 2, 4, inputs))
    return build_engine(request, folder / "engine", expected_of_it, Talk())


@pytest.mark.rtx
@pytest.mark.parametrize("gpu", ["SM75", "SM80"])
def test_the_jetsons_graph_on_the_oldest_gpus_that_a_builder_here_takes(
    tmp_path: Path, gpu: str
) -> None:
    """An Orin is SM87, for which TensorRT-RTX builds nothing. Turing, before it, has no INT8 convolution at all."""
    pytest.importorskip("tensorrt_rtx")
    target = replace(load_target("rtx").build_target, compute_capabilities=(gpu,))
    record = built(tmp_path, "w8a8-timestep+scale5", "plain", target, "trt-10.3")
    assert record.verified == (gpu == "SM80")
    assert record.kernels.get("correlation Int8", 0) == (gpu == "SM80")
    found = check_model(tmp_path / "out" / DEPLOYED, load_target("jetson-orin-nano")).findings
    assert {finding.effect for finding in found} <= {"note"}
    orin = replace(target, compute_capabilities=("SM87",))
    if gpu == "SM80":
        with pytest.raises(EngineError, match="builds nothing for SM87, only for SM75, SM80"):
            built(tmp_path / "orin", "w8a8-timestep+scale5", "plain", orin, "trt-10.3")


def test_forms_are_those_of_int8_inputs() -> None:
    forms = {s.activation_form for s in SCHEMES.values() if s.series == "w8a8" and s.activation}
    assert set(SHIFT_FORMS) == {f for f in forms if f and (not f.startswith("+") or "scale" in f)}
