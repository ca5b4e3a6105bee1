"""Time one or two subjects, alternated call by call in rounds, and report it.

In: ``Subject`` objects (ours first). Out: a ``Measured`` each, the ratio, and results in the form
of the installer's results.json.
"""

from __future__ import annotations

import json
import platform
import subprocess
import tempfile
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mpq_deploy.bench.statistics import ratio, summary
from mpq_deploy.bench.timed_subject import ORT, Subject
from mpq_deploy.device.archive import MANIFEST
from mpq_deploy.device.cuda import Cuda, why_no_gpu
from mpq_deploy.device.installer import board
from mpq_deploy.device.manifest import RESULTS_FORMAT, Manifest
from mpq_deploy.engine.record import EngineRecord
from mpq_deploy.errors import EngineError, MpqError, UsageError
from mpq_deploy.system.children import child_command, child_environment, fate
from mpq_deploy.system.progress import Talk
from mpq_deploy.system.release import __version__

ON_CPU = (
    "This is ONNX Runtime on a CPU: Q/DQ nodes are computed in float arithmetic and cost extra time. It says "
    "nothing about the engine's speed."
)
NOT_COMPARED = "bench compares no outputs"


@dataclass(frozen=True)
class Schedule:
    """``calls`` are timed in ``rounds`` equal rounds; ``warm_up`` calls before are kept apart."""

    calls: int = 100
    rounds: int = 20
    warm_up: int = 10

    def __post_init__(self) -> None:
        if not 1 <= self.rounds <= self.calls or self.calls % self.rounds or self.warm_up < 1:
            raise UsageError(
                f"Invalid schedule: {self.calls} calls in {self.rounds} rounds after {self.warm_up} warm-up calls.",
                "The calls must be a multiple of the rounds, with at least one warm-up call.",
            )


@dataclass(frozen=True)
class Measured:
    """``milliseconds`` [rounds, calls per round]; ``warm_up`` [calls]: the first one compiles."""

    subject: Subject
    version: str
    clock: str
    load_seconds: float
    shapes: dict[str, list[int]]
    warm_up: list[float]
    milliseconds: list[list[float]]
    peak_rss_bytes: int
    interpreter_rss_bytes: int
    gpu_bytes: int | None

    def all_calls(self) -> list[float]:
        """Every timed call."""
        return [one for each in self.milliseconds for one in each]

    def as_json(self) -> dict[str, Any]:
        """Everything that was measured of this subject."""
        return {
            "name": self.subject.name,
            "file": Path(self.subject.file).name,
            "backend": f"{self.subject.backend} {self.version}",
            "device": self.subject.device,
            "threads": self.subject.threads,
            "batch": self.subject.batch,
            "clock": self.clock,
            "cuda_graphs": self.subject.graphs and self.subject.backend != ORT,
            "shapes": self.shapes,
            "load_seconds": self.load_seconds,
            "warm_up": {
                "first_ms": self.warm_up[0],
                "calls": len(self.warm_up),
                "last_ms": self.warm_up[-1],
            },
            "latency": summary(self.all_calls(), self.subject.batch),
            "peak_rss_bytes": self.peak_rss_bytes,
            "model_rss_bytes": self.peak_rss_bytes - self.interpreter_rss_bytes,
            "gpu_bytes": self.gpu_bytes,
        }


