"""A FAKE of the tensorrt_rtx module, of the CUDA driver, and of the graph calls: it proves nothing about a GPU.

The fake engine computes y = 2 x + t on the memory behind the addresses that it was given, so that it shows whether
buffers, shapes and their order are handled as documented. Its names are checked against the real bindings by a test.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

__name__ = "fake_tensorrt"
__version__ = "1.7"


class TensorIOMode:
    INPUT, OUTPUT = "input", "output"


class CudaGraphStrategy:
    DISABLED, WHOLE_GRAPH_CAPTURE = "disabled", "whole"


class Logger:
    WARNING = 2

    def __init__(self, level: int = 2) -> None:
        self.level = level


class DataType:
    name = "FLOAT"


class IRuntimeCache:
    def __init__(self) -> None:
        self.entries: set[tuple[int, ...]] = set()
        self.resets = 0

    def deserialize(self, blob: bytes) -> bool:
        if not blob.startswith(b"fake:"):
            return False
        self.entries = {tuple(map(int, one.split(b","))) for one in blob[5:].split(b";") if one}
        return True

    def serialize(self) -> bytes:
        return b"fake:" + b";".join(
            ",".join(map(str, one)).encode() for one in sorted(self.entries)
        )

    def reset(self) -> bool:
        self.resets += 1
        return True


class IRuntimeConfig:
    def __init__(self) -> None:
        self.cuda_graph_strategy = CudaGraphStrategy.DISABLED
        self.cache: IRuntimeCache | None = None

    def create_runtime_cache(self) -> IRuntimeCache:
        return IRuntimeCache()

    def set_runtime_cache(self, cache: IRuntimeCache) -> bool:
        self.cache = cache
        return True


class IExecutionContext:
    def __init__(self, config: IRuntimeConfig | None) -> None:
        self.config = config
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.places: dict[str, int] = {}
        self.calls, self.compiled = 0, 0

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = tuple(shape)
        return name != "x" or 1 <= shape[0] <= 4

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self.places[name] = memory
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shapes["x"]

    def execute_async_v3(self, stream_handle: int) -> bool:
        self.calls += 1
        x, y = (self._view(name, self.shapes["x"]) for name in ("x", "y"))
        if (
            self.config
            and self.config.cache is not None
            and self.shapes["x"] not in self.config.cache.entries
        ):
            self.config.cache.entries.add(self.shapes["x"])
            self.compiled += 1
        y[:] = 2 * x + self._view("t", self.shapes["t"]).reshape(-1, 1)
        return True

    def _view(self, name: str, shape: tuple[int, ...]) -> Any:
        kind = ctypes.c_float * int(np.prod(shape))
        return np.frombuffer(kind.from_address(self.places[name]), np.float32).reshape(shape)


class Engine:
    """TensorRT's own, without a runtime configuration."""

    num_io_tensors = 3

    def get_tensor_name(self, index: int) -> str:
        return ("x", "t", "y")[index]

    def get_tensor_mode(self, name: str) -> str:
        return TensorIOMode.OUTPUT if name == "y" else TensorIOMode.INPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        return DataType()

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (-1,) if name == "t" else (-1, 3)

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
        return [(n,) if name == "t" else (n, 3) for n in (1, 2, 4)]

    def create_execution_context(self, config: IRuntimeConfig | None = None) -> IExecutionContext:
        return IExecutionContext(config)


class ICudaEngine(Engine):
    """TensorRT-RTX's."""

    def create_runtime_config(self) -> IRuntimeConfig:
        return IRuntimeConfig()


class Runtime:
    def __init__(self, logger: Any) -> None:
        self.logger = logger

    def deserialize_cuda_engine(self, content: bytes) -> Engine | None:
        return {b"rtx": ICudaEngine(), b"trt": Engine()}.get(content)


def nptype(kind: DataType) -> Any:
    return np.float32


class FakeCuda:
    """Memory of the host in the place of a GPU's; a graph is the work itself."""

    stream = 1

    def __init__(self) -> None:
        self.kept: dict[int, Any] = {}
        self.captured, self.launched = 0, 0

    def name(self) -> str:
        return "FAKE GPU"

    def compute_capability(self) -> str:
        return "SM89"

    def free_bytes(self) -> int:
        return 10**9 - sum(array.nbytes for array in self.kept.values())

    def allocate(self, size: int) -> int:
        array = np.zeros(size, np.uint8)
        self.kept[array.ctypes.data] = array
        return int(array.ctypes.data)

    def free(self, address: int) -> None:
        del self.kept[address]

    def to_device(self, address: int, host: Any) -> None:
        ctypes.memmove(address, host.ctypes.data, host.nbytes)

    def to_host(self, host: Any, address: int) -> None:
        ctypes.memmove(host.ctypes.data, address, host.nbytes)

    def synchronize(self) -> None: ...

    def event(self) -> int:
        return 0

    def milliseconds(self, start: int, end: int) -> float:
        return 1.5

    def capture(self, work: Any) -> Any:
        self.captured += 1
        return work

    def launch(self, graph: Any) -> None:
        self.launched += 1
        graph()
