"""Run a denoiser on torch tensors without copies, by ONNX Runtime or a TensorRT engine.

A backend gets every input by name, a contiguous torch tensor of the declared type on its device,
and returns the output as a tensor there.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from mpq_deploy.device.context import RUNTIME_CACHE, load_engine, open_context, refuse_other_gpu
from mpq_deploy.device.lora_inputs import is_slot, weight_norms
from mpq_deploy.errors import EngineError, MissingDependencyError, ModelError
from mpq_deploy.models.spec import Array, DenoiserSpec
from mpq_deploy.runtime.ort import RUN_ERRORS, OrtDenoiser
from mpq_deploy.system.compute import CUDA, Compute

__all__ = ["RUNTIME_CACHE", "Backend", "EngineBackend", "OrtBackend"]

DTYPES = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "INT64": torch.int64,
    "INT32": torch.int32,
    "BOOL": torch.bool,
}


class Backend(Protocol):
    """Runs the denoiser."""

    name: str
    device: torch.device

    @property
    def slots(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the slots for LoRAs by name; they are empty until they are filled."""

    @property
    def weight_norms(self) -> dict[str, float]:
        """Norms of the layers with slots where a LoRA can be clipped (``device.lora_inputs``)."""

    def fill(self, slots: Mapping[str, Array]) -> None:
        """Take the factors of LoRAs, FP16, one for each slot, for all calls from now on."""

    def __call__(self, feeds: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the output for inputs contiguous on ``device``, in their declared types."""


class OrtBackend:
    """The denoiser in ONNX Runtime on ``device``: cpu, or cuda with onnxruntime-gpu."""

    name = "onnxruntime"

    def __init__(
        self, model: Path, spec: DenoiserSpec, device: torch.device, threads: int = 0
    ) -> None:
        self.device = device
        place = Compute((device.index or 0) if device.type == CUDA else None)
        # Integer kernels of some CPUs saturate, unlike any target's: Q/DQ pairs stay.
        opened = OrtDenoiser(model, spec, threads, place.providers, fake_quant_only=True)
        self._session = opened.session
        self.fill(opened.slots)
        self._output = next(
            value for value in self._session.get_outputs() if value.name == spec.output
        )
        self._sample = spec.sample.name

    @property
    def slots(self) -> dict[str, tuple[int, ...]]:
        """See ``Backend``."""
        return {name: tuple(tensor.shape) for name, tensor in self._slots.items()}

    @property
    def weight_norms(self) -> dict[str, float]:
        """See ``Backend``."""
        return weight_norms(self._session.get_modelmeta().custom_metadata_map)

    def fill(self, slots: Mapping[str, Array]) -> None:
        """See ``Backend``."""
        self._slots = {n: torch.from_numpy(v).to(self.device) for n, v in slots.items()}

    def __call__(self, feeds: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """See ``Backend``. Raises ModelError when ONNX Runtime refuses the inputs."""
        binding = self._session.io_binding()
        place = {"device_type": self.device.type, "device_id": self.device.index or 0}
        for name, tensor in {**feeds, **self._slots}.items():
            kind = np.dtype(str(tensor.dtype).removeprefix("torch."))
            binding.bind_input(
                name,
                **place,
                element_type=kind,
                shape=tuple(tensor.shape),
                buffer_ptr=tensor.data_ptr(),
            )
        shape = [
            len(feeds[self._sample]) if i == 0 else n for i, n in enumerate(self._output.shape)
        ]
        if all(isinstance(n, int) for n in shape):
            kind = torch.float16 if "float16" in self._output.type else torch.float32
            output = torch.empty(shape, dtype=kind, device=self.device)
            numpy_kind = np.dtype(str(kind).removeprefix("torch."))
            binding.bind_output(
                self._output.name,
                **place,
                element_type=numpy_kind,
                shape=shape,
                buffer_ptr=output.data_ptr(),
            )
        else:
            output = None
            binding.bind_output(self._output.name, **place)
        try:
            if self.device.type == CUDA:
                # The session computes on a stream of its own.
                torch.cuda.current_stream(self.device).synchronize()
            self._session.run_with_iobinding(binding)
            binding.synchronize_outputs()
        except RUN_ERRORS as error:
            shapes = {name: tuple(tensor.shape) for name, tensor in feeds.items()}
            reason = " ".join(str(error).split())
            raise ModelError(
                f"ONNX Runtime failed on inputs of shapes {shapes}: {reason}"
            ) from error
        return (
            output
            if output is not None
            else torch.from_numpy(binding.copy_outputs_to_cpu()[0]).to(self.device)
        )


class EngineBackend:
    """A TensorRT or TensorRT-RTX engine on CUDA. ``library``: ``tensorrt_rtx`` or ``tensorrt``.

    Tensors lie in buffers that stay bound while the shapes stay; calls are launched as CUDA graphs,
    by TensorRT-RTX itself, or captured here for TensorRT (``graphs`` False: never). TensorRT-RTX
    finishes an engine on the GPU when it is first run; what it compiled is kept in
    ``RUNTIME_CACHE`` beside the engine. Batches above the engine's largest are run in parts.
    Nothing here has run on a GPU yet (docs/devices.md).
    """

    def __init__(
        self,
        path: Path,
        spec: DenoiserSpec,
        device: torch.device,
        library: str,
        graphs: bool = True,
    ) -> None:
        try:
            trt: Any = importlib.import_module(library)
        except ImportError as error:
            raise MissingDependencyError(
                library.replace("_", "-"), "rtx", f"Running {path.name}"
            ) from error
        self.name, self.device, self._output = library, device, spec.output
        refuse_other_gpu(path, "SM{}{}".format(*torch.cuda.get_device_capability(device)))
        engine = load_engine(trt, trt.Logger(trt.Logger.WARNING), path)
        self._opened = open_context(trt, engine, path, graphs)
        self._capture = graphs and not self._opened.builtin_graphs
        self._sample = spec.sample.name
        self._largest = int(engine.get_tensor_profile_shape(self._sample, 0)[2][0])
        # Graphs cannot be captured on the default stream.
        self._stream = torch.cuda.Stream(device)
        self._buffers: dict[str, torch.Tensor] = {}
        self._slots = self._empty_slots()
        self._graph: Any = None
        self._seen: set[tuple[tuple[int, ...], ...]] = set()

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
        same = all(
            name in self._buffers and self._buffers[name].shape == t.shape
            for name, t in feeds.items()
        )
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            if not same:
                self._bind(feeds)
            for name, tensor in feeds.items():
                self._buffers[name].copy_(tensor)
            if same and self._capture and self._graph is None:
                # The previous call settled the shapes, as TensorRT asks for before a capture.
                self._graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self._graph, stream=self._stream):
                    self._enqueue()
            if self._graph is None:
                self._enqueue()
            else:
                self._graph.replay()
            # A sampler may keep former outputs, and the buffer is written again by the next call.
            output = self._buffers[self._output].clone()
        self._stream.synchronize()
        shapes = tuple(tuple(tensor.shape) for tensor in feeds.values())
        if shapes not in self._seen:
            self._seen.add(shapes)
            self.keep_cache()
        return output

    def _bind(self, feeds: Mapping[str, torch.Tensor]) -> None:
        """Allocate and bind buffers of the shapes of ``feeds``; drop an older CUDA graph."""
        context, self._graph = self._opened.context, None
        self._buffers = {name: torch.empty_like(tensor) for name, tensor in feeds.items()}
        self._buffers |= self._slots
        for name, tensor in feeds.items():
            if not context.set_input_shape(name, tuple(tensor.shape)):
                raise EngineError(
                    f"The engine does not take {name} of shape {tuple(tensor.shape)}."
                )
        kind = DTYPES[self._opened.engine.get_tensor_dtype(self._output).name]
        shape = tuple(context.get_tensor_shape(self._output))
        self._buffers[self._output] = torch.empty(shape, dtype=kind, device=self.device)
        for name, buffer in self._buffers.items():
            context.set_tensor_address(name, buffer.data_ptr())

    @property
    def slots(self) -> dict[str, tuple[int, ...]]:
        """See ``Backend``."""
        return {name: tuple(tensor.shape) for name, tensor in self._slots.items()}

    @property
    def weight_norms(self) -> dict[str, float]:
        """See ``Backend``: an engine does not say them."""
        return {}

    def fill(self, slots: Mapping[str, Array]) -> None:
        """See ``Backend``: they are copied to where they are bound."""
        for name, values in slots.items():
            self._slots[name].copy_(torch.from_numpy(values))

    def _empty_slots(self) -> dict[str, torch.Tensor]:
        """Zeros for the slots of LoRAs: fused ones are in the weights."""
        engine = self._opened.engine
        names = (engine.get_tensor_name(index) for index in range(engine.num_io_tensors))
        return {
            name: torch.zeros(
                tuple(engine.get_tensor_shape(name)),
                dtype=DTYPES[engine.get_tensor_dtype(name).name],
                device=self.device,
            )
            for name in names
            if is_slot(name)
        }

    def _enqueue(self) -> None:
        if not self._opened.context.execute_async_v3(self._stream.cuda_stream):
            raise EngineError("The engine failed.", "Its log above says why.")

    def keep_cache(self) -> None:
        """Write what the library compiled for this GPU beside the engine."""
        self._opened.keep_cache()
