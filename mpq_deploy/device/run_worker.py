"""The child process that runs one engine: ``python -m mpq_deploy.device.run_worker job.json``.

In: a job (module, engine, reference file, cases, calls). Out: each case's outputs as npz, and JSON
with latencies and memory. A crash here becomes the parent's error message. Unproven: written after
TensorRT's documented Python API, without a GPU.
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
from mpq_deploy.device.engine_runner import EngineRunner
from mpq_deploy.engine.build_worker import make_logger
from mpq_deploy.errors import EngineError
from mpq_deploy.system.array_file import read_arrays
from mpq_deploy.system.children import orders_from_parent
from mpq_deploy.system.inputs import read_json_object
from mpq_deploy.system.typed import typed

WARM_UP = 10


@dataclass(frozen=True)
class RunJob:
    """Paths are absolute; ``calls`` are timed after ``WARM_UP`` others, on the last case."""

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
        path.write_text(json.dumps(asdict(self), indent=1, sort_keys=True) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> RunJob:
        """Read what ``save`` wrote."""
        return typed(cls, read_json_object(path))


def run(job: RunJob, trt: Any, cuda: Cuda, logger: Any) -> dict[str, Any]:
    """Run every case, time the last one; return what ``result`` is to hold."""
    before = cuda.free_bytes()
    runner = EngineRunner(trt, cuda, Path(job.engine), logger)
    outputs: dict[str, Any] = {}
    timed: list[float] = []
    references = read_arrays(Path(job.references))
    for number, case in enumerate(job.cases):
        runner.bind(
            {name: np.ascontiguousarray(references[f"{case}/{name}"]) for name in job.inputs}
        )
        runner.call()
        if number == len(job.cases) - 1:
            timed = _timed(runner, job.calls)
        outputs[f"{case}/{job.output}"] = runner.output(job.output).astype(np.float32)
    np.savez(job.outputs, **outputs)
    # What it compiled for this GPU is there at the next start.
    runner.opened.keep_cache()
    return {
        "version": trt.__version__,
        "milliseconds": timed,
        "memory_bytes": max(before - cuda.free_bytes(), 0),
        "gpu": cuda.name(),
        "compute_capability": cuda.compute_capability(),
    }


def _timed(runner: EngineRunner, calls: int) -> list[float]:
    """Milliseconds of each call on the GPU, warm-up apart."""
    for _ in range(WARM_UP):
        runner.call()
    return [runner.timed() for _ in range(calls)]


def main(arguments: list[str]) -> int:
    """Run the job named on the command line; return the exit code."""
    orders_from_parent()
    job = RunJob.load(Path(arguments[0]))
    with Path(job.log).open("w", encoding="utf-8") as stream:
        try:
            trt = importlib.import_module(job.module)
            result = run(job, trt, Cuda(), make_logger(trt, stream, [], []))
        except EngineError as error:
            result = {"error": str(error)}
    Path(job.result).write_text(
        json.dumps(result, indent=1, sort_keys=True) + "\n", encoding="utf-8"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
