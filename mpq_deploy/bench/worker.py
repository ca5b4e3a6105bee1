"""The child process that times one subject's calls: ``python -m mpq_deploy.bench.worker``.

In: a ``Subject`` as the first line on stdin, then a number of calls per line, an empty line at
last. Out: a line of JSON for each: what was opened (seconds, shapes, versions), then each call's
milliseconds and the memory taken. Its own process gives each subject its own memory figure.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mpq_deploy.bench.timed_subject import ORT, Subject
from mpq_deploy.errors import MissingDependencyError, MpqError, UsageError
from mpq_deploy.system.children import orders_from_parent
from mpq_deploy.system.libraries import start_lightly
from mpq_deploy.system.memory import peak_rss_bytes
from mpq_deploy.system.stdout import claim_stdout

if TYPE_CHECKING:
    from mpq_deploy.device.cuda import Cuda

SEED = 0
Array = np.ndarray[Any, np.dtype[Any]]


class OrtCall:
    """A graph in ONNX Runtime, its tensors bound: on the GPU they stay there."""

    clock = "wall"

    def __init__(self, subject: Subject) -> None:
        try:
            ort = importlib.import_module("onnxruntime")
            options = importlib.import_module("mpq_deploy.runtime.ort")
        except ImportError as error:
            raise MissingDependencyError(
                "onnxruntime", "torch", f"Timing {subject.file}"
            ) from error
        provider = "CUDAExecutionProvider" if subject.device == "cuda" else "CPUExecutionProvider"
        if provider not in ort.get_available_providers():
            providers = ", ".join(ort.get_available_providers())
            what = f"ONNX Runtime has no {provider} here (it has {providers})."
            raise UsageError(what, "Install onnxruntime-gpu for CUDA.")
        chosen = options.session_options(subject.threads, subject.fake_quant_only)
        # The threads of the subject that waits must not take the cores of the one that is timed.
        chosen.add_session_config_entry("session.force_spinning_stop", "1")
        self._session = options.make_session_with(Path(subject.file), chosen, [provider])
        self.version = str(ort.__version__)
        self._ort, self._device = ort, subject.device
        self._binding: Any = None

    def inputs(self, subject: Subject) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
        """Shape and type of each input; an open first dimension is the batch."""
        entries = {}
        for value in self._session.get_inputs():
            shape = list(value.shape)
            if shape and not isinstance(shape[0], int):
                shape[0] = subject.batch
            shape = list(subject.shapes.get(value.name, shape))
            if not all(isinstance(n, int) for n in shape):
                example = "x".join(str(n) if isinstance(n, int) else "N" for n in shape)
                raise UsageError(
                    f"The input '{value.name}' of {subject.file} has the open shape {value.shape}.",
                    f"Give it: --shape {value.name}:{example}.",
                )
            kind = value.type.removeprefix("tensor(").removesuffix(")")
            dtype = np.dtype({"float": "float32", "double": "float64"}.get(kind, kind))
            entries[value.name] = (tuple(shape), dtype)
        return entries

    def bind(self, feeds: Mapping[str, Array]) -> None:
        """Put the inputs on the device; outputs stay there."""
        self._binding = self._session.io_binding()
        for name, values in feeds.items():
            value = self._ort.OrtValue.ortvalue_from_numpy(values, self._device, 0)
            self._binding.bind_ortvalue_input(name, value)
        for value in self._session.get_outputs():
            self._binding.bind_output(value.name, self._device)

    def milliseconds(self) -> float:
        """Run once, until the output is there."""
        started = time.perf_counter()
        self._session.run_with_iobinding(self._binding)
        self._binding.synchronize_outputs()
        return 1e3 * (time.perf_counter() - started)

    def close(self) -> None:
        """Nothing to keep."""


class EngineCall:
    """A TensorRT engine. Unproven: no GPU was available."""

    clock = "GPU events"

    def __init__(self, subject: Subject) -> None:
        from mpq_deploy.device.cuda import Cuda
        from mpq_deploy.device.engine_runner import EngineRunner

        cuda = Cuda()
        try:
            trt = importlib.import_module(subject.backend)
        except ImportError as error:
            raise MissingDependencyError(
                subject.backend, "rtx", f"Running {subject.file}"
            ) from error
        logger = trt.Logger(trt.Logger.WARNING)
        self._runner = EngineRunner(trt, cuda, Path(subject.file), logger, subject.graphs)
        self.version = str(trt.__version__)

    def inputs(self, subject: Subject) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
        """Shape and type of each input: as the engine was optimized, with the subject's batch."""
        entries = {}
        for name in self._runner.tensors()[0]:
            shape = self._runner.usual_shape(name)
            dynamic = -1 in tuple(self._runner.opened.engine.get_tensor_shape(name))
            shape = (subject.batch, *shape[1:]) if dynamic else shape
            entries[name] = (subject.shapes.get(name, shape), self._runner.dtype(name))
        return entries

    def bind(self, feeds: Mapping[str, Array]) -> None:
        """Copy the inputs to the GPU."""
        self._runner.bind(feeds)

    def milliseconds(self) -> float:
        """Run once; the time on the GPU."""
        return self._runner.timed()

    def close(self) -> None:
        """Keep what was compiled for this GPU."""
        self._runner.opened.keep_cache()


def random_feeds(inputs: Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]]) -> dict[str, Array]:
    """Seeded normal numbers; integers and booleans are 0, which changes no dense network's time."""
    feeds: dict[str, Array] = {}
    for number, (name, (shape, kind)) in enumerate(inputs.items()):
        rng = np.random.default_rng([SEED, number])
        values = rng.standard_normal(shape) if kind.kind == "f" else np.zeros(shape)
        feeds[name] = np.ascontiguousarray(values, dtype=kind).reshape(shape)
    return feeds


def gpu_of(subject: Subject) -> Cuda | None:
    """The GPU whose memory is watched; None for a subject on the CPU."""
    from mpq_deploy.device.cuda import Cuda

    return Cuda() if subject.device == "cuda" else None


def serve(
    subject: Subject, orders: Callable[[], str], answer: Callable[[dict[str, Any]], None]
) -> None:
    """Open the subject, then run as many calls as each order says."""
    interpreter, gpu = peak_rss_bytes(), gpu_of(subject)
    free = gpu.free_bytes() if gpu else 0
    started = time.perf_counter()
    call = OrtCall(subject) if subject.backend == ORT else EngineCall(subject)
    inputs = call.inputs(subject)
    call.bind(random_feeds(inputs))
    answer(
        {
            "load_seconds": time.perf_counter() - started,
            "version": call.version,
            "clock": call.clock,
            "shapes": {name: list(shape) for name, (shape, _) in inputs.items()},
        }
    )
    while order := orders().strip():
        times = [call.milliseconds() for _ in range(int(order))]
        answer(
            {
                "milliseconds": times,
                "peak_rss_bytes": peak_rss_bytes(),
                "interpreter_rss_bytes": interpreter,
                "gpu_bytes": max(free - gpu.free_bytes(), 0) if gpu else None,
            }
        )
    call.close()


def main() -> int:
    """Serve the parent; return the exit code."""
    lines = orders_from_parent(lambda stream: stream.readline())
    claim_stdout()
    start_lightly()

    def order() -> str:
        return lines.get().decode()

    def answer(values: dict[str, Any]) -> None:
        sys.stdout.write(json.dumps(values) + "\n")
        sys.stdout.flush()

    try:
        serve(Subject.from_json(order()), order, answer)
    except MpqError as error:
        answer({"error": error.message, "hint": error.hint})
    return 0


if __name__ == "__main__":
    sys.exit(main())
