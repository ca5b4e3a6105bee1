"""Ours beside other quantizers, on one ONNX file and the same calibration inputs: time, memory, bytes, SQNR.

    python benchmarks/peers.py                                  a UNet2DModel of 21 M random weights (needs torch)
    python benchmarks/peers.py --model FILE.onnx                any model that `mpq-deploy build` takes
    python benchmarks/peers.py --onnxsim-python VENV/bin/python --modelopt-python VENV/bin/python

Every tool and mode runs in a process of its own: seconds are wall time with the start of Python, memory is the peak
resident size. Bytes are those of all files of the quantized model. SQNR is the output's against the float model in
dB, mean and least over 8 held-out inputs, in ONNX Runtime on this CPU, Q/DQ pairs in float arithmetic for all. The
inputs are calls along the float model's own DDIM trajectories: 8 timesteps x 4 samples to calibrate, 8 fresh samples
at random timesteps held out. Ours is exported and measured once; a budget then costs what its row says.

Random weights have no trained outliers: the table ranks plumbing more than algorithms. W8A8 and weight-only rows are
different jobs. The last lines compare ours with the line between two points of onnxsim 0.8.1 on this architecture,
and with what onnxsim gives in this very run; the exit code is 1 when a comparison is lost.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from table import Page, bench_parser, markdown, verdict

from mpq_deploy.run.folder import RunFolder

TOOLS = Path(__file__).parent / "peer_tools"
PACKAGE = Path(__file__).parent.parent / "mpq_deploy"
STAGES = ("export", "calibrate", "candidates", "measure")
ANY, WEIGHTS_ONLY = "fp16,w8a8,w8a16,w4a16,w4a8", "fp16,w8a16,w4a16"
INT8_COMPUTE = "fp16,w8a8,w4a8"
# 32 calibration inputs: weights are rounded on 16 of them, sensitivities measured on the 16 others.
RECIPE = (
    "calibrate.timesteps=8",
    "calibrate.samples=4",
    "calibrate.batch_size=4",
    "measure.samples=2",
    "measure.probes=8",
)
# onnxsim 0.8.1, INT4 and INT8 in blocks of 32: MB of the file, dB. What ours has to be above, at every size between.
LINE = ((13.4, 15.7), (23.9, 40.7))
# onnxsim 0.8.1, quantize_static: MB, dB.
W8A8 = (21.4, 29.4)


@dataclass(frozen=True)
class Job:
    """One row of the table: who made it, what kind it is, and the command that makes it."""

    tool: str
    mode: str
    kind: str
    command: tuple[str, ...]
    model: Path


@dataclass
class Result:
    """What a job took and gave; ``failed`` says why it gave nothing."""

    seconds: float = 0.0
    peak_mb: float = 0.0
    file_mb: float = 0.0
    mean_db: float = 0.0
    min_db: float = 0.0
    note: str = ""
    failed: str = ""


def run_child(command: tuple[str, ...], log: Path) -> tuple[int, float, float]:
    """Run a command and return its exit code, wall seconds, and peak resident MB of it and its children."""
    started = time.perf_counter()
    with log.open("w", encoding="utf-8") as file:
        child = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    return child.returncode, time.perf_counter() - started, usage.ru_maxrss * 1024 / 1e6


def last_line(log: Path) -> str:
    lines = [
        line.strip()
        for line in log.read_text(errors="replace", encoding="utf-8").splitlines()
        if line.strip()
    ]
    return lines[-1] if lines else ""


def folder_mb(model: Path, job: Job) -> float:
    """Bytes of all files of a quantized model, in MB; of ours, the deployed graph and the weights."""
    if job.tool == "ours":
        return (
            sum((model.parent / name).stat().st_size for name in ("model.onnx", "weights.bin"))
            / 1e6
        )
    return sum(path.stat().st_size for path in model.parent.iterdir() if path.is_file()) / 1e6


class Bench:
    """The scratch folder: the model, the inputs, and a folder per job with its result."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.run, self.model, self.inputs = (
            out / "run",
            out / "given" / "model.onnx",
            out / "given" / "inputs.npz",
        )
        (out / "logs").mkdir(parents=True, exist_ok=True)

    def prepare(self, model: str | None) -> str:
        """Export and measure, as far as that is not done; say what each part took when it was last made."""
        source = model or str(self.out / "source")
        if model is None and not (self.out / "source" / "model_index.json").is_file():
            self._must("unet", (sys.executable, str(TOOLS / "prepare.py"), "unet", source))
        ours = (sys.executable, str(TOOLS / "run_ours.py"))
        self._must("export", (*ours, "export", source, str(self.run), *RECIPE))
        self._must("measure", (*ours, "measure", str(self.run)))
        given = str(self.out / "given")
        self._must(
            "inputs", (sys.executable, str(TOOLS / "prepare.py"), "inputs", str(self.run), given)
        )
        timings = RunFolder(self.run).timings()
        parts = (
            (name, timings[name]["seconds"], timings[name]["peak_rss_bytes"] / 1e6)
            for name in STAGES
        )
        return ", ".join(f"{name} {seconds:.1f} s {peak:.0f} MB" for name, seconds, peak in parts)

    def _must(self, name: str, command: tuple[str, ...]) -> tuple[float, float]:
        log = self.out / "logs" / f"{name}.log"
        code, seconds, peak = run_child(command, log)
        if code:
            sys.exit(f"{name} failed ({code}), see {log}: {last_line(log)}")
        return seconds, peak

    def do(self, job: Job) -> Result:
        """Run a job and score what it wrote, unless the same was done before."""
        folder = job.model.parent
        key = self._key(job)
        record = self.out / "results" / f"{folder.name}.json"
        if (
            record.is_file()
            and (known := json.loads(record.read_text(encoding="utf-8")))["key"] == key
        ):
            return Result(**known["result"])
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.iterdir():
            old.unlink()
        result = self._run(job)
        record.parent.mkdir(exist_ok=True)
        record.write_text(json.dumps({"key": key, "result": asdict(result)}), encoding="utf-8")
        return result

    def _run(self, job: Job) -> Result:
        log = self.out / "logs" / f"{job.model.parent.name}.log"
        code, seconds, peak = run_child(job.command, log)
        if code:
            return Result(seconds, peak, failed=last_line(log)[:160])
        result = Result(
            seconds,
            peak,
            folder_mb(job.model, job),
            note=last_line(log) if job.tool == "ours" else "",
        )
        score = (
            sys.executable,
            str(TOOLS / "score.py"),
            str(self.model),
            str(self.inputs),
            str(job.model),
        )
        if run_child(score, self.out / "logs" / "score.log")[0]:
            result.failed = "does not run: " + last_line(self.out / "logs" / "score.log")[:160]
            return result
        found = json.loads(last_line(self.out / "logs" / "score.log"))
        result.mean_db, result.min_db = found["mean"], found["min"]
        return result

    def _key(self, job: Job) -> str:
        """Digest of the command, the tool's script, and what it is given."""
        digest = hashlib.sha256(json.dumps(job.command).encode())
        files = [*sorted(TOOLS.glob("*.py")), self.model, self.inputs]
        if job.tool == "ours":
            files += [self.run / stage / "stage.json" for stage in STAGES]
            files += sorted(PACKAGE.rglob("*.py"))
        for path in files:
            digest.update(hashlib.sha256(path.read_bytes()).digest())
        return digest.hexdigest()


