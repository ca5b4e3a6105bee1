"""On a machine with an NVIDIA GPU: rounding, Hessians and observers there give what they give on the CPU."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from mpq_deploy.calibrate.activation_shapes import activation_shapes
from mpq_deploy.calibrate.observers import ObservedGraph, observe
from mpq_deploy.calls.recorded import RecordedCalls
from mpq_deploy.formats.candidates import Choices, LayerCandidates, round_candidates
from mpq_deploy.formats.scheme import FP16, SCHEMES
from mpq_deploy.graph.layers import Layer
from mpq_deploy.recipe import Recipe
from mpq_deploy.rounding.hessian import Hessian, iterate_hessians
from mpq_deploy.rounding.quantizers import Rounding
from mpq_deploy.run.pipeline import open_pipeline
from mpq_deploy.run.view import Run
from mpq_deploy.runtime.ort import session_options
from mpq_deploy.system import sessions
from mpq_deploy.system.compute import (
    Compute,
    compute_on,
    why_no_cuda_runtime,
    why_no_cuda_torch,
)
from mpq_deploy.system.progress import Talk
from tests.rounding.layers_to_round import hessian_error, layer_to_round

pytestmark = pytest.mark.gpu
GPU = Compute(0, 0)
LAYER = layer_to_round(Layer("conv", "Conv", "w", (96, 96, 3, 3), 0, 1, ()), (768, 96), 5)
PRODUCT = layer_to_round(Layer("fc", "Gemm", "w", (128, 640), 0, 1, ()), (640,), 6)
# What a node on the CPU may read and give without copies being felt: shapes and the like.
SMALL_BYTES = 4096


@pytest.fixture(scope="module", autouse=True)
def gpu() -> None:
    if why_no_cuda_torch():
        pytest.skip(why_no_cuda_torch())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The digits demo, calibrated on the CPU."""
    if why_no_cuda_runtime():
        pytest.skip(why_no_cuda_runtime())
    settings = Recipe().model_dump()
    settings["model"], settings["compute"]["device"] = "digits", "cpu"
    settings["calibrate"] |= {"samples": 8, "timesteps": 3}
    folder = tmp_path_factory.mktemp("digits") / "run"
    with open_pipeline(Recipe(**settings), folder, Talk()) as pipeline:
        pipeline.run_until("calibrate")
    return Run.opened(folder, Talk())


def calls_of(run: Run) -> RecordedCalls:
    return RecordedCalls(run.calibration.inputs, run.exported.spec)


@pytest.mark.parametrize("work", [LAYER, PRODUCT], ids=["conv", "product"])
def test_layers_rounded_on_the_gpu_have_the_error_that_the_cpu_leaves(
    work: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mpq_deploy.rounding.gpu_columns import Replayed

    recorded = []
    record = Replayed._record

    def watched(self: Replayed, *arguments: object) -> object:
        recorded.append(record(self, *arguments))
        return recorded[-1]

    monkeypatch.setattr(Replayed, "_record", watched)
    layer, weight, inputs = work
    schemes = tuple(s for s in SCHEMES.values() if s.quantized and not s.refusal(layer))

    def rounded() -> LayerCandidates:
        how = Rounding(True, 0.05, 2, 20 * len(weight))
        return round_candidates(layer, Choices((FP16, *schemes), {}), weight, inputs, how)

    expected = rounded()
    with compute_on(GPU):
        found = rounded()
    theirs, ours = (
        {form: hessian_error(work, matrix.dequantize()) for form, matrix in made.forms.items()}
        for made in (found, expected)
    )
    # A code at a tie changes those after it in its row.
    assert theirs == pytest.approx(ours, rel=5e-3)
    assert sum(theirs.values()) == pytest.approx(sum(ours.values()), rel=1e-3)
    assert recorded and None not in recorded, "CUDA refused to record passes as graphs"


def test_hessians_made_on_the_gpu_are_those_of_the_cpu(run: Run) -> None:
    def hessians() -> dict[str, Hessian]:
        found = iterate_hessians(
            run.exported.graph, calls_of(run), run.recipe.quantize, Talk(), scratch=run.scratch()
        )
        return {h.layer.name: h for h in found}

    expected = hessians()
    with compute_on(GPU):
        found = hessians()
    for name, hessian in expected.items():
        assert found[name].rows == hessian.rows
        largest = np.abs(hessian.blocks).max()
        np.testing.assert_allclose(
            found[name].blocks, hessian.blocks, rtol=1e-4, atol=1e-4 * largest
        )


def test_activations_observed_on_the_gpu_are_those_of_the_cpu(run: Run) -> None:
    settings = run.recipe.calibrate
    expected = observe(run.exported.graph, calls_of(run), settings, Talk())
    with compute_on(GPU):
        found = observe(run.exported.graph, calls_of(run), settings, Talk())
    for part in ("amax", "square_sum", "fourth_sum"):
        theirs, ours = getattr(found, part), getattr(expected, part)
        np.testing.assert_allclose(theirs, ours, rtol=1e-3, atol=1e-5 * ours.max(), err_msg=part)
    np.testing.assert_array_equal(found.priorities, expected.priorities)
    atol = 1e-4 * np.abs(expected.values).max(axis=1, keepdims=True)
    assert (np.abs(found.values - expected.values) <= atol).all()


@pytest.fixture
def profiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Let sessions write what each node took, and where it ran."""
    options_of = session_options

    def profiling(*arguments: object) -> ort.SessionOptions:
        options = options_of(*arguments)  # type: ignore[arg-type]
        options.enable_profiling = True
        options.profile_file_prefix = str(tmp_path / "profile")
        return options

    monkeypatch.setattr(sessions, "session_options", profiling)
    yield tmp_path


def test_no_large_tensor_is_observed_on_the_cpu(run: Run, profiled: Path) -> None:
    graph, calls, settings = run.exported.graph, calls_of(run), run.recipe.calibrate
    with compute_on(GPU):
        observed = ObservedGraph.of(graph, activation_shapes(graph, calls, Talk()))
        with sessions.open_session(observed.model, Talk()) as session:
            observed.run(session, settings, next(iter(calls.batches(settings.batch_size))))
            events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    nodes = [e["args"] for e in events if e.get("cat") == "Node" and "provider" in e["args"]]
    assert any(node["provider"] == "CUDAExecutionProvider" for node in nodes)
    large = {
        node["op_name"]
        for node in nodes
        if node["provider"] == "CPUExecutionProvider"
        and max(int(node["activation_size"]), int(node["output_size"])) > SMALL_BYTES
    }
    assert not large
