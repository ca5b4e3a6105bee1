"""Ranges that follow the timestep or the values, as they are written: what runs, in how many bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto

from mpq_deploy.allocate.problem import LayerChoice, Problem
from mpq_deploy.check.check import check_model
from mpq_deploy.engine.builder import BatchProfile, BuildRequest, build_engine
from mpq_deploy.engine.expected import ExpectedLayers
from mpq_deploy.engine.target import load_target
from mpq_deploy.errors import ModelError
from mpq_deploy.formats.candidates import fold_matrix, weight_matrix
from mpq_deploy.formats.interfaces import ActivationGrid
from mpq_deploy.formats.ranges import RangeTable
from mpq_deploy.formats.scheme import SCHEMES
from mpq_deploy.formats.sizes import FP16_BYTES
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
from mpq_deploy.rounding.quantizers import QuantizedMatrix
from mpq_deploy.runtime.ort import make_session
from mpq_deploy.system.progress import Talk
from tests.graphs import GraphBuilder

KINDS = ("w8a8-timestep", "w8a8-dynamic")
SCALE = float(np.float16(4 / 127))
KNOTS, RATIOS = np.array([0.0, 100.0, 400.0, 999.0]), np.array([0.125, 0.25, 1.0, 0.5])
TIMESTEPS = {
    "float [N]": (TensorProto.FLOAT, ["N"], np.float32),
    "float": (TensorProto.FLOAT, [], np.float32),
    "integer [N]": (TensorProto.INT64, ["N"], np.int64),
    "integer": (TensorProto.INT64, [], np.int64),
}


def one_layer(
    op: str, dtype: int = TensorProto.FLOAT, shape: list[str] | None = None
) -> GraphBuilder:
    """A layer behind a Tanh, and a use of the timestep that does not change the output."""
    g = GraphBuilder()
    g.input("sample", ["N", 16, 6, 6] if op == "Conv" else ["N", 10, 16])
    g.input("timestep", ["N"] if shape is None else shape, dtype)
    as_float = g.op("Cast", ["timestep"], "as_float", to=TensorProto.FLOAT)
    nothing = g.op(
        "ReduceSum", [g.op("Mul", [as_float, g.weight("zero", np.float32(0))], "none")], "sum"
    )
    x = g.op(
        "Add", [g.op("Mul", ["sample", g.weight("three", np.float32(3))], "scaled"), nothing], "x"
    )
    if op == "Conv":
        g.output(g.conv(x, "layer", 24, 16), ["N", 24, 6, 6])
    elif op == "Gemm":
        x = g.op("Reshape", [x, g.weight("rows", [-1, 16])], "flat")
        g.output(g.gemm(x, "layer", 24, 16), ["M", 24])
    else:
        g.output(g.matmul(x, "layer", 24, 16), ["N", 10, 24])
    return g


def rounded_weight(layer: Layer, model: ir.Model) -> tuple[QuantizedMatrix, np.ndarray]:
    """INT8 per channel by plain arithmetic, and the float weight that it stands for."""
    weight = weight_matrix(layer, weight_array(model, layer))
    scale = (np.abs(weight).max(axis=1, keepdims=True) / 127).astype(np.float16)
    codes = np.clip(np.rint(weight / scale.astype(np.float32)), -127, 127).astype(np.int8)
    return QuantizedMatrix(codes, scale), codes * scale.astype(np.float32)


def write(path: Path, scheme: str, folder: Path, timestep: str = "timestep") -> int:
    graph = layer_graph(ir.load(path))
    grid = ActivationGrid(SCALE, table=RangeTable.of(KNOTS, RATIOS))
    kind, scales, rewrites = SCHEMES[scheme], {}, []
    for layer in graph.layers:
        rewrites.append(LayerRewrite(layer, kind, rounded_weight(layer, graph.model)[0]))
        scales.update(dict.fromkeys((t + kind.activation_form for t in layer.inputs), grid))
    folder.mkdir()
    return write_quantized(FloatGraph(path, timestep, "sample"), rewrites, scales, folder)


def expected_output(path: Path, kind: str, sample: np.ndarray, timestep: float) -> np.ndarray:
    """The float layer's node on the rounded input, by ONNX Runtime; the rounding by NumPy."""
    graph = layer_graph(ir.load(path))
    (layer,) = graph.layers
    x = 3 * sample
    if kind == "w8a8-timestep":
        step = SCALE * np.interp(timestep, KNOTS, RATIOS)
    else:
        axes = (1, 2, 3) if layer.op == "Conv" else (-1,)
        step = np.maximum(np.abs(x).max(axis=axes, keepdims=True) / 127, SCALE / 128)
    rounded = np.clip(np.rint(x / step), -128, 127) * step
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        array = onnx.numpy_helper.to_array(tensor)
        if tensor.name == layer.weight:
            array = fold_matrix(layer, rounded_weight(layer, graph.model)[1])
        elif tensor.name.endswith("bias"):
            array = array.astype(np.float16).astype(np.float32)
        tensor.CopyFrom(onnx.numpy_helper.from_array(np.asarray(array), tensor.name))
    feeds = {"sample": (rounded / 3).astype(np.float32), "timestep": fed(model, timestep, len(x))}
    return np.asarray(make_session(model.SerializeToString(), 1).run(None, feeds)[0])


