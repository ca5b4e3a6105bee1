"""Where this process computes: what is asked for, what is there, and what is said when they differ.

No GPU is needed: what is faked says so. tests/gpu runs on a real one.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch

from mpq_deploy.errors import EngineError, ModelError, UsageError
from mpq_deploy.models.export import ExportedModel, export_denoiser, load_exported
from mpq_deploy.models.open import open_denoiser
from mpq_deploy.runtime.ort import OrtDenoiser, make_session, run_bound, session_options
from mpq_deploy.system import compute
from mpq_deploy.system.children import child_command, child_environment
from mpq_deploy.system.compute import (
    CPU_PROVIDER,
    CUDA_PROVIDER,
    Compute,
    compute_on,
    computing_on,
    find_compute,
    out_of_memory,
    start_session,
)
from mpq_deploy.system.doctor import inspect_machine
from mpq_deploy.system.parallel.processes import Processes
from tests.tiny_models import tiny_onnx_with_yaml

CPU_BUILD = CUDA_PROVIDER not in ort.get_available_providers()
OPENVINO = "OpenVINOExecutionProvider"
needs_cpu_build = pytest.mark.skipif(not CPU_BUILD, reason="for ONNX Runtime without CUDA")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> ExportedModel:
    folder = tmp_path_factory.mktemp("compute")
    export_denoiser(open_denoiser(tiny_onnx_with_yaml(folder)), folder / "export")
    return load_exported(folder / "export")


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fake: the driver shows one GPU."""
    monkeypatch.setattr(compute, "count_gpus", lambda: 1)


def feeds_of(exported: ExportedModel, rows: int) -> dict[str, np.ndarray[Any, Any]]:
    sample = np.random.default_rng(0).standard_normal((rows, 3, 9, 9)).astype(np.float32)
    timestep = exported.spec.timestep
    assert timestep is not None
    times = np.full(rows, 7).reshape(rows, *timestep.shape) if timestep.batched else np.array(7)
    found = {exported.spec.sample.name: sample, timestep.name: times.astype(timestep.dtype)}
    return found | {"y": (np.arange(rows) % 4).astype(exported.spec.conditions[0].dtype)}


def refusal(wish: str) -> UsageError:
    with pytest.raises(UsageError) as caught:
        find_compute(wish)
    return caught.value


def test_the_text_of_a_device_is_read_again() -> None:
    for place in (Compute(), Compute(0, 0), Compute(None, 2), Compute(1, None)):
        assert Compute.of_text(place.text) == place
    assert [str(Compute()), str(Compute(1, 1)), str(Compute(None, 0))] == [
        "cpu",
        "cuda:1",
        "cpu (torch: cuda:0)",
    ]


def test_providers_say_what_must_be_exact() -> None:
    assert Compute().providers == [(CPU_PROVIDER, {})]
    (name, options), (second, _) = Compute(2).providers
    assert (name, second) == (CUDA_PROVIDER, CPU_PROVIDER)
    assert options["device_id"] == "2" and options["use_tf32"] == "0"


def test_unknown_words_are_refused() -> None:
    assert refusal("cud").message == "There is no compute device 'cud'."
    assert "cuda" in (refusal("cud").hint or "")
    assert find_compute("cpu") == Compute()


def test_without_a_driver_auto_is_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> int:
        raise EngineError("No NVIDIA driver was found (libcuda.so.1 cannot be loaded).")

    # A fake where there is a driver.
    monkeypatch.setattr(compute, "count_gpus", none)
    assert find_compute("auto") == Compute()
    error = refusal("cuda:1")
    assert error.message.startswith(
        "The compute device 'cuda:1' is not available: no NVIDIA driver"
    )
    assert "--device cpu" in (error.hint or "")


@pytest.mark.usefixtures("one_gpu")
def test_a_gpu_that_is_not_there_is_refused() -> None:
    assert "counted from 0, and there is 1" in refusal("cuda:3").message


@needs_cpu_build
@pytest.mark.usefixtures("one_gpu")
def test_a_build_of_onnxruntime_for_the_cpu_is_named() -> None:
    error = refusal("cuda")
    assert "is a CPU build (onnxruntime-gpu is missing)" in error.message
    assert "pip install onnxruntime-gpu" in (error.hint or "")
    assert find_compute("auto").runtime is None


