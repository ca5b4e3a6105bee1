"""The device that computes: the CPU, or an NVIDIA GPU, for ONNX Runtime and for torch.

In: a wish (auto, cpu, cuda, cuda:N). Out: where sessions run and tensors lie, for this process and,
through its environment, for the workers that it starts. Devices are named here alone.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import onnxruntime as ort

from mpq_deploy.device.cuda import why_no_gpu
from mpq_deploy.errors import UsageError, nearest

# Set for worker processes: the device of the process that started them.
VARIABLE = "MPQ_DEPLOY_DEVICE"
AUTO, CPU, CUDA = "auto", "cpu", "cuda"
CPU_PROVIDER, CUDA_PROVIDER = "CPUExecutionProvider", "CUDAExecutionProvider"
RUNTIME_PACKAGES = ("onnxruntime", "onnxruntime-gpu")
WISH = re.compile(r"auto|cpu|cuda(:\d+)?")
# Both packages write into one folder, and what is imported is what was written last.
INSTALL_RUNTIME = "pip uninstall -y onnxruntime onnxruntime-gpu; pip install onnxruntime-gpu"
NO_LIBRARIES = "Install the versions of CUDA and cuDNN that onnxruntime-gpu was built for."
INSTALL_TORCH = "Install a build of torch for CUDA (pytorch.org, Get started)."


@dataclass(frozen=True)
class Compute:
    """Where this process computes; ``runtime`` (ONNX Runtime), ``torch``: the GPU's number, None for the CPU."""

    runtime: int | None = None
    torch: int | None = None

    @classmethod
    def of_text(cls, text: str) -> Compute:
        """Read what ``text`` wrote."""
        parts = [int(part) if part.isdigit() else None for part in text.split(",")]
        return cls(*parts)

    @property
    def text(self) -> str:
        """The value of the environment's variable."""
        return ",".join("" if part is None else str(part) for part in (self.runtime, self.torch))

    def __str__(self) -> str:
        runtime, torch = (
            CPU if part is None else f"{CUDA}:{part}" for part in (self.runtime, self.torch)
        )
        return runtime if runtime == torch else f"{runtime} (torch: {torch})"

    @property
    def providers(self) -> list[tuple[str, dict[str, str]]]:
        """ONNX Runtime's execution providers, with their options.

        TF32 is off: it has 10 bits of mantissa, and Hessians and errors of quantization lie below
        what it rounds. Kernels of convolutions are chosen without trying them all, and memory grows
        by what is asked for: graphs here are run with few shapes, beside torch.
        """
        if self.runtime is None:
            return [(CPU_PROVIDER, {})]
        options = {
            "device_id": str(self.runtime),
            "use_tf32": "0",
            "cudnn_conv_algo_search": "HEURISTIC",
            "arena_extend_strategy": "kSameAsRequested",
        }
        return [(CUDA_PROVIDER, options), (CPU_PROVIDER, {})]

    def torch_device(self) -> Any:
        """Return torch's device."""
        import torch

        return torch.device(CPU) if self.torch is None else torch.device(CUDA, self.torch)


def computing_on() -> Compute:
    """Return where this process computes: what ``compute_on`` set, here or in the process that started it."""
    return Compute.of_text(os.environ.get(VARIABLE, ","))


def environment() -> dict[str, str]:
    """Return what a worker process must find in its environment to compute where this one does."""
    return {VARIABLE: computing_on().text}