def fed(model: onnx.ModelProto, timestep: float, count: int) -> np.ndarray:
    declared = next(
        value.type.tensor_type for value in model.graph.input if value.name == "timestep"
    )
    dtype = np.float32 if declared.elem_type == TensorProto.FLOAT else np.int64
    return np.full(count if len(declared.shape.dim) else (), timestep, dtype)


def close(found: np.ndarray, expected: np.ndarray) -> bool:
    """But for values on a rounding boundary, and what FP16 makes of ratios."""
    return float(np.sum((found - expected) ** 2)) <= 1e-5 * float(np.sum(expected**2))


@pytest.mark.parametrize("op", ["Conv", "Gemm", "MatMul"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_runs_is_the_layer_on_an_input_rounded_in_its_range(
    tmp_path: Path, op: str, kind: str
) -> None:
    path = one_layer(op).save(tmp_path / "model.onnx")
    written = write(path, kind, tmp_path / "out")
    onnx.checker.check_model(str(tmp_path / "out" / SIMULATED), full_check=True)
    session = make_session(tmp_path / "out" / SIMULATED, 1, fake_quant_only=True)
    rng = np.random.default_rng(0)
    sample = rng.standard_normal((3, 16, 6, 6) if op == "Conv" else (3, 10, 16)).astype(np.float32)
    # Samples that differ in size: one range for each of them must not be one for all.
    sample *= np.array([0.05, 0.3, 1.0], np.float32).reshape(-1, *(1,) * (sample.ndim - 1))
    for timestep in (0.0, 37.0, 250.0, 400.0, 700.0, 999.0, 1200.0):
        feeds = {"sample": sample, "timestep": np.full(3, timestep, np.float32)}
        found = np.asarray(session.run(None, feeds)[0])
        assert close(found, expected_output(path, kind, sample, timestep)), timestep
    assert written == planned_bytes(path, kind) == constant_bytes(tmp_path / "out" / DEPLOYED)


@pytest.mark.parametrize("kind", KINDS)
def test_the_nodes_of_a_layer_on_a_graph_input_are_in_order(tmp_path: Path, kind: str) -> None:
    g = GraphBuilder()
    g.input("sample", ["N", 16, 6, 6])
    g.input("timestep", ["N"])
    g.output(g.conv("sample", "layer", 24, 16), ["N", 24, 6, 6])
    write(g.save(tmp_path / "model.onnx"), kind, tmp_path / "out")
    for file in (DEPLOYED, SIMULATED):
        onnx.checker.check_model(str(tmp_path / "out" / file), full_check=True)


@pytest.mark.parametrize("form", TIMESTEPS)
def test_the_timestep_may_be_a_number_or_one_for_each_sample(tmp_path: Path, form: str) -> None:
    dtype, shape, numpy_type = TIMESTEPS[form]
    path = one_layer("Conv", dtype, shape).save(tmp_path / "model.onnx")
    write(path, "w8a8-timestep", tmp_path / "out")
    sample = np.random.default_rng(1).standard_normal((2, 16, 6, 6)).astype(np.float32)
    for timestep in (3, 333, 950):
        given = np.full(2 if shape else (), timestep, numpy_type)
        session = make_session(tmp_path / "out" / SIMULATED, 1, fake_quant_only=True)
        found = np.asarray(session.run(None, {"sample": sample, "timestep": given})[0])
        assert close(found, expected_output(path, "w8a8-timestep", sample, timestep))
    half = onnx.load(tmp_path / "out" / DEPLOYED)
    assert (
        next(v for v in half.graph.input if v.name == "timestep").type.tensor_type.elem_type
        == dtype
    )


def test_no_timestep_input_is_said_in_a_line(tmp_path: Path) -> None:
    path = one_layer("Conv").save(tmp_path / "model.onnx")
    with pytest.raises(
        ModelError, match="'layer' has a range per timestep, but the graph has no timestep"
    ):
        write(path, "w8a8-timestep", tmp_path / "out", timestep="")


def test_all_layers_share_the_ramps_and_readers_of_a_tensor_its_quantizer(tmp_path: Path) -> None:
    path = two_layers().save(tmp_path / "model.onnx")
    written = write(path, "w8a8-timestep", tmp_path / "out")
    nodes = [node.op_type for node in onnx.load(tmp_path / "out" / DEPLOYED).graph.node]
    assert (
        nodes.count("Clip") == 1 and nodes.count("ReduceSum") == nodes.count("QuantizeLinear") == 2
    )
    assert written == planned_bytes(path, "w8a8-timestep")


def two_layers() -> GraphBuilder:
    """Two convolutions that read one tensor, and one that reads what they give."""
    g = GraphBuilder()
    g.input("sample", ["N", 16, 8, 8])
    g.input("timestep", ["N"])
    x = g.op("Sigmoid", ["sample"], "act")
    x = g.op("Add", [g.conv(x, "one", 16, 16), g.conv(x, "two", 16, 16, kernel=1)], "join")
    g.output(g.conv(g.op("Sigmoid", [x], "act2"), "three", 16, 16), ["N", 16, 8, 8])
    return g


@pytest.mark.rtx
@pytest.mark.parametrize("kind", KINDS)
def test_the_engine_computes_it_in_int8(tmp_path: Path, kind: str) -> None:
    pytest.importorskip("tensorrt_rtx")
    path = two_layers().save(tmp_path / "model.onnx")
    written = write(path, kind, tmp_path / "out")
    found = check_model(tmp_path / "out" / DEPLOYED, load_target("rtx")).findings
    assert {finding.effect for finding in found} <= {"note"}
    graph = layer_graph(ir.load(path))
    schemes = {layer.name: SCHEMES[kind] for layer in graph.layers}
    inputs = {"sample": (16, 8, 8), "timestep": ()}
    record = build_engine(
        BuildRequest(
            tmp_path / "out" / DEPLOYED,
            load_target("rtx").build_target,
            BatchProfile(1, 2, 4, inputs),
        ),
        tmp_path / "engine",
        ExpectedLayers.of(graph.layers, schemes, written),
        Talk(),
    )
    record.require_verified()


def planned_bytes(path: Path, scheme: str) -> int:
    graph, kind = layer_graph(ir.load(path)), SCHEMES[scheme]
    choices = [
        LayerChoice(
            n.name, n.inputs, {scheme: kind.weight_bytes(n)}, {}, {scheme: kind.input_bytes(n)}
        )
        for n in graph.layers
    ]
    fixed = fp16_bytes(ir.load(path), "timestep", "sample")
    fixed -= FP16_BYTES * sum(n.weights for n in graph.layers)
    return Problem(choices, fixed, 0).plan_bytes({n.name: scheme for n in graph.layers})