def measure(subjects: Sequence[Subject], schedule: Schedule, talk: Talk) -> list[Measured]:
    """Time every subject, alternating: first to last in one round, last to first in the next.

    Raises what the subject's process reports, EngineError where it crashes.
    """
    with ExitStack() as stack:
        workers = [stack.enter_context(_worker(subject)) for subject in subjects]
        opened = [worker.answer() for worker in workers]
        warm_up = [worker.run(schedule.warm_up)["milliseconds"] for worker in workers]
        times: list[list[list[float]]] = [[] for _ in workers]
        last: list[dict[str, Any]] = [{} for _ in workers]
        with talk.bar("time rounds", schedule.rounds) as advance:
            for number in range(schedule.rounds):
                order = range(len(workers)) if number % 2 == 0 else reversed(range(len(workers)))
                for index in order:
                    last[index] = workers[index].run(schedule.calls // schedule.rounds)
                    times[index].append(last[index].pop("milliseconds"))
                advance(1)
    return [
        Measured(subject, warm_up=warm, milliseconds=rounds, **first, **memory)
        for subject, warm, rounds, first, memory in zip(
            subjects, warm_up, times, opened, last, strict=True
        )
    ]


class _Worker:
    def __init__(self, subject: Subject, process: subprocess.Popen[str], errors: Any) -> None:
        self._subject, self._process, self._errors = subject, process, errors

    def run(self, calls: int) -> dict[str, Any]:
        """Have it run so many calls."""
        self.order(str(calls))
        return self.answer()

    def order(self, text: str) -> None:
        """Write a line. One that has ended is found by its missing answer."""
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.write(f"{text}\n")
            self._process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        """Read one answer. Raises its error, or EngineError where the process is gone."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self._errors.seek(0)
            words = " ".join(self._errors.read().split())[-400:]
            raise EngineError(f"The process that ran {self._subject.file} {fate(code)}: {words}")
        values: dict[str, Any] = json.loads(line)
        if "error" in values:
            raise MpqError(values["error"], values["hint"])
        return values


@contextmanager
def _worker(subject: Subject) -> Iterator[_Worker]:
    with tempfile.TemporaryFile("w+", encoding="utf-8") as errors:
        process = subprocess.Popen(
            child_command("mpq_deploy.bench.worker"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            encoding="utf-8",
            env=child_environment(),
        )
        try:
            worker = _Worker(subject, process, errors)
            worker.order(subject.to_json())
            yield worker
            worker.order("")
            process.wait()
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()


@dataclass(frozen=True)
class Origin:
    """Whose results these are: ``target`` with its dialect, and the plan's digests if known."""

    name: str
    target: str
    dialect: str
    digests: dict[str, str]


def origin_of(file: Path, backend: str, device: str) -> Origin:
    """Find a file's origin: the package that it was installed from, else what runs it."""
    if backend == ORT:
        return Origin(file.stem, f"onnxruntime-{device}", ORT, {})
    manifest = file.resolve().parent.parent / MANIFEST
    if manifest.is_file():
        packed = Manifest.load(manifest)
        return Origin(packed.name, packed.target.name, packed.target.dialect, packed.digests)
    record = EngineRecord.beside(file)
    return Origin(file.stem, record.target if record else backend, "", {})


def results(measured: Sequence[Measured], origin: Origin) -> dict[str, Any]:
    """Return what results.json holds, with the section ``bench`` that only this command writes."""
    ours = measured[0]
    against = ratio(ours.milliseconds, measured[1].milliseconds) if len(measured) > 1 else None
    cpu = ours.subject.backend == ORT and ours.subject.device == "cpu"
    return {
        "format": RESULTS_FORMAT,
        "made_by": __version__,
        "package": {"name": origin.name, "manifest_sha256": "", "digests": origin.digests},
        "target": origin.target,
        "dialect": origin.dialect,
        "device": _device(ours.subject.device),
        "engine": _engine(ours),
        "build": None,
        "reference": {"ran": False, "why": NOT_COMPARED, "passed": None, "cases": {}},
        "latency": summary(ours.all_calls(), ours.subject.batch),
        "memory": {
            "weights_bytes": None,
            "activation_bytes": None,
            "taken_bytes": ours.peak_rss_bytes - ours.interpreter_rss_bytes
            if cpu
            else ours.gpu_bytes,
        },
        "passed": True,
        "bench": {
            "subjects": [one.as_json() for one in measured],
            "ratio": against,
            "note": ON_CPU if cpu else "",
        },
    }


def _device(kind: str) -> dict[str, str]:
    facts = {
        "board": board(),
        "machine": f"{platform.machine()} CPU",
        "python": platform.python_version(),
    }
    if kind == "cpu" or why_no_gpu():
        return {**facts, "gpu": "", "compute_capability": ""}
    cuda = Cuda()
    return {**facts, "gpu": cuda.name(), "compute_capability": cuda.compute_capability()}


def _bytes(subject: Subject) -> int:
    """Size of the engine, or of the graph with its weights."""
    file = Path(subject.file)
    if subject.backend != ORT:
        return file.stat().st_size
    from mpq_deploy.evaluate.cache import model_files

    return sum(one.stat().st_size for one in model_files(file))


def _engine(ours: Measured) -> dict[str, Any]:
    file = Path(ours.subject.file)
    record = None if ours.subject.backend == ORT else EngineRecord.beside(file)
    return {
        "backend": ours.subject.backend,
        "version": ours.version,
        "file": file.name,
        "bytes": _bytes(ours.subject),
        "weights_bytes": record.weights_bytes if record else None,
        "activation_bytes": record.activation_bytes if record else None,
        "verified": ours.subject.backend == ORT or (record is not None and record.verified),
        "problems": [asdict(problem) for problem in record.problems] if record else [],
    }


def bench_text(results: dict[str, Any]) -> str:
    """Return the results as a table of at most 80 columns, with what the ratio says."""
    bench = results["bench"]
    rows = [("", "p50", "p90", "p99", "per second", "memory", "first call")]
    for one in bench["subjects"]:
        times, memory = one["latency"], one["gpu_bytes"] or one["model_rss_bytes"]
        cells = (f"{times[key]:.2f} ms" for key in ("p50_ms", "p90_ms", "p99_ms"))
        first = f"{one['warm_up']['first_ms']:.1f} ms"
        rate = f"{times['samples_per_second']:.1f}"
        rows.append((one["name"], *cells, rate, f"{memory / 1e6:,.0f} MB", first))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for name, *figures in rows:
        right = (f"{figure:>{width}}" for figure, width in zip(figures, widths[1:]))
        lines.append("  ".join((f"{name:<{widths[0]}}", *right)))
    first, *others = bench["subjects"]
    device = results["device"]["board"] or results["device"]["gpu"] or results["device"]["machine"]
    calls = f"batch {first['batch']}, {first['latency']['calls']} calls each"
    lines += ["", f"{first['backend']} on {device}, {calls}"]
    if bench["ratio"]:
        lines.append(ratio_text(bench["ratio"], first["name"], others[0]["name"]))
    return "\n".join([*lines, *textwrap.wrap(bench["note"], 79)])


def ratio_text(value: dict[str, Any], ours: str, other: str) -> str:
    """Say how the medians compare, and whether that is more than noise."""
    text = f"{ours} takes {value['value']:.3f} of {other}'s time"
    if value["low"] is None:
        return f"{text} (too few rounds for an interval)"
    text += f" (95 %: {value['low']:.3f} to {value['high']:.3f})"
    return f"{text}: no difference is shown" if value["low"] <= 1 <= value["high"] else text
