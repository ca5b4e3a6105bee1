"""Run a package's reference inputs through its engine, by TensorRT's Python package or trtexec.

In: the engine and the references. Out: a ``Run`` with each case's outputs and the latencies, or why
nothing ran. Unproven: no GPU was available; trtexec's part was tested with a mock.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mpq_deploy.device.archive import ArchiveError
from mpq_deploy.device.cuda import why_no_gpu
from mpq_deploy.device.manifest import Reference
from mpq_deploy.device.run_worker import RunJob
from mpq_deploy.engine.trtexec import find_trtexec
from mpq_deploy.errors import EngineError
from mpq_deploy.system.array_file import read_arrays
from mpq_deploy.system.children import run_bounded, run_child
from mpq_deploy.system.files import write_text
from mpq_deploy.system.inputs import read_json, read_json_object
from mpq_deploy.system.names import path_inside

CALLS = 100
WORKER = "mpq_deploy.device.run_worker"
# A hundred calls of a second each, a first one that compiles, and as much again (our choice).
RUN_SECONDS = 1800.0
# Outputs as JSON: twenty bytes for each of up to 13 million values.
OUTPUT_BYTES = 256 << 20
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
    try:
        done = run_child(WORKER, str(folder / "run.job.json"), seconds=RUN_SECONDS)
    except subprocess.TimeoutExpired as error:
        what = f"The engine ran for more than {RUN_SECONDS / 60:.0f} minutes."
        raise EngineError(what, f"Log: {files['log']}") from error
    if done.returncode:
        words = " ".join(done.stderr.split())[-400:]
        raise EngineError(
            f"The engine's process exited with code {done.returncode}: {words}",
            f"Log: {files['log']}",
        )
    result = read_json_object(Path(files["result"]), error=EngineError)
    if "error" in result:
        raise EngineError(str(result["error"]), f"Log: {files['log']}")
    data = read_arrays(Path(files["outputs"]), error=EngineError)
    outputs = {case: data[f"{case}/{reference.output}"] for case in reference.cases}
    keys = ("memory_bytes", "gpu", "compute_capability")
    return Run(outputs, tuple(result["milliseconds"]), **{key: result[key] for key in keys})


_FILES = {"outputs": "run.outputs.npz", "result": "run.result.json", "log": "run.log"}


def _with_trtexec(engine: Path, folder: Path, reference: Reference) -> Run:
    outputs: dict[str, Array] = {}
    times: tuple[float, ...] = ()
    log = ""
    data = reference_arrays(folder, reference)
    for case in reference.cases:
        feeds = {name: np.ascontiguousarray(data[f"{case}/{name}"]) for name in reference.inputs}
        shape = data[f"{case}/{reference.output}"].shape
        exported, timed, said = (
            path_inside(folder, case, "A case's name", EngineError, suffix)
            for suffix in (".outputs.json", ".times.json", ".run.log")
        )
        for path in (exported, timed):
            path.unlink(missing_ok=True)
        given = _input_files(folder, case, feeds, reference.empty)
        command = _trtexec_command(engine, given, feeds, exported, timed)
        try:
            done = run_bounded(command, seconds=RUN_SECONDS)
        except subprocess.TimeoutExpired as error:
            what = f"trtexec ran the case '{case}' for more than {RUN_SECONDS / 60:.0f} minutes."
            raise EngineError(what) from error
        log = done.stdout
        write_text(said, log + done.stderr)
        if done.returncode or not exported.is_file():
            raise EngineError(f"trtexec failed on the case '{case}'.", f"Log: {said}")
        outputs[case] = read_trtexec_output(exported, reference.output, shape)
        times = _trtexec_times(timed)
    match = re.search(r"Compute Capability: (\d+)\.(\d+)", log)
    named = re.search(r"Selected Device: (.+)", log)
    capability = f"SM{match.group(1)}{match.group(2)}" if match else ""
    return Run(outputs, times, None, named.group(1).strip() if named else "", capability)


def _input_files(
    folder: Path, case: str, feeds: Mapping[str, Array], empty: Mapping[str, int]
) -> list[str]:
    """Write the inputs as raw files in the engine's own types; return ``NAME:FILE`` of each.

    Where trtexec is given no file it takes random numbers, so slots for LoRAs get zeros.
    """
    files = []
    for number, (name, values) in enumerate(feeds.items()):
        raw = folder / f"{case}.input{number}.bin"
        raw.write_bytes(values.tobytes())
        files.append(f"{name}:{raw}")
    for size in set(empty.values()):
        (folder / f"zeros{size}.bin").write_bytes(bytes(size))
    return [*files, *(f"{name}:{folder / f'zeros{size}.bin'}" for name, size in empty.items())]


def _trtexec_command(
    engine: Path, files: list[str], feeds: Mapping[str, Array], exported: Path, timed: Path
) -> list[str]:
    """The output comes back as JSON."""
    shapes = [f"{n}:{'x'.join(map(str, values.shape)) or '1'}" for n, values in feeds.items()]
    return [
        find_trtexec() or "trtexec",
        f"--loadEngine={engine}",
        f"--loadInputs={','.join(files)}",
        f"--shapes={','.join(shapes)}",
        f"--exportOutput={exported}",
        f"--exportTimes={timed}",
        f"--iterations={CALLS}",
    ]


def reference_arrays(folder: Path, reference: Reference) -> dict[str, Array]:
    """Return the arrays of ``reference``, every one that its cases name among them.

    Raises ArchiveError where one is missing, or the file is damaged.
    """
    tensors = (*reference.inputs, reference.output)
    names = tuple(f"{case}/{name}" for case in reference.cases for name in tensors)
    path = path_inside(folder, reference.file, "The references' file", ArchiveError)
    arrays = read_arrays(path, names, error=ArchiveError, hint="Package the run again.")
    for name, values in arrays.items():
        if values.dtype.kind not in "fiub" or not values.size:
            raise ArchiveError(f"{path}: '{name}' holds no numbers.", "Package the run again.")
    return arrays


def _trtexec_times(path: Path) -> tuple[float, ...]:
    """Milliseconds of each call from what ``--exportTimes`` wrote. Raises EngineError without them."""
    times = read_json(path, limit=OUTPUT_BYTES, error=EngineError)
    try:
        return tuple(float(one["computeMs"]) for one in times)
    except (KeyError, TypeError, ValueError) as error:
        raise EngineError(f"trtexec's times {path} are not those of calls.") from error


def read_trtexec_output(path: Path, name: str, shape: tuple[int, ...]) -> Array:
    """Read the tensor ``name`` from what ``--exportOutput`` wrote; EngineError without it."""
    try:
        read = read_json(path, limit=OUTPUT_BYTES, error=EngineError)
        outputs = {one["name"]: one["values"] for one in read}
        return np.asarray(outputs[name], np.float32).reshape(shape)
    except (ValueError, KeyError, TypeError) as error:
        raise EngineError(
            f"trtexec's output {path} has no tensor '{name}' of shape {shape}."
        ) from error