def our_jobs(bench: Bench, budgets: list[str]) -> list[Job]:
    """Ours at every budget, then with one scheme for every layer."""
    jobs = []
    ours = (sys.executable, str(TOOLS / "run_ours.py"))
    for title, kind, schemes in (
        ("weights only", "weight-only", WEIGHTS_ONLY),
        ("INT8 compute", "W8A8 / W4A8", INT8_COMPUTE),
    ):
        for budget in budgets:
            folder = bench.out / "models" / f"ours-{title.replace(' ', '-')}-{budget}"
            command = (*ours, "plan", str(bench.run), budget, schemes, str(folder))
            jobs.append(
                Job("ours", f"{title}, budget {budget}", kind, command, folder / "model.fp32.onnx")
            )
    blocks = "w4a16-b32,w4a16-b64,w4a16-b128"
    for title, kind, schemes in (
        ("every layer w8a8", "W8A8", "w8a8,w8a16"),
        ("every layer w8a16", "weight-only", "w8a16"),
        ("every layer w4a16, blocks of 32", "weight-only", blocks),
    ):
        folder = bench.out / "models" / f"ours-uniform-{schemes.split(',')[0]}"
        command = (*ours, "uniform", str(bench.run), schemes, str(folder))
        jobs.append(Job("ours", title, kind, command, folder / "model.fp32.onnx"))
    return jobs


