"""The check of an engine against its plan, on engines that were really built: true plans pass, false ones do not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mpq_deploy.engine.build_log import EngineLayer, EngineLog, EngineTensor, parse_engine_log
from mpq_deploy.engine.build_worker import BuildJob
from mpq_deploy.engine.builder import WORKER
from mpq_deploy.engine.expected import ExpectedLayer, ExpectedLayers
from mpq_deploy.engine.target import load_target
from mpq_deploy.engine.verify import Problem, verify, weights_allowance
from mpq_deploy.formats.scheme import SCHEMES
from mpq_deploy.system.children import run_child
from tests.engine.plans import FAMILIES, Written, profile, write_plan
from tests.graphs import GraphBuilder


def engine_log(written: Written, folder: Path) -> EngineLog:
    files = {name: str(folder / name) for name in ("engine", "log", "result")}
    sm = load_target("rtx").compute_capabilities
    job = BuildJob(
        "tensorrt_rtx",
        str(written.model),
        **files,
        compute_capabilities=sm,
        shapes=profile().inputs(),
    )
    job.save(folder / "job.json")
    done = run_child(WORKER, str(folder / "job.json"))
    assert done.returncode == 0, (folder / "result").read_text(encoding="utf-8")
    return parse_engine_log((folder / "log").read_text(encoding="utf-8"))


@pytest.fixture(scope="module", params=["mix0", "mix1", *FAMILIES])
def built(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Written, EngineLog]:
    pytest.importorskip("tensorrt_rtx")
    folder = tmp_path_factory.mktemp(request.param)
    shift = int(request.param[3:]) * 2 if request.param.startswith("mix") else 0

    def choose(number: int, layer: object) -> str:
        return (
            FAMILIES[(number + shift) % len(FAMILIES)]
            if request.param.startswith("mix")
            else request.param
        )

    written = write_plan(folder, choose)
    return written, engine_log(written, folder)


@pytest.mark.rtx
def test_an_engine_built_from_its_plan_has_no_problem(built: tuple[Written, EngineLog]) -> None:
    written, log = built
    assert [p for p in verify(log, written.expected) if p.severity == "wrong"] == []


@pytest.mark.rtx
def test_every_false_claim_about_one_layer_is_caught(built: tuple[Written, EngineLog]) -> None:
    written, log = built
    layers = written.expected.layers
    for index, layer in enumerate(layers):
        for name in FAMILIES:
            if SCHEMES[name].family == layer.form.family:
                continue
            claimed = replace(layer, scheme=name)
            false = replace(
                written.expected, layers=(*layers[:index], claimed, *layers[index + 1 :])
            )
            assert any(p.severity == "wrong" for p in verify(log, false)), (
                f"{layer.name}: {layer.scheme} as {name}"
            )


@pytest.mark.rtx
def test_bytes_that_are_not_the_plans_are_caught(built: tuple[Written, EngineLog]) -> None:
    written, log = built
    expected = written.expected
    slack = 0.02 * expected.total_bytes + weights_allowance(expected)
    assert log.weights_bytes is not None
    for total in (log.weights_bytes + 1.1 * slack, log.weights_bytes - 1.1 * slack):
        problems = verify(log, replace(expected, total_bytes=int(total)))
        assert any("bytes of weights" in problem.message for problem in problems)


def silent_fallback(
    folder: Path, *, scale_shape: list[int], resize_between: bool
) -> tuple[ExpectedLayers, EngineLog]:
    """One w8a8 convolution in a form that TensorRT builds without a word, and computes in FP16 (or INT8)."""
    import numpy as np
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    g = GraphBuilder()
    scale = g.weight("x//scale", np.full(scale_shape, 0.05, np.float16))
    q = g.op("QuantizeLinear", ["x", scale], "x/quantize", output_dtype=TensorProto.INT8)
    x = g.op("DequantizeLinear", [q, scale], "x/dequantize")
    if resize_between:
        x = g.op(
            "Resize",
            [x, "", g.weight("two", np.array([1, 1, 2, 2], np.float32))],
            "up",
            mode="nearest",
        )
    codes = g.weight(
        "conv.weight//codes", g.rng.integers(-127, 128, (64, 64, 3, 3)).astype(np.int8)
    )
    scales = g.weight("conv.weight//scale", np.full(64, 0.01, np.float16))
    w = g.op("DequantizeLinear", [codes, scales], "conv/weight_dequantize", axis=0)
    g.op("Conv", [x, w], "conv", pads=[1, 1, 1, 1])
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT16, [2, 64, 8, 8])]
    outputs = [helper.make_tensor_value_info("conv_out", TensorProto.FLOAT16, None)]
    graph = helper.make_graph(g.nodes, "one", inputs, outputs, g.weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, folder / "model.onnx")
    total = sum(numpy_helper.to_array(tensor).nbytes for tensor in g.weights)
    layer = ExpectedLayer("conv", "Conv", ("conv",), "w8a8", 64 * 64 * 9 + 128, 64, 576, (3, 3))
    expected = ExpectedLayers((layer,), total)
    return expected, engine_log(Written(folder / "model.onnx", expected), folder)


@pytest.mark.rtx
@pytest.mark.parametrize(
    ("scale_shape", "resize_between", "falls_back"),
    [([], False, False), ([1], False, True), ([], True, True)],
)
def test_a_silent_fallback_to_fp16_is_caught(
    tmp_path: Path, scale_shape: list[int], resize_between: bool, falls_back: bool
) -> None:
    pytest.importorskip("tensorrt_rtx")
    expected, log = silent_fallback(
        tmp_path, scale_shape=scale_shape, resize_between=resize_between
    )
    problems = verify(log, expected)
    assert bool(problems) == falls_back
    if falls_back:
        assert problems[0].layer == "conv"
        assert "planned w8a8, but it computes in Half" in problems[0].message


def kernel(
    type_: str, inputs: str, constants: tuple[EngineTensor, ...], *nodes: str, out: str = "y"
) -> EngineLayer:
    tensors = tuple(
        EngineTensor(name, (4, 8), dtype) for name, dtype in (p.split(":") for p in inputs.split())
    )
    return EngineLayer(
        "k", type_, tensors, constants, (EngineTensor(out, (4, 8), "Half"),), "", nodes
    )


INT4_WEIGHT = EngineTensor("w", (8, 8), "Int4")
LAYER = ExpectedLayer("fc", "MatMul", ("fc",), "w4a16-b32", 32, 8, 8, (), 2)


def problems_of(*kernels: EngineLayer, layer: ExpectedLayer = LAYER) -> list[Problem]:
    return verify(EngineLog(kernels, 100, 0), ExpectedLayers((layer,), 100))


@pytest.mark.parametrize(
    ("held", "right"), [(1_000_000, True), (600_000, True), (500_000, False), (1_100_000, False)]
)
def test_equal_constants_may_be_stored_once(held: int, right: bool) -> None:
    product = kernel("gemm", "x:Half", (INT4_WEIGHT,), "fc")
    problems = verify(
        EngineLog((product,), held, 0), ExpectedLayers((LAYER,), 1_000_000, repeated_bytes=400_000)
    )
    assert (problems == []) == right
    if not right:
        assert "400,000 of them equal to others" in problems[0].message


def test_a_fusable_int4_weight_that_is_unpacked_as_a_whole_is_called_slow_not_wrong() -> None:
    unpack = kernel("kgen", "", (INT4_WEIGHT,), "fc/weight_dequantize", out="unpacked")
    product = kernel("gemm", "x:Half unpacked:Half", (), "fc")
    assert [p.severity for p in problems_of(unpack, product)] == ["slow"]
    assert problems_of(unpack, product, layer=replace(LAYER, blocks=1)) == []
    fused = kernel("runtime_fusion", "x:Half", (INT4_WEIGHT,), "fc")
    assert problems_of(fused) == []


def test_a_row_that_is_dequantized_for_several_products_is_slow_not_wrong() -> None:
    """As the builder does with the timestep's embedding: its codes become floats, the weight stays packed."""
    layer = ExpectedLayer("fc", "Gemm", ("fc",), "w8a8-timestep", 64, 8, 8)
    weight = EngineTensor("w", (8, 8), "Int8")

    def found(rows: int, constant: EngineTensor, read: str = "Int8") -> list[str]:
        x = EngineTensor("x", (-1, rows, 8) if rows > 1 else (-1, 8), "Float")
        codes, y = replace(x, name="codes", dtype=read), EngineTensor("y", x.shape, "Float")
        first = EngineLayer("dequantize", "kgen", (codes,), (), (x,), "", ())
        one = EngineLayer("fc", "runtime_fusion", (x,), (constant,), (y,), "", ("fc",))
        problems = problems_of(first, one, layer=layer)
        return [p.severity for p in problems if "computes in" in p.message]

    assert found(1, weight) == ["slow"]
    assert found(1, weight, "Float") == ["wrong"]
    assert found(16, weight) == ["wrong"]
    assert found(1, replace(weight, dtype="Float")) == ["wrong"]


