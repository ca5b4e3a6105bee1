"""The few calls of the CUDA driver that running an engine needs, through ctypes.

Unproven: written after the documented driver API, without a GPU.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

from mpq_deploy.errors import EngineError

LIBRARY = "libcuda.so.1"
MAJOR, MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
NAME_BYTES = 256
NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE
CAPTURE_THREAD_LOCAL = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL


def why_no_gpu() -> str:
    """Return why no engine can run here; empty when one can."""
    try:
        Cuda()
    except EngineError as error:
        return error.message.rstrip(".")
    return ""


def count_gpus() -> int:
    """Return how many GPUs the driver shows, opening none. Raises EngineError where there is no driver."""
    driver, count = load_driver(), ctypes.c_int()
    for name, arguments in (("cuInit", (0,)), ("cuDeviceGetCount", (ctypes.byref(count),))):
        code = getattr(driver, name)(*arguments)
        if code == NO_DEVICE:
            return 0
        if code != 0:
            raise EngineError(f"The CUDA driver's {name} failed with code {code}.")
    return count.value


def load_driver() -> Any:
    """Return the driver's library. Raises EngineError where it is not here."""
    try:
        return ctypes.CDLL(LIBRARY)
    except OSError as error:
        raise EngineError(f"No NVIDIA driver was found ({LIBRARY} cannot be loaded).") from error


class Cuda:
    """The first GPU: memory, a stream, timing events. Raises EngineError where there is none."""

    def __init__(self) -> None:
        self._driver = load_driver()
        self._call("cuInit", 0)
        device, context = ctypes.c_int(), ctypes.c_void_p()
        self._call("cuDeviceGet", ctypes.byref(device), 0)
        self._device = device
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self._call("cuCtxSetCurrent", context)
        stream = ctypes.c_void_p()
        self._call("cuStreamCreate", ctypes.byref(stream), 0)
        self.stream = int(stream.value or 0)

    def name(self) -> str:
        """The GPU's name."""
        text = ctypes.create_string_buffer(NAME_BYTES)
        self._call("cuDeviceGetName", text, NAME_BYTES, self._device)
        return text.value.decode()

    def compute_capability(self) -> str:
        """Such as SM87."""
        parts = []
        for attribute in (MAJOR, MINOR):
            value = ctypes.c_int()
            self._call("cuDeviceGetAttribute", ctypes.byref(value), attribute, self._device)
            parts.append(value.value)
        return f"SM{parts[0]}{parts[1]}"

    def free_bytes(self) -> int:
        """Free memory of the GPU (on a Jetson: of the board)."""
        return self._memory()[0]

    def total_bytes(self) -> int:
        """All memory of the GPU (on a Jetson: of the board)."""
        return self._memory()[1]

    def allocate(self, size: int) -> int:
        """Return the address of ``size`` bytes, which live until ``free``."""
        pointer = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(max(size, 1)))
        return pointer.value

    def free(self, address: int) -> None:
        """Give back what ``allocate`` returned."""
        self._call("cuMemFree_v2", ctypes.c_uint64(address))

    def to_device(self, address: int, host: Any) -> None:
        """Copy a contiguous array."""
        source = ctypes.c_void_p(host.ctypes.data)
        self._call(
            "cuMemcpyHtoD_v2", ctypes.c_uint64(address), source, ctypes.c_size_t(host.nbytes)
        )

    def to_host(self, host: Any, address: int) -> None:
        """Copy into a contiguous array."""
        target = ctypes.c_void_p(host.ctypes.data)
        self._call(
            "cuMemcpyDtoH_v2", target, ctypes.c_uint64(address), ctypes.c_size_t(host.nbytes)
        )

    def synchronize(self) -> None:
        """Wait for the stream."""
        self._call("cuStreamSynchronize", ctypes.c_void_p(self.stream))

    def event(self) -> ctypes.c_void_p:
        """Return a new event, recorded now."""
        event = ctypes.c_void_p()
        self._call("cuEventCreate", ctypes.byref(event), 0)
        self._call("cuEventRecord", event, ctypes.c_void_p(self.stream))
        return event

    def milliseconds(self, start: ctypes.c_void_p, end: ctypes.c_void_p) -> float:
        """Time between two events that have happened."""
        value = ctypes.c_float()
        self._call("cuEventElapsedTime", ctypes.byref(value), start, end)
        return value.value

    def capture(self, work: Callable[[], None]) -> ctypes.c_void_p:
        """Record what ``work`` puts into the stream as a CUDA graph; return what ``launch`` takes."""
        graph, executable = ctypes.c_void_p(), ctypes.c_void_p()
        stream = ctypes.c_void_p(self.stream)
        self._call("cuStreamBeginCapture_v2", stream, CAPTURE_THREAD_LOCAL)
        try:
            work()
        finally:
            self._call("cuStreamEndCapture", stream, ctypes.byref(graph))
        self._call(
            "cuGraphInstantiateWithFlags", ctypes.byref(executable), graph, ctypes.c_ulonglong(0)
        )
        return executable

    def launch(self, graph: ctypes.c_void_p) -> None:
        """Put a recorded graph into the stream."""
        self._call("cuGraphLaunch", graph, ctypes.c_void_p(self.stream))

    def _memory(self) -> tuple[int, int]:
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self._call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value, total.value

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._driver, name)(*arguments)
        if code != 0:
            raise EngineError(f"The CUDA driver's {name} failed with code {code}.")