def peer_jobs(
    bench: Bench, tool: str, python: str, script: str, modes: dict[str, str]
) -> list[Job]:
    """The modes (name -> kind) of another tool."""
    jobs = []
    for mode, kind in modes.items():
        model = bench.out / "models" / f"{tool.split()[0].lower()}-{mode}" / "model.onnx"
        command = (
            python,
            str(TOOLS / script),
            str(bench.model),
            str(bench.inputs),
            mode,
            str(model),
        )
        jobs.append(Job(tool, mode, kind, command, model))
    return jobs


def on_line(line: tuple[tuple[float, float], tuple[float, float]], size_mb: float) -> float | None:
    """The line's dB at a size; None outside its ends."""
    (low, low_db), (high, high_db) = line
    if not low <= size_mb <= high:
        return None
    return low_db + (high_db - low_db) * (size_mb - low) / (high - low)


def row(job: Job, result: Result) -> list[str]:
    if result.failed:
        cost = [f"{result.seconds:.1f}", f"{result.peak_mb:.0f}"]
        return [
            f"{job.tool}: {job.mode}",
            job.kind,
            *cost,
            "-",
            "-",
            "",
            f"fails: {result.failed.replace('|', '/')}",
        ]
    above = on_line(LINE, result.file_mb)
    return [
        f"{job.tool}: {job.mode}",
        job.kind,
        f"{result.seconds:.1f}",
        f"{result.peak_mb:.0f}",
        f"{result.file_mb:.2f}",
        f"{result.mean_db:.1f} ({result.min_db:.1f})",
        "" if above is None else f"{result.mean_db - above:+.1f}",
        result.note,
    ]


def comparisons(done: list[tuple[Job, Result]]) -> list[tuple[bool, str]]:
    """Ours against the fixed line and the fixed W8A8 point, and against what onnxsim gave in this run."""
    fine = [(job, result) for job, result in done if not result.failed]
    ours = [(job, result) for job, result in fine if job.tool == "ours"]
    checks = [line_check("the line of onnxsim as measured before", LINE, ours)]
    checks.append(point_check("onnxsim's W8A8 as measured before", W8A8, ours))
    today = {
        job.mode: (result.file_mb, result.mean_db)
        for job, result in fine
        if job.tool.startswith("onnxsim")
    }
    if {"int4", "int8-block"} <= today.keys():
        checks.append(
            line_check(
                "the line of onnxsim in this run", (today["int4"], today["int8-block"]), ours
            )
        )
    if "static" in today:
        checks.append(point_check("onnxsim's W8A8 in this run", today["static"], ours))
    return checks


def line_check(
    what: str, line: tuple[tuple[float, float], tuple[float, float]], ours: list[tuple[Job, Result]]
) -> tuple[bool, str]:
    """Whether all weight-only mixes of ours between the ends of ``line`` lie above it."""
    leads = {}
    for job, result in ours:
        expected = on_line(line, result.file_mb)
        if expected is not None and "budget" in job.mode and job.kind == "weight-only":
            leads[f"{result.file_mb:.1f} MB"] = result.mean_db - expected
    text = " to ".join(f"{mb:.1f} MB {db:.1f} dB" for mb, db in line)
    found = (
        ", ".join(f"{lead:+.1f} dB at {size}" for size, lead in leads.items())
        or "no size of ours lies between"
    )
    passed = bool(leads) and min(leads.values()) > 0
    return passed, verdict(passed, f"ours, weights only, is above {what} ({text})", found)