@contextmanager
def compute_on(place: Compute) -> Iterator[None]:
    """Compute on ``place`` for the time of the block, workers started in it included."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = place.text
    try:
        with _exact_torch(place):
            yield
    finally:
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before


@contextmanager
def _exact_torch(place: Compute) -> Iterator[None]:
    """Multiply and convolve in whole FP32 in torch: convolutions take TF32 by default."""
    if place.torch is None:
        yield
        return
    import torch

    backends = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = False
    try:
        yield
    finally:
        for backend, allowed in zip(backends, before, strict=True):
            backend.allow_tf32 = allowed


def find_compute(wish: str) -> Compute:
    """Return the device for ``wish``; ``auto`` takes the GPU for each of the libraries that can use it.

    Raises UsageError for another word, and for a GPU that is not there or that a library cannot
    use: which, and what to install.
    """
    if not WISH.fullmatch(wish):
        raise UsageError(
            f"There is no compute device '{wish}'.",
            f"{nearest(wish, (AUTO, CPU, CUDA))}One of auto, cpu, cuda, cuda:N.",
        )
    if wish == CPU:
        return Compute()
    against = why_no_gpu()
    if against:
        if wish == AUTO:
            return Compute()
        raise UsageError(
            f"The compute device '{wish}' is not here: {against[0].lower()}{against[1:]}.",
            "Install NVIDIA's driver (nvidia-smi shows whether it works), or give --device cpu.",
        )
    number = int(wish.partition(":")[2] or 0)
    runtime, torch = why_no_cuda_runtime(number), why_no_cuda_torch(number)
    if wish == AUTO:
        return Compute(None if runtime else number, None if torch else number)
    for reason, hint in ((runtime, f"Run: {INSTALL_RUNTIME}"), (torch, INSTALL_TORCH)):
        if reason:
            raise UsageError(f"The compute device '{wish}' cannot be used: {reason}.", hint)
    return Compute(number, number)


def why_no_cuda_runtime(number: int = 0) -> str:
    """Return why ONNX Runtime cannot compute on that GPU; empty when it can."""
    installed = [name for name in RUNTIME_PACKAGES if _installed(name)]
    if CUDA_PROVIDER not in ort.get_available_providers():
        if len(installed) == len(RUNTIME_PACKAGES):
            return (
                f"{' and '.join(installed)} are both installed, and the one for the CPU is imported"
            )
        return f"ONNX Runtime {ort.__version__} is a build for the CPU (onnxruntime-gpu is missing)"
    _find_cuda_libraries()
    try:
        session = ort.InferenceSession(_smallest_graph(), providers=Compute(number).providers)
    except Exception as error:
        return f"ONNX Runtime cannot open it: {_first_line(error)}"
    if CUDA_PROVIDER not in session.get_providers():
        return f"ONNX Runtime {ort.__version__} could not load CUDA's libraries"
    return ""


def why_no_cuda_torch(number: int = 0) -> str:
    """Return why torch cannot compute on that GPU; empty when it can."""
    try:
        import torch
    except ImportError:
        return "torch is not installed"
    if not torch.cuda.is_available():
        why = "is a build for the CPU" if torch.version.cuda is None else "finds no GPU"
        return f"torch {torch.__version__} {why}"
    if number >= torch.cuda.device_count():
        return f"there are {torch.cuda.device_count()} GPUs, counted from 0"
    return ""


def start_session(
    source: str | bytes,
    options: ort.SessionOptions,
    providers: Sequence[str] | None = None,
) -> ort.InferenceSession:
    """Open a session on ``providers``, or where this process computes.

    Raises whatever ONNX Runtime raises, and UsageError where it opened the session on the CPU
    instead of the GPU (which it does, with a line in its log, when a library of CUDA is missing).
    """
    place = computing_on()
    chosen = place.providers if providers is None else list(providers)
    if providers is None and place.runtime is not None:
        _find_cuda_libraries()
    session = ort.InferenceSession(source, options, providers=chosen)
    wanted = providers is None and place.runtime is not None
    if wanted and CUDA_PROVIDER not in session.get_providers():
        raise UsageError(f"ONNX Runtime opened no session on {place}.", NO_LIBRARIES)
    return session


@cache
def _find_cuda_libraries() -> None:
    """Load CUDA's libraries from where packages of torch or NVIDIA brought them: ONNX Runtime looks on no such path."""
    if hasattr(ort, "preload_dlls"):
        ort.preload_dlls()


def _smallest_graph() -> bytes:
    import onnx
    from onnx import TensorProto, helper

    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", value[:1], value[1:])
    opsets = [helper.make_opsetid("", 17)]
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    return bytes(model.SerializeToString())


def _installed(package: str) -> bool:
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False


def _first_line(error: Any) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