def test_an_int4_constant_of_another_layer_does_not_count() -> None:
    stranger = kernel("kgen", "", (INT4_WEIGHT,), "other/weight_dequantize", out="other")
    product = kernel("gemm", "x:Half w:Half", (EngineTensor("w16", (8, 8), "Half"),), "fc")
    (problem,) = problems_of(stranger, product)
    assert "is not stored in the engine as Int4 (found: Half [8, 8])" in problem.message


def test_a_layer_that_no_kernel_names_is_wrong() -> None:
    (problem,) = problems_of(kernel("gemm", "x:Half", (INT4_WEIGHT,), "another"))
    assert "no kernel of the engine names its node 'fc'" in problem.message


def test_layers_that_one_kernel_computes_need_their_weights_together() -> None:
    both = EngineTensor("qk", (8, 16), "Int8")
    q = replace(LAYER, name="q", nodes=("q",), scheme="w8a8")
    k = replace(LAYER, name="k", nodes=("k",), scheme="w8a8")
    expected = ExpectedLayers((q, k), 100)
    merged = kernel("gemm", "x:Int8", (both,), "q", "k")
    assert verify(EngineLog((merged,), 100, 0), expected) == []
    half = kernel("gemm", "x:Int8", (replace(both, shape=(8, 8)),), "q", "k")
    assert len(verify(EngineLog((half,), 100, 0), expected)) == 2


def test_a_log_without_weight_bytes_is_a_problem() -> None:
    fused = kernel("runtime_fusion", "x:Half", (INT4_WEIGHT,), "fc")
    (problem,) = verify(EngineLog((fused,), None, None), ExpectedLayers((LAYER,), 100))
    assert "does not give" in problem.message


def test_expected_layers_are_saved_and_loaded(tmp_path: Path) -> None:
    expected = ExpectedLayers((LAYER, replace(LAYER, name="c", op="Conv", kernel=(3, 3))), 7)
    expected.save(tmp_path / "expected.json")
    assert ExpectedLayers.load(tmp_path / "expected.json") == expected