def point_check(
    what: str, point: tuple[float, float], ours: list[tuple[Job, Result]]
) -> tuple[bool, str]:
    """Whether ours with INT8 compute is better in no more bytes than ``point``."""
    size, least = point
    within = [r for job, r in ours if job.kind.startswith("W8A8") and r.file_mb <= size]
    best = max(within, key=lambda result: result.mean_db, default=None)
    passed = best is not None and best.mean_db > least
    found = (
        f"{best.mean_db:.1f} dB at {best.file_mb:.1f} MB"
        if best
        else "nothing of ours is that small"
    )
    return passed, verdict(
        passed, f"ours, INT8 compute, is above {what} ({size:.1f} MB {least:.1f} dB)", found
    )


def all_jobs(bench: Bench, chosen: argparse.Namespace) -> tuple[list[Job], list[str]]:
    """Return the jobs, and what is skipped and why."""
    jobs, skipped = our_jobs(bench, chosen.budgets), []
    kinds = {"minmax": "W8A8", "percentile": "W8A8", "minmax-int4": "W4A8"}
    jobs += peer_jobs(bench, "ORT quantize_static", sys.executable, "run_onnxruntime.py", kinds)
    for tool, python, script, modes in (
        (
            "onnxsim",
            chosen.onnxsim_python,
            "run_onnxsim.py",
            {"static": "W8A8", "int4": "weight-only", "int8-block": "weight-only"},
        ),
        (
            "Model Optimizer",
            chosen.modelopt_python,
            "run_modelopt.py",
            {"int8-max": "W8A8", "int4-rtn": "weight-only"},
        ),
    ):
        if python is None:
            skipped.append(f"{tool} is skipped: no --{script[4:-3]}-python was given.")
        else:
            jobs += peer_jobs(bench, tool, python, script, modes)
    return jobs, skipped


def package_version(python: str, package: str) -> str:
    """Version of a package in another environment."""
    code = f"from importlib.metadata import version; print(version('{package}'))"
    return subprocess.run(
        [python, "-c", code], capture_output=True, encoding="utf-8", check=True
    ).stdout.strip()


def main() -> None:
    parser = bench_parser(__doc__, recipe=False)
    parser.add_argument(
        "--model", help="what mpq-deploy build takes (default: the UNet with random weights)"
    )
    parser.add_argument(
        "--budgets",
        nargs="+",
        default=["0.28", "0.31", "0.35", "0.4", "0.45", "0.49", "0.53"],
        help="fractions of FP16",
    )
    parser.add_argument(
        "--onnxsim-python", metavar="PYTHON", help="the Python of an environment with onnxsim"
    )
    parser.add_argument(
        "--modelopt-python",
        metavar="PYTHON",
        help="the Python of an environment with Model Optimizer",
    )
    parser.add_argument(
        "-o", "--out", type=Path, help="scratch folder (default: runs/bench-peers[-NAME])"
    )
    chosen = parser.parse_args()
    name = Path(chosen.model).stem if chosen.model else ""
    bench = Bench(chosen.out or Path("runs") / f"bench-peers{'-' if name else ''}{name}")
    page = Page(f"Beside other quantizers: {name or 'a UNet of 21 M random weights'}")
    prepared = bench.prepare(chosen.model)
    size = f"The given ONNX file has {bench.model.stat().st_size / 1e6:.1f} MB."
    page.say(f"{size} Ours, once for all rows: {prepared}.")
    jobs, skipped = all_jobs(bench, chosen)
    for package, python in (
        ("onnxsim", chosen.onnxsim_python),
        ("nvidia-modelopt", chosen.modelopt_python),
    ):
        if python is not None:
            skipped.append(
                f"{package} {package_version(python, package)}, in an environment of its own."
            )
    done = []
    for job in jobs:
        done.append((job, bench.do(job)))
        print(" | ".join(row(*done[-1])), file=sys.stderr, flush=True)
    header = (
        "tool: mode",
        "kind",
        "wall s",
        "peak MB",
        "file MB",
        "SQNR dB, mean (minimum)",
        "above the line, dB",
        "",
    )
    page.say(markdown(header, [row(job, result) for job, result in done]))
    if skipped:
        page.say(" ".join(skipped))
    checks = comparisons(done) if chosen.model is None else []
    if checks:
        page.conclude(checks, chosen.page)


if __name__ == "__main__":
    main()