@needs_cpu_build
@pytest.mark.usefixtures("one_gpu")
def test_both_packages_are_named_with_the_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    # A fake: both packages' metadata.
    monkeypatch.setattr(compute, "version", lambda package: "1.31.1")
    error = refusal("cuda")
    assert "both onnxruntime and onnxruntime-gpu are installed" in error.message
    assert "pip uninstall -y onnxruntime onnxruntime-gpu" in (error.hint or "")
    finding = next(one for one in inspect_machine() if one.name == "compute device")
    assert finding.status == "note" and all(len(line) <= 62 for line in finding.hint.splitlines())


@needs_cpu_build
@pytest.mark.usefixtures("one_gpu")
@pytest.mark.filterwarnings("ignore:Specified provider")
def test_missing_libraries_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    # A fake: a provider that is listed and cannot be loaded, as with a library of CUDA missing.
    monkeypatch.setattr(
        compute.ort, "get_available_providers", lambda: [CUDA_PROVIDER, CPU_PROVIDER]
    )
    monkeypatch.setattr(compute, "_missing_library", lambda: "libcublasLt.so.13 is missing")
    error = refusal("cuda")
    assert error.message.endswith("cannot load CUDA: libcublasLt.so.13 is missing.")
    assert "[cuda,cudnn]" in (error.hint or "")


@pytest.mark.usefixtures("one_gpu")
@pytest.mark.skipif(torch.version.cuda is not None, reason="for torch without CUDA")
def test_a_build_of_torch_for_the_cpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    # A fake: ONNX Runtime can use the GPU.
    monkeypatch.setattr(compute, "why_no_cuda_runtime", lambda number: "")
    assert f"torch {torch.__version__} is a CPU build" in refusal("cuda").message
    assert find_compute("auto") == Compute(0, None)


@needs_cpu_build
@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_session_that_silently_lacks_the_gpu_is_refused(exported: ExportedModel) -> None:
    source = str(exported.model)
    for providers in (None, Compute(0).providers):
        with (
            compute_on(Compute(0)),
            pytest.raises(UsageError, match="could not open a session with its CUDA"),
        ):
            start_session(source, session_options(1), providers)


def test_workers_compute_where_their_starter_does() -> None:
    asked = "from mpq_deploy.system.compute import computing_on; print(computing_on())"
    command = [*child_command("timeit")[:2], asked]
    with compute_on(Compute(1, None)):
        assert Processes(2).environment()[compute.VARIABLE] == "1,"
        done = subprocess.run(
            command, env=child_environment(), capture_output=True, text=True, check=True
        )
    assert done.stdout == "cuda:1 (torch: cpu)\n"
    assert computing_on() == Compute()


def test_tf32_is_off_in_the_block_alone() -> None:
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    with pytest.raises(KeyError), compute_on(Compute(0, 0)):
        assert [backend.allow_tf32 for backend in backends] == [False, False]
        raise KeyError
    assert [backend.allow_tf32 for backend in backends] == before
    assert computing_on() == Compute()


def test_bound_inputs_and_outputs_change_nothing(exported: ExportedModel) -> None:
    session, feeds = make_session(exported.model, 1), feeds_of(exported, 3)
    (expected,) = session.run([exported.spec.output], feeds)
    found = run_bound(session, exported.spec.output, feeds, "cpu")
    np.testing.assert_array_equal(found, expected)


class SmallGpu:
    """A fake: a session on the CPU that says it is on a GPU, whose memory holds ``most`` rows."""

    def __init__(self, real: ort.InferenceSession, most: int, sample: str) -> None:
        self.real, self.most, self.sample, self.batches = real, most, sample, list[int]()
        self.get_inputs = real.get_inputs

    def get_providers(self) -> list[str]:
        return [CUDA_PROVIDER, CPU_PROVIDER]

    def io_binding(self) -> Any:
        return FakeBinding(self)


class FakeBinding:
    """Of a ``SmallGpu``: keeps what is bound, and runs it on the CPU."""

    def __init__(self, gpu: SmallGpu) -> None:
        self.gpu, self.feeds = gpu, dict[str, Any]()

    def bind_cpu_input(self, name: str, value: Any) -> None:
        self.feeds[name] = value

    def bind_output(self, name: str, device: str, number: int) -> None:
        assert (device, number) == ("cuda", 0)
        self.output = name

    def copy_outputs_to_cpu(self) -> list[Any]:
        return [self.found]


