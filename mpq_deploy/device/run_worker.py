"""The child process that runs one engine: ``python -m mpq_deploy.device.run_worker job.json``.

In: a job (module, engine, reference file, cases, calls). Out: the outputs of each case as npz, and a JSON file with the
latency of each call and the memory taken. A crash here is an error message of the parent, never a dead installer.

Unproven here: written against TensorRT's documented Python API; no GPU was at hand.
"""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mpq_deploy.device.cuda import Cuda
from mpq_deploy.engine.build_worker import make_logger
from mpq_deploy.errors import EngineError

WARM_UP = 10


@dataclass(frozen=True)
class RunJob:
    """What to run. Paths are absolute; ``calls`` are timed after ``WARM_UP`` others, on the last case."""

    module: str
    engine: str
    references: str
    cases: tuple[str, ...]
    inputs: tuple[str, ...]
    output: str
    calls: int
    outputs: str
    result: str
    log: str

    def save(self, path: Path) -> None:
        """Write the job as JSON."""
        path.write_text(json.dumps(asdict(self), indent=1, sort_keys=True) + "\n")

    @classmethod
    def load(cls, path: Path) -> RunJob:
        """Read what ``save`` wrote."""
        values = json.loads(path.read_text())
        return cls(**{**values, "cases": tuple(values["cases"]), "inputs": tuple(values["inputs"])})


def run(job: RunJob, trt: Any, cuda: Cuda, logger: Any) -> dict[str, Any]:
    """Run every case, time the last one; return what ``result`` is to hold."""
    before = cuda.free_bytes()
    engine = trt.Runtime(logger).deserialize_cuda_engine(Path(job.engine).read_bytes())
    if engine is None:
        raise EngineError("The engine does not load on this machine's GPU.", f"Log: {job.log}")
    context = engine.create_execution_context()
    outputs = {}
    timed: list[float] = []
    with np.load(job.references, allow_pickle=False) as references:
        for number, case in enumerate(job.cases):
            feeds = {name: np.ascontiguousarray(references[f"{case}/{name}"]) for name in job.inputs}
            host, address = _bind(job, trt, cuda, engine, context, feeds)
            _execute(context, cuda)
            if number == len(job.cases) - 1:
                timed = _timed(context, cuda, job.calls)
            cuda.to_host(host, address)
            outputs[f"{case}/{job.output}"] = host.astype(np.float32)
    np.savez(job.outputs, **outputs)
    return {
        "version": trt.__version__,
        "milliseconds": timed,
        "memory_bytes": max(before - cuda.free_bytes(), 0),
        "gpu": cuda.name(),
        "compute_capability": cuda.compute_capability(),
    }


def _bind(job: RunJob, trt: Any, cuda: Cuda, engine: Any, context: Any, feeds: dict[str, Any]) -> tuple[Any, int]:
    """Copy the inputs to the GPU; return an array for the output and its address there."""
    for name, values in feeds.items():
        wanted = np.dtype(trt.nptype(engine.get_tensor_dtype(name)))
        if values.dtype != wanted:
            raise EngineError(f"The engine takes '{name}' as {wanted}, the package holds {values.dtype}.")
        context.set_input_shape(name, values.shape)
        address = cuda.allocate(values.nbytes)
        cuda.to_device(address, values)
        context.set_tensor_address(name, address)
    shape = tuple(context.get_tensor_shape(job.output))
    host = np.empty(shape, trt.nptype(engine.get_tensor_dtype(job.output)))
    address = cuda.allocate(host.nbytes)
    context.set_tensor_address(job.output, address)
    return host, address


def _execute(context: Any, cuda: Cuda) -> None:
    if not context.execute_async_v3(cuda.stream):
        raise EngineError("The engine could not be started.")
    cuda.synchronize()


def _timed(context: Any, cuda: Cuda, calls: int) -> list[float]:
    """Milliseconds of each call on the GPU, warm-up apart."""
    for _ in range(WARM_UP):
        _execute(context, cuda)
    times = []
    for _ in range(calls):
        start = cuda.event()
        context.execute_async_v3(cuda.stream)
        end = cuda.event()
        cuda.synchronize()
        times.append(cuda.milliseconds(start, end))
    return times


def main(arguments: list[str]) -> int:
    """Run the job named on the command line; return the exit code."""
    job = RunJob.load(Path(arguments[0]))
    with Path(job.log).open("w") as stream:
        try:
            trt = importlib.import_module(job.module)
            result = run(job, trt, Cuda(), make_logger(trt, stream, []))
        except EngineError as error:
            result = {"error": str(error)}
    Path(job.result).write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
