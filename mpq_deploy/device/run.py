"""Run a package's reference inputs through its engine, by TensorRT's Python package or trtexec.

In: the engine and the references. Out: a ``Run`` with each case's outputs and the latencies, or why
nothing ran. Unproven: no GPU was at hand; trtexec's part was tested with a mock.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mpq_deploy.device.cuda import why_no_gpu
from mpq_deploy.device.manifest import Reference
from mpq_deploy.device.run_worker import RunJob
from mpq_deploy.engine.trtexec import find_trtexec
from mpq_deploy.errors import EngineError
from mpq_deploy.system.children import run_child

CALLS = 100
Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Run:
    """``outputs`` by case; ``milliseconds`` of each timed call; ``why`` nothing ran (or empty)."""

    outputs: Mapping[str, Array] = field(default_factory=dict)
    milliseconds: tuple[float, ...] = ()
    memory_bytes: int | None = None
    gpu: str = ""
    compute_capability: str = ""
    why: str = ""


def run_engine(builder: str, engine: Path, folder: Path, reference: Reference) -> Run:
    """Run every case of ``reference`` and time the last. Raises EngineError when a run fails."""
    if builder == "trtexec":
        return _with_trtexec(engine, folder, reference)
    why = why_no_gpu()
    if why:
        return Run(why=why)
    return _in_child(builder, engine, folder, reference)


def _in_child(module: str, engine: Path, folder: Path, reference: Reference) -> Run:
    files = {name: str((folder / file).resolve()) for name, file in _FILES.items()}
    job = RunJob(
        module=module,
        engine=str(engine.resolve()),
        references=str((folder / reference.file).resolve()),
        cases=reference.cases,
        inputs=reference.inputs,
        output=reference.output,
        calls=CALLS,
        **files,
    )
    job.save(folder / "run.job.json")
    done = run_child("mpq_deploy.device.run_worker", str(folder / "run.job.json"))
    if done.returncode:
        words = " ".join(done.stderr.split())[-400:]
        raise EngineError(
            f"The engine's process ended with code {done.returncode}: {words}",
            f"Log: {files['log']}",
        )
    result = json.loads(Path(files["result"]).read_text(encoding="utf-8"))
    if "error" in result:
        raise EngineError(str(result["error"]), f"Log: {files['log']}")
    with np.load(files["outputs"], allow_pickle=False) as data:
        outputs = {case: data[f"{case}/{reference.output}"] for case in reference.cases}
    keys = ("memory_bytes", "gpu", "compute_capability")
    return Run(outputs, tuple(result["milliseconds"]), **{key: result[key] for key in keys})


_FILES = {"outputs": "run.outputs.npz", "result": "run.result.json", "log": "run.log"}


def _with_trtexec(engine: Path, folder: Path, reference: Reference) -> Run:
    outputs: dict[str, Array] = {}
    times: tuple[float, ...] = ()
    log = ""
    for case in reference.cases:
        with np.load(folder / reference.file, allow_pickle=False) as data:
            feeds = {
                name: np.ascontiguousarray(data[f"{case}/{name}"]) for name in reference.inputs
            }
            shape = data[f"{case}/{reference.output}"].shape
        exported, timed = folder / f"{case}.outputs.json", folder / f"{case}.times.json"
        done = subprocess.run(
            _trtexec_command(engine, folder, case, feeds, exported, timed),
            capture_output=True,
            encoding="utf-8",
            check=False,
        )
        log = done.stdout
        (folder / f"{case}.run.log").write_text(log + done.stderr, encoding="utf-8")
        if done.returncode or not exported.is_file():
            raise EngineError(
                f"trtexec failed on the case '{case}'.", f"Log: {folder / f'{case}.run.log'}"
            )
        outputs[case] = read_trtexec_output(exported, reference.output, shape)
        times = tuple(
            float(one["computeMs"]) for one in json.loads(timed.read_text(encoding="utf-8"))
        )
    match = re.search(r"Compute Capability: (\d+)\.(\d+)", log)
    named = re.search(r"Selected Device: (.+)", log)
    capability = f"SM{match.group(1)}{match.group(2)}" if match else ""
    return Run(outputs, times, None, named.group(1).strip() if named else "", capability)


def _trtexec_command(
    engine: Path, folder: Path, case: str, feeds: Mapping[str, Array], exported: Path, timed: Path
) -> list[str]:
    """Inputs are raw files in the engine's own types; the output comes back as JSON."""
    files, shapes = [], []
    for number, (name, values) in enumerate(feeds.items()):
        raw = folder / f"{case}.input{number}.bin"
        raw.write_bytes(values.tobytes())
        files.append(f"{name}:{raw}")
        shapes.append(f"{name}:{'x'.join(map(str, values.shape)) or '1'}")
    return [
        find_trtexec() or "trtexec",
        f"--loadEngine={engine}",
        f"--loadInputs={','.join(files)}",
        f"--shapes={','.join(shapes)}",
        f"--exportOutput={exported}",
        f"--exportTimes={timed}",
        f"--iterations={CALLS}",
    ]


def read_trtexec_output(path: Path, name: str, shape: tuple[int, ...]) -> Array:
    """Read the tensor ``name`` from what ``--exportOutput`` wrote; EngineError without it."""
    try:
        outputs = {
            one["name"]: one["values"] for one in json.loads(path.read_text(encoding="utf-8"))
        }
        return np.asarray(outputs[name], np.float32).reshape(shape)
    except (ValueError, KeyError, TypeError) as error:
        raise EngineError(
            f"trtexec's output {path} has no tensor '{name}' of shape {shape}."
        ) from error