def run_with_iobinding(self: SmallGpu, binding: FakeBinding) -> None:
    rows = len(binding.feeds[self.sample])
    self.batches.append(rows)
    if rows > self.most:
        # As a binding of ONNX Runtime raises it: none of its own errors.
        raise RuntimeError(
            "Error in execution: bfc_arena.cc:376 Failed to allocate memory for requested buffer of size 1024"
        )
    (binding.found,) = self.real.run([binding.output], binding.feeds)


SmallGpu.run_with_iobinding = run_with_iobinding  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("most", "batches"), [(9, [7]), (2, [7, 3, 1, 1, 1, 1, 1, 1, 1]), (0, [7, 3, 1])]
)
def test_too_large_batches_are_halved_then_the_cpu_goes_on(
    most: int,
    batches: list[int],
    exported: ExportedModel,
    capsys: pytest.CaptureFixture[str],
) -> None:
    compute.say_once.cache_clear()
    denoiser, feeds = OrtDenoiser(exported.model, exported.spec, 1), feeds_of(exported, 7)
    expected = denoiser.run(feeds)
    gpu = SmallGpu(denoiser.session, most, exported.spec.sample.name)
    denoiser._batches.session = gpu
    np.testing.assert_array_equal(denoiser.run(feeds), expected)
    assert gpu.batches == batches
    said = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[-1] for line in said] == {
        9: [],
        2: ["3 at a time.", "1 at a time."],
        0: ["3 at a time.", "1 at a time.", "the model runs on the CPU."],
    }[most]
    # The next call begins with what the last has shown, and repeats nothing.
    np.testing.assert_array_equal(denoiser.run(feeds), expected)
    assert gpu.batches == {9: [7, 7], 2: [*batches, *[1] * 7], 0: batches}[most]
    assert capsys.readouterr().err == ""
    assert (denoiser.session is gpu) == (most > 0)


def test_other_failures_stay_failures(exported: ExportedModel) -> None:
    denoiser, feeds = OrtDenoiser(exported.model, exported.spec, 1), feeds_of(exported, 2)
    feeds[exported.spec.sample.name] = feeds[exported.spec.sample.name][:, :2]
    with pytest.raises(ModelError, match="inputs of shapes"):
        denoiser.run(feeds)


@pytest.mark.parametrize(
    "text",
    [
        "bfc_arena.cc:376 Failed to allocate memory for requested buffer of size 5",
        "CUDA failure 2: out of memory ; GPU=0",
        "CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED",
        "CUDNN_STATUS_ALLOC_FAILED",
        "Available memory of 123 is smaller than requested bytes of 456",
    ],
)
def test_what_says_that_memory_ran_out(text: str) -> None:
    assert out_of_memory(RuntimeError(text))
    assert not out_of_memory(RuntimeError("Non-zero status code while running Conv"))
    assert not out_of_memory(None)


@pytest.mark.skipif(
    OPENVINO not in ort.get_available_providers(), reason="needs onnxruntime-openvino"
)
def test_another_provider_computes_the_same(exported: ExportedModel) -> None:
    feeds = feeds_of(exported, 3)
    session = make_session(exported.model, 1, [OPENVINO, CPU_PROVIDER])
    assert session.get_providers()[0] == OPENVINO
    (found,) = session.run([exported.spec.output], feeds)
    expected = OrtDenoiser(exported.model, exported.spec, 1).run(feeds)
    assert np.abs(found - expected).max() < 1e-3 * np.abs(expected).max()


def test_a_provider_that_is_not_here_is_refused(exported: ExportedModel) -> None:
    with pytest.raises(UsageError, match="no execution provider 'NoneExecutionProvider'"):
        make_session(exported.model, 1, ["NoneExecutionProvider"])


def test_nothing_is_printed_while_a_gpu_is_looked_for(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    find_compute("auto")
    # With onnxruntime-gpu and no libraries this prints three lines.
    compute._find_cuda_libraries.cache_clear()
    compute._find_cuda_libraries()
    assert capfd.readouterr() == ("", "")
