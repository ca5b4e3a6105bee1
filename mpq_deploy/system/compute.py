"""The device that computes: the CPU, or an NVIDIA GPU, for ONNX Runtime and for torch.

In: the requested device (auto, cpu, cuda, cuda:N). Out: where sessions run and tensors lie, for
this process and, through its environment, for the workers that it starts. Devices are named here
alone.
"""

from __future__ import annotations

import ctypes
import gc
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from mpq_deploy.device.cuda import count_gpus
from mpq_deploy.errors import EngineError, UsageError, nearest
from mpq_deploy.system.libraries import libraries_shown, silenced
from mpq_deploy.system.progress import PlainTalk

# Set for worker processes: the device of the process that started them.
VARIABLE = "MPQ_DEPLOY_DEVICE"
AUTO, CPU, CUDA = "auto", "cpu", "cuda"
CPU_PROVIDER, CUDA_PROVIDER = "CPUExecutionProvider", "CUDAExecutionProvider"
RUNTIME_PACKAGES = ("onnxruntime", "onnxruntime-gpu")
WISH = re.compile(r"auto|cpu|cuda(:\d+)?")
# What is imported is what was written last.
BOTH_INSTALLED = "both onnxruntime and onnxruntime-gpu are installed: keep one"
INSTALL_RUNTIME = "pip uninstall -y onnxruntime onnxruntime-gpu; pip install onnxruntime-gpu"
NO_LIBRARIES = (
    "pip install 'onnxruntime-gpu[cuda,cudnn]' brings CUDA's libraries, or give --device cpu."
)
NO_DRIVER = "Install NVIDIA's driver (nvidia-smi shows whether it works), or give --device cpu."
INSTALL_TORCH = "Install a CUDA build of torch (pytorch.org, Get started)."
# What ONNX Runtime, cuBLAS and cuDNN say when the GPU's memory does not suffice; all of it is text.
NO_MEMORY = re.compile(
    r"Failed to allocate memory|is smaller than requested bytes|out of memory|_ALLOC_FAILED"
    r"|unable to find an engine to execute this computation"
)
# Of ONNX Runtime's log, without --debug: errors; nothing where failing is an answer.
LOG_WARNINGS, LOG_ERRORS, LOG_NOTHING = 2, 3, 4
Provider = str | tuple[str, dict[str, str]]


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
    def providers(self) -> list[Provider]:
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
    number = int(wish.partition(":")[2] or 0)
    against = why_no_gpu(number)
    if against:
        if wish == AUTO:
            return Compute()
        raise UsageError(f"The compute device '{wish}' is not available: {against}.", NO_DRIVER)
    if wish == AUTO:
        return Compute(*(None if why else number for why in whys_no_cuda(number)))
    for reason, hint in zip(whys_no_cuda(number), (_runtime_hint(), INSTALL_TORCH), strict=True):
        if reason:
            raise UsageError(f"The compute device '{wish}' cannot be used: {reason}.", hint)
    return Compute(number, number)


def why_no_gpu(number: int = 0) -> str:
    """Return why there is no GPU of that number; empty when there is. Opens nothing on it."""
    try:
        count = count_gpus()
    except EngineError as error:
        text = error.message.rstrip(".")
        return text[0].lower() + text[1:]
    if number < count:
        return ""
    return f"GPUs are counted from 0, and there {'is 1' if count == 1 else f'are {count}'}"


def whys_no_cuda(number: int = 0) -> tuple[str, str]:
    """Return why ONNX Runtime, and why torch, cannot compute on that GPU; each empty when it can."""
    return why_no_cuda_runtime(number), why_no_cuda_torch(number)


def why_no_cuda_runtime(number: int = 0) -> str:
    """Return why ONNX Runtime cannot compute on that GPU; empty when it can."""
    if CUDA_PROVIDER not in ort.get_available_providers():
        if hidden_runtime():
            return BOTH_INSTALLED
        return f"ONNX Runtime {ort.__version__} is a CPU build (onnxruntime-gpu is missing)"
    _find_cuda_libraries()
    options = ort.SessionOptions()
    options.log_severity_level = _log_level(LOG_NOTHING)
    ort.set_default_logger_severity(options.log_severity_level)
    try:
        providers = Compute(number).providers
        session = ort.InferenceSession(_one_conv(), options, providers=providers, enable_fallback=0)
        session.run(None, {"x": np.zeros((1, 1, 3, 3), np.float32)})
    except Exception as error:
        # Whatever its libraries lack or refuse is the answer.
        return f"ONNX Runtime cannot compute there: {_first_line(error)}"
    finally:
        ort.set_default_logger_severity(_log_level(LOG_ERRORS))
    if CUDA_PROVIDER not in session.get_providers():
        missing = _missing_library() or "its log says why (--debug)"
        return f"ONNX Runtime {ort.__version__} cannot load CUDA: {missing}"
    return ""


