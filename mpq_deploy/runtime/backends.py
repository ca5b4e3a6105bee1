"""What runs a denoiser on torch tensors without copies: ONNX Runtime through I/O binding, or a TensorRT engine.

A backend gets every input by name, a contiguous torch tensor of the declared type on its device, and returns the
output as a tensor there.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from mpq_deploy.denoisers.spec import DenoiserSpec
from mpq_deploy.errors import EngineError, MissingDependencyError, ModelError
from mpq_deploy.runtime.ort import ORT_ERRORS, OrtDenoiser

RUNTIME_CACHE = "model.runtime-cache"
DTYPES = {"FLOAT": torch.float32, "HALF": torch.float16, "INT64": torch.int64, "INT32": torch.int32, "BOOL": torch.bool}


class Backend(Protocol):
    """Runs the denoiser."""

    name: str
    device: torch.device

    def __call__(self, feeds: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the output for inputs that lie contiguous on ``device``, in their declared types."""


class OrtBackend:
    """The denoiser in ONNX Runtime, on ``device`` (cpu, or cuda where onnxruntime-gpu is installed)."""

    name = "onnxruntime"

    def __init__(self, model: Path, spec: DenoiserSpec, device: torch.device, threads: int = 0) -> None:
        self.device = device
        cuda = device.type == "cuda"
        provider = "CUDAExecutionProvider" if cuda else "CPUExecutionProvider"
        # Integer kernels of some CPUs saturate, which no target does: there Q/DQ pairs stay as written.
        self._session = OrtDenoiser(model, spec, threads, [provider], fake_quant_only=not cuda).session
        self._output = next(value for value in self._session.get_outputs() if value.name == spec.output)
        self._sample = spec.sample.name

    def __call__(self, feeds: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """See ``Backend``. Raises ModelError when ONNX Runtime refuses the inputs."""
        binding = self._session.io_binding()
        place = {"device_type": self.device.type, "device_id": self.device.index or 0}
        for name, tensor in feeds.items():
            kind = np.dtype(str(tensor.dtype).removeprefix("torch."))
            binding.bind_input(
                name, **place, element_type=kind, shape=tuple(tensor.shape), buffer_ptr=tensor.data_ptr()
            )
        shape = [len(feeds[self._sample]) if i == 0 else n for i, n in enumerate(self._output.shape)]
        if all(isinstance(n, int) for n in shape):
            kind = torch.float16 if "float16" in self._output.type else torch.float32
            output = torch.empty(shape, dtype=kind, device=self.device)
            numpy_kind = np.dtype(str(kind).removeprefix("torch."))
            binding.bind_output(
                self._output.name, **place, element_type=numpy_kind, shape=shape, buffer_ptr=output.data_ptr()
            )
        else:
            output = None
            binding.bind_output(self._output.name, **place)
        try:
            self._session.run_with_iobinding(binding)
        except ORT_ERRORS as error:
            shapes = {name: tuple(tensor.shape) for name, tensor in feeds.items()}
            raise ModelError(f"ONNX Runtime failed on inputs of shapes {shapes}: {error}") from error
        return output if output is not None else torch.from_numpy(binding.copy_outputs_to_cpu()[0]).to(self.device)


class EngineBackend:
    """A TensorRT or TensorRT-RTX engine on a CUDA device. ``library``: ``tensorrt_rtx`` or ``tensorrt``.

    TensorRT-RTX finishes an engine on the GPU when it is first run; what it compiled is kept in ``RUNTIME_CACHE``
    beside the engine, and CUDA graphs are used where the library offers them. Batches above the engine's largest are
    run in parts. Nothing here has run on a GPU yet (docs/devices.md).
    """

    def __init__(self, path: Path, spec: DenoiserSpec, device: torch.device, library: str) -> None:
        try:
            self._trt: Any = importlib.import_module(library)
        except ImportError as error:
            raise MissingDependencyError(library.replace("_", "-"), "rtx", f"Running {path.name}") from error
        self.name, self.device, self._output, self._path = library, device, spec.output, path
        runtime = self._trt.Runtime(self._trt.Logger(self._trt.Logger.WARNING))
        self._engine = runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            raise EngineError(
                f"{library} {self._trt.__version__} cannot load {path}.",
                "Engines run on the GPUs and the version they were built for: build it again here.",
            )
        self._sample = spec.sample.name
        self._largest = int(self._engine.get_tensor_profile_shape(self._sample, 0)[2][0])
        self._cache: Any = None
        self._context = self._new_context()

    def _new_context(self) -> Any:
        if not hasattr(self._engine, "create_runtime_config"):
            return self._engine.create_execution_context()
        config = self._engine.create_runtime_config()
        if hasattr(config, "create_runtime_cache"):
            self._cache = config.create_runtime_cache()
            kept = self._path.with_name(RUNTIME_CACHE)
            if kept.is_file():
                # A cache of another GPU or version is refused by the library, and made anew.
                self._cache.deserialize(kept.read_bytes())
            config.set_runtime_cache(self._cache)
        if hasattr(self._trt, "CudaGraphStrategy"):
            config.cuda_graph_strategy = self._trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        return self._engine.create_execution_context(config)

    def __call__(self, feeds: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """See ``Backend``. Raises EngineError when the engine refuses the shapes or fails."""
        count = len(feeds[self._sample])
        parts = []
        for start in range(0, count, self._largest):
            stop = min(start + self._largest, count)
            part = {n: t[start:stop] if t.ndim and len(t) == count else t for n, t in feeds.items()}
            parts.append(self._run(part))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _run(self, feeds: Mapping[str, torch.Tensor]) -> torch.Tensor:
        for name, tensor in feeds.items():
            if not self._context.set_input_shape(name, tuple(tensor.shape)):
                raise EngineError(f"The engine does not take {name} of shape {tuple(tensor.shape)}.")
            self._context.set_tensor_address(name, tensor.data_ptr())
        kind = DTYPES[self._engine.get_tensor_dtype(self._output).name]
        output = torch.empty(tuple(self._context.get_tensor_shape(self._output)), dtype=kind, device=self.device)
        self._context.set_tensor_address(self._output, output.data_ptr())
        stream = torch.cuda.current_stream(self.device)
        if not self._context.execute_async_v3(stream.cuda_stream):
            raise EngineError("The engine failed.", "Its log above says why.")
        stream.synchronize()
        return output

    def keep_cache(self) -> None:
        """Write what the library compiled for this GPU beside the engine, for the next start."""
        if self._cache is not None:
            self._path.with_name(RUNTIME_CACHE).write_bytes(bytes(self._cache.serialize()))
