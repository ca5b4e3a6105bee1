"""An engine called without torch, from NumPy arrays in GPU buffers that stay bound.

In: the library, the GPU (``device.cuda``), an engine file, arrays by input name. Out: the output
and each call's time. Unproven: written after the documented API, without a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mpq_deploy.device.context import load_engine, open_context, refuse_other_gpu
from mpq_deploy.device.cuda import Cuda
from mpq_deploy.device.lora_inputs import is_slot
from mpq_deploy.errors import EngineError

Array = np.ndarray[Any, np.dtype[Any]]


class EngineRunner:
    """One engine. ``graphs``: launch calls as a CUDA graph, by the library or captured here."""

    def __init__(self, trt: Any, cuda: Cuda, path: Path, logger: Any, graphs: bool = False) -> None:
        self._trt, self._cuda = trt, cuda
        refuse_other_gpu(path, cuda.compute_capability())
        self.opened = open_context(trt, load_engine(trt, logger, path), path, graphs)
        self._capture = graphs and not self.opened.builtin_graphs
        self._graph: Any = None
        self._host: dict[str, Array] = {}
        self._place: dict[str, int] = {}
        self._sizes: dict[str, int] = {}

    def tensors(self) -> tuple[list[str], list[str]]:
        """Names of the inputs and of the outputs."""
        engine = self.opened.engine
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        inputs = [
            name for name in names if engine.get_tensor_mode(name) == self._trt.TensorIOMode.INPUT
        ]
        return inputs, [name for name in names if name not in inputs]

    def dtype(self, name: str) -> np.dtype[Any]:
        """NumPy's type of a tensor."""
        kind: np.dtype[Any] = np.dtype(self._trt.nptype(self.opened.engine.get_tensor_dtype(name)))
        return kind

    def usual_shape(self, name: str) -> tuple[int, ...]:
        """The shape that the engine was optimized for."""
        engine = self.opened.engine
        shape = tuple(engine.get_tensor_shape(name))
        return tuple(engine.get_tensor_profile_shape(name, 0)[1]) if -1 in shape else shape

    def bind(self, feeds: Mapping[str, Array]) -> None:
        """Copy the inputs to the GPU and bind every tensor; EngineError for a wrong type or shape.

        Slots for LoRAs stay as they are where none is given: zero at first.
        """
        context, cuda = self.opened.context, self._cuda
        self._graph = None
        held = {*feeds, *self._place}
        empty = {
            name: np.zeros(self.usual_shape(name), self.dtype(name))
            for name in self.tensors()[0]
            if is_slot(name) and name not in held
        }
        for name, values in {**empty, **feeds}.items():
            dtype = self.dtype(name)
            if values.dtype != dtype:
                raise EngineError(f"The engine takes '{name}' as {dtype}, not {values.dtype}.")
            if not context.set_input_shape(name, values.shape):
                raise EngineError(f"The engine does not take {name} of shape {values.shape}.")
            cuda.to_device(self._address(name, values.nbytes), np.ascontiguousarray(values))
        for name in self.tensors()[1]:
            self._host[name] = np.empty(tuple(context.get_tensor_shape(name)), self.dtype(name))
            self._address(name, self._host[name].nbytes)
        self._enqueue()
        cuda.synchronize()
        if self._capture:
            # The call before has settled the shapes, as TensorRT asks for before a capture.
            self._graph = cuda.capture(self._enqueue)

    def call(self) -> None:
        """Run once and wait."""
        self._launch()
        self._cuda.synchronize()

    def timed(self) -> float:
        """Run once; return milliseconds on the GPU."""
        start = self._cuda.event()
        self._launch()
        end = self._cuda.event()
        self._cuda.synchronize()
        return self._cuda.milliseconds(start, end)

    def output(self, name: str) -> Array:
        """Copy an output of the last call."""
        host = self._host[name]
        self._cuda.to_host(host, self._place[name])
        copied: Array = host.copy()
        return copied

    def close(self) -> None:
        """Free the buffers, the context and the engine; nothing can be called afterwards."""
        for address in self._place.values():
            self._cuda.free(address)
        self._place, self._sizes, self._graph = {}, {}, None
        self.opened.context = self.opened.engine = None

    def _address(self, name: str, size: int) -> int:
        if self._sizes.get(name, -1) < size:
            if name in self._place:
                self._cuda.free(self._place[name])
            self._place[name], self._sizes[name] = self._cuda.allocate(size), size
        self.opened.context.set_tensor_address(name, self._place[name])
        return self._place[name]

    def _launch(self) -> None:
        if self._graph is None:
            self._enqueue()
        else:
            self._cuda.launch(self._graph)

    def _enqueue(self) -> None:
        if not self.opened.context.execute_async_v3(self._cuda.stream):
            raise EngineError("The engine could not be started.")