def why_no_cuda_torch(number: int = 0) -> str:
    """Return why torch cannot compute on that GPU; empty when it can."""
    try:
        import torch
    except ImportError:
        return "torch is not installed"
    with silenced():
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if number >= count:
        why = "is a CPU build" if torch.version.cuda is None else f"finds {count} GPUs"
        return f"torch {torch.__version__} {why}"
    return ""


def start_session(
    source: str | bytes,
    options: ort.SessionOptions,
    providers: Sequence[Provider] | None = None,
) -> ort.InferenceSession:
    """Open a session on ``providers``, or where this process computes.

    On a GPU constants are dequantized once, when the session is opened, by the kernels for the CPU:
    the same numbers, also in formats for which the GPU has no kernel. If its memory does not hold
    the constants, the session is opened on the CPU, with a warning.

    Raises whatever ONNX Runtime raises, and UsageError where it left out the first of the providers
    (which it does, with a line in its log, when a library is missing).
    """
    chosen = computing_on().providers if providers is None else list(providers)
    first = chosen[0] if isinstance(chosen[0], str) else chosen[0][0]
    if first == CUDA_PROVIDER:
        _find_cuda_libraries()
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    try:
        session = ort.InferenceSession(source, options, providers=chosen, enable_fallback=0)
    except Exception as error:
        if first != CUDA_PROVIDER or not out_of_memory(error):
            raise
        free_cached_memory()
        say_once("The GPU's memory is not enough for a model's weights: it runs on the CPU.")
        return ort.InferenceSession(source, options, providers=[CPU_PROVIDER])
    if first not in session.get_providers():
        why = f": {_missing_library()}" if first == CUDA_PROVIDER and _missing_library() else ""
        raise UsageError(
            f"ONNX Runtime could not open a session with its {first}{why}.", NO_LIBRARIES
        )
    return session


def out_of_memory(error: BaseException | None) -> bool:
    """Whether ``error`` says that the GPU's memory did not suffice."""
    return error is not None and NO_MEMORY.search(str(error)) is not None


def free_cached_memory() -> None:
    """Release the GPU memory that torch caches."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        # What an error held, in circles of frames.
        gc.collect()
        torch.cuda.empty_cache()


@cache
def say_once(text: str) -> None:
    """Warn on stderr, once per process, that computing moves to another device than requested."""
    PlainTalk().warn(text)


@cache
def _find_cuda_libraries() -> None:
    """Load CUDA's libraries from where packages of torch or NVIDIA brought them: ONNX Runtime looks on no such path.

    What it prints about those that are missing is kept back: no session opens then, which is said.
    """
    ort.set_default_logger_severity(_log_level(LOG_ERRORS))
    if hasattr(ort, "preload_dlls"):
        with silenced():
            ort.preload_dlls()


@cache
def _missing_library() -> str:
    """Return why ONNX Runtime's library for CUDA cannot be loaded; empty when it can, or is not here."""
    folder = Path(ort.__file__).parent / "capi"
    # The second has symbols of the first.
    for name in ("shared", "cuda"):
        path = folder / f"libonnxruntime_providers_{name}.so"
        try:
            if path.is_file():
                ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
        except OSError as error:
            return _first_line(error).partition(":")[0] + " is missing"
    return ""


def _log_level(level: int) -> int:
    """Return ONNX Runtime's level of log, with its warnings under ``--debug``."""
    return LOG_WARNINGS if libraries_shown() else level


def _one_conv() -> bytes:
    """Return a graph that needs cuDNN."""
    from onnx import TensorProto, helper

    names = ("x", "w", "y")
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 1, 3, 3]) for n in names]
    weight = helper.make_tensor("w", TensorProto.FLOAT, [1, 1, 3, 3], [1.0] * 9)
    node = helper.make_node("Conv", ["x", "w"], ["y"], pads=[1] * 4)
    graph = helper.make_graph([node], "g", values[:1], values[2:], [weight])
    opsets = [helper.make_opsetid("", 17)]
    return bytes(helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString())


def hidden_runtime() -> bool:
    """Whether the package for the CPU hides the one for CUDA: both write into one folder."""
    here = CUDA_PROVIDER in ort.get_available_providers()
    return not here and all(_installed(name) for name in RUNTIME_PACKAGES)


def _runtime_hint() -> str:
    here = CUDA_PROVIDER in ort.get_available_providers()
    return NO_LIBRARIES if here else f"Run: {INSTALL_RUNTIME}"


def _installed(package: str) -> bool:
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False


def _first_line(error: Any) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
