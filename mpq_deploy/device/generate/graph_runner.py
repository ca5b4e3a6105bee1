"""A part of a pipeline, opened to be run: in ONNX Runtime on the CPU, or a TensorRT engine.

Arrays in by input name, float32 arrays out by output name. An engine takes a GPU, where none was
at hand: its path is tested with a stand-in for TensorRT alone.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from mpq_deploy.device.generate.generation_folder import Part
from mpq_deploy.device.generate.noise_schedule import Array
from mpq_deploy.errors import EngineError, InputError, MissingDependencyError

ENGINE_SUFFIX = ".engine"


class OpenPart(Protocol):
    """What runs a part."""

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Return every output for one batch."""

    def close(self) -> None:
        """Give its memory back."""


class PartMemoryError(EngineError):
    """A part did not fit into memory."""


def open_part(part: Part, threads: int = 0, slots: Mapping[str, Array] | None = None) -> OpenPart:
    """Open a part by its file's suffix; ``slots``: what its slots hold.

    Raises EngineError or InputError where that fails.
    """
    if part.file.suffix == ENGINE_SUFFIX:
        return EnginePart(part, slots or {})
    return OrtPart(part, threads, slots or {})


class OrtPart:
    """An ONNX graph in ONNX Runtime on the CPU."""

    def __init__(self, part: Part, threads: int, slots: Mapping[str, Array]) -> None:
        try:
            import onnxruntime as ort
        except ImportError as error:
            purpose = f"{part.file.name} is an ONNX graph, which"
            raise MissingDependencyError("onnxruntime", "generate", purpose) from error
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        # Weights of 4 or 8 bits must not make it round activations, too.
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
        # Pairs as they are written, as reports compare them: some CPUs' integer kernels saturate.
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        # Its arena keeps the largest call's memory; the pattern of each shape adds to that.
        options.enable_cpu_mem_arena = False
        options.enable_mem_pattern = False
        self._part, self._slots = part, slots
        try:
            providers = ["CPUExecutionProvider"]
            self._session: Any = ort.InferenceSession(str(part.file), options, providers)
        except Exception as error:
            raise _failure(part, error, "cannot be loaded") from error
        found = {one.name for one in self._session.get_inputs()}
        said = {*part.inputs, *part.slots}
        if found != said:
            what = f"{part.file} takes {', '.join(sorted(found))}"
            raise InputError(f"{what}, not {', '.join(sorted(said))}.", "Write it again.")

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:  # noqa: D102
        given = {
            name: np.ascontiguousarray(feeds[name], np.dtype(one.dtype))
            for name, one in self._part.inputs.items()
        }
        names = list(self._part.outputs)
        try:
            outputs = self._session.run(names, {**self._slots, **given})
        except Exception as error:
            raise _failure(self._part, error, "failed") from error
        return {name: np.asarray(one, np.float32) for name, one in zip(names, outputs)}

    def close(self) -> None:  # noqa: D102
        self._session = None


def _failure(part: Part, error: Exception, what: str) -> EngineError:
    """ONNX Runtime's errors share no base class; those for memory say so."""
    words = " ".join(str(error).split())[:300]
    short = isinstance(error, MemoryError) or "allocate" in words.lower()
    return (PartMemoryError if short else EngineError)(f"The {part.name} {what}: {words}")


class EnginePart:
    """A TensorRT engine on the first GPU."""

    def __init__(self, part: Part, slots: Mapping[str, Array]) -> None:
        from mpq_deploy.device.cuda import Cuda
        from mpq_deploy.device.engine_runner import EngineRunner

        names = [one for one in ("tensorrt_rtx", "tensorrt") if importlib.util.find_spec(one)]
        if not names:
            raise MissingDependencyError("tensorrt", "tensorrt", f"The engine of {part.name}")
        trt = importlib.import_module(names[0])
        self._part, self._slots = part, slots
        self._runner = EngineRunner(trt, Cuda(), part.file, trt.Logger(trt.Logger.WARNING))
        found = self._runner.tensors()[0]
        if set(found) != set(part.inputs):
            what = f"{part.file} takes {', '.join(sorted(found))}"
            raise InputError(f"{what}, not {', '.join(sorted(part.inputs))}.", "Build it again.")

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:  # noqa: D102
        dtype = self._runner.dtype
        given = {name: np.ascontiguousarray(feeds[name], dtype(name)) for name in self._part.inputs}
        # Slots stay where the first call has copied them to.
        self._runner.bind({**self._slots, **given})
        self._slots = {}
        return {name: np.float32(self._runner.output(name)) for name in self._part.outputs}

    def close(self) -> None:  # noqa: D102
        self._runner.close()


def run_in_rows(part: Part, opened: OpenPart, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """Run a batch of any size in as many calls as the part's own batch needs.

    Inputs with a batch axis have equally many rows; the last rows are repeated where the graph's
    batch is fixed, and cut off again.
    """
    batched = {name for name in part.inputs if feeds[name].ndim}
    rows = max(len(feeds[name]) for name in batched)
    size = part.rows or min(part.largest_batch or rows, rows)
    pieces: dict[str, list[Array]] = {}
    for start in range(0, rows, size):
        place = np.minimum(np.arange(start, start + size), rows - 1)
        if part.rows is None:
            place = place[: rows - start]
        given = {name: feeds[name][place] if name in batched else feeds[name] for name in feeds}
        for name, values in opened.run(given).items():
            pieces.setdefault(name, []).append(values[: rows - start])
    return {name: np.concatenate(values) for name, values in pieces.items()}
