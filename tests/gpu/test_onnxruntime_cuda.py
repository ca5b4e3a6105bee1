"""On a machine with an NVIDIA GPU and onnxruntime-gpu: what CUDA computes is what the CPU computes.

pytest tests/gpu/test_onnxruntime_cuda.py -m gpu
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mpq_deploy
from mpq_deploy.models.export import ExportedModel, export_denoiser, load_exported
from mpq_deploy.models.open import open_denoiser
from mpq_deploy.runtime.ort import (
    OrtDenoiser,
    make_session,
    make_session_with,
    run_bound,
    run_session,
    session_options,
)
from mpq_deploy.system import compute
from mpq_deploy.system.compute import (
    CPU_PROVIDER,
    CUDA_PROVIDER,
    Compute,
    compute_on,
    find_compute,
    why_no_cuda_runtime,
    why_no_gpu,
)
from tests.engine.float_plans import write_floats
from tests.tiny_models import tiny_onnx_with_yaml

pytestmark = pytest.mark.gpu

# Of the root mean square. Activations in INT8 or FP8 round other values up and down when
# their inputs differ in a last bit, so whole steps differ here and there: two levels of optimization
# on one CPU differ by 1e-3 (INT8) and 7e-3 (FP8).
WEIGHTS_ALONE, ACTIVATIONS = 1e-4, 3e-2
PLANS = {
    "float": ((), WEIGHTS_ALONE),
    "weights": (("w4a16-b32", "w8a16", "w4a16-b128"), WEIGHTS_ALONE),
    "int8": (("w8a8", "w4a8-b32"), ACTIVATIONS),
    "fp8": (("f8a8", "w4f8-b32"), ACTIVATIONS),
    "nvfp4": (("nvfp4",), ACTIVATIONS),
}


@pytest.fixture(scope="module", autouse=True)
def cuda() -> Iterator[None]:
    against = why_no_gpu() or why_no_cuda_runtime()
    if against:
        pytest.skip(against)
    with compute_on(Compute(0)):
        yield


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> ExportedModel:
    folder = tmp_path_factory.mktemp("digits")
    export_denoiser(open_denoiser("digits"), folder / "export")
    return load_exported(folder / "export")


def feeds_of(model: ExportedModel, rows: int) -> dict[str, np.ndarray[Any, Any]]:
    spec, random = model.spec, np.random.default_rng(0)
    found = {}
    for item in spec.inputs:
        shape = (rows, *item.shape) if item.batched else item.shape
        values = random.integers(0, 9, shape) if item.dtype.startswith("int") else None
        if item is spec.timestep:
            values = np.full(shape, 500)
        drawn = random.standard_normal(shape) if values is None else values
        found[item.name] = drawn.astype(item.dtype)
    return found


def difference(found: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> float:
    return float(np.sqrt(np.square(found - expected).mean() / np.square(expected).mean()))


def plan(model: ExportedModel, name: str, folder: Path) -> Path:
    schemes, _ = PLANS[name]
    if not schemes:
        return model.model
    names = (model.spec.timestep_name, model.spec.sample.name)
    write_floats(model.model, folder, lambda number, _: schemes[number % len(schemes)], names=names)
    return folder / "model.fp32.onnx"


@pytest.mark.parametrize("name", list(PLANS))
def test_outputs_are_the_cpus(name: str, digits: ExportedModel, tmp_path: Path) -> None:
    path, feeds = plan(digits, name, tmp_path), feeds_of(digits, 4)
    on_gpu = OrtDenoiser(path, digits.spec, fake_quant_only=True)
    assert on_gpu.session.get_providers()[0] == CUDA_PROVIDER
    on_cpu = OrtDenoiser(path, digits.spec, 0, [CPU_PROVIDER], fake_quant_only=True)
    error = difference(on_gpu.run(feeds), on_cpu.run(feeds))
    assert error < PLANS[name][1], error


def test_bound_outputs_are_those_of_a_plain_run(digits: ExportedModel) -> None:
    session, feeds = make_session(digits.model), feeds_of(digits, 4)
    (plain,) = session.run([digits.spec.output], feeds)
    bound = run_bound(session, digits.spec.output, feeds, "cuda")
    np.testing.assert_allclose(bound, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", list(PLANS))
def test_what_costs_runs_on_the_gpu(name: str, digits: ExportedModel, tmp_path: Path) -> None:
    """Products and convolutions do, and nothing dequantizes weights at each call."""
    options = session_options(0, True)
    options.enable_profiling, options.profile_file_prefix = True, str(tmp_path / "profile")
    session = make_session_with(plan(digits, name, tmp_path), options)
    run_session(session, digits.spec.output, feeds_of(digits, 2))
    events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    ran = Counter(
        (event["args"]["op_name"], event["args"]["provider"])
        for event in events
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")
    )
    print(name, {op: count for (op, place), count in ran.items() if place != CUDA_PROVIDER})  # noqa: T201
    heavy = {op for op, _ in ran if "Conv" in op or "MatMul" in op or op == "Gemm"}
    assert heavy and not [op for op in heavy if (op, CPU_PROVIDER) in ran], ran


def test_torch_tensors_on_the_gpu_are_bound(digits: ExportedModel) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("torch sees no GPU")
    from mpq_deploy.runtime.backends import OrtBackend

    feeds = feeds_of(digits, 3)
    backend = OrtBackend(digits.model, digits.spec, torch.device("cuda", 0))
    found = backend({n: torch.from_numpy(np.asarray(v)).cuda() for n, v in feeds.items()})
    assert found.device.type == "cuda"
    expected = OrtDenoiser(digits.model, digits.spec, 0, [CPU_PROVIDER]).run(feeds)
    error = difference(found.float().cpu().numpy(), expected)
    assert error < WEIGHTS_ALONE, error


@pytest.mark.parametrize("megabytes", [64, 12])
def test_a_small_memory_takes_smaller_batches_or_the_cpu(
    megabytes: int, digits: ExportedModel, capsys: pytest.CaptureFixture[str]
) -> None:
    compute.say_once.cache_clear()
    ((name, options), cpu) = Compute(0).providers
    limited = [(name, {**options, "gpu_mem_limit": str(megabytes << 20)}), cpu]
    feeds = feeds_of(digits, 256)
    found = OrtDenoiser(digits.model, digits.spec, 0, limited).run(feeds)
    assert "memory does not suffice" in capsys.readouterr().err
    expected = OrtDenoiser(digits.model, digits.spec, 0, [CPU_PROVIDER]).run(feeds)
    assert difference(found, expected) < WEIGHTS_ALONE


def test_a_run_is_evaluated_on_the_gpu(tmp_path: Path) -> None:
    settings = {
        "engine.build": False,
        "calibrate.samples": 8,
        "measure.samples": 8,
        "evaluate.samples": 4,
        "evaluate.steps": 4,
    }
    reports = {}
    for device in ("cpu", "auto"):
        (tmp_path / device).mkdir()
        made = mpq_deploy.build(
            tiny_onnx_with_yaml(tmp_path / device),
            budget=0.85,
            out=tmp_path / device / "run",
            settings={**settings, "compute.device": device},
            quiet=True,
        )
        reports[device] = made.report
        record = json.loads((made.run / "evaluate" / "stage.json").read_text(encoding="utf-8"))
        assert record["device"] == str(find_compute(device))
    assert any("computed on cuda" in note for note in reports["auto"]["notes"])
    cpu, gpu = (reports[device]["measured_nmse"] for device in ("cpu", "auto"))
    assert gpu == pytest.approx(cpu, rel=0.2)
