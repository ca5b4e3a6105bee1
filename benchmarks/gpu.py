"""A visit to a machine with an NVIDIA GPU: do the numbers agree with the CPU's, and what is faster?

    python benchmarks/gpu.py [PART ...] --page docs/results/gpu.md

Parts: machine (what is there), tests (tests/gpu), graphs (the demo's graphs in ONNX Runtime), stages
(the demo built on both devices), sizes (UNets of random weights: one call, and all stages on the
GPU), engines (the demo's engine and a latency table by TensorRT-RTX, where it takes the card). Each
part runs in a process of its own and its result is kept at once, with the page made of what is
there: after an interruption the same command goes on. Nothing new is begun after --minutes.
--dry-run does all of it with the CPU in the GPU's place, and says so.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from scale import SETTINGS
from scale_models import SIZES, make_model
from table import Page, bench_parser, bench_recipe, markdown, verdict

from mpq_deploy.allocate.plan import PrecisionPlan
from mpq_deploy.engine.target import load_target
from mpq_deploy.errors import UsageError
from mpq_deploy.evaluate.evaluation_result import Evaluation
from mpq_deploy.graph.writers.deployed_graphs import SIMULATED
from mpq_deploy.recipe import Recipe
from mpq_deploy.run.pipeline import open_pipeline
from mpq_deploy.run.view import Run
from mpq_deploy.runtime.ort import OrtDenoiser, model_feeds
from mpq_deploy.sensitivity.table import SensitivityTable
from mpq_deploy.system.compute import CPU, CUDA, compute_on, find_compute
from mpq_deploy.system.doctor import find_gpus, inspect_machine, why_not_run
from mpq_deploy.system.progress import PlainTalk

STAGES = ("export", "calibrate", "candidates", "measure", "allocate", "quantize", "evaluate")
QUICK: dict[str, Any] = {
    "calibrate.samples": 32,
    "calibrate.observed": 16,
    "measure.samples": 16,
    "evaluate.samples": 16,
    "evaluate.controls": False,
    "engine.build": False,
    "budget": "0.35",
}
# Stages of the larger models: images of random weights say nothing.
UNTIL = "quantize"
LATENT = 32
ROWS, ROUNDS = 16, 5
# Goals (our choice): float results differ by rounding alone; what is measured, by less than samples do.
SAME_OUTPUT, SAME_LOSS, SAME_ERROR = 1e-4, 0.02, 0.1
Result = dict[str, Any]


def machine(work: Path, gpu: str) -> Result:
    """Say what the machine has, and whether each library can use the GPU."""
    try:
        place = str(find_compute(gpu))
    except UsageError as error:
        place = error.message
    found = [f"{f.name}: {f.value}" for f in inspect_machine() if f.group in ("machine", "gpu")]
    rtx = why_not_run(load_target("rtx"), find_gpus())
    return {"place": place, "found": found, "rtx": rtx}


def tests(work: Path, gpu: str) -> Result:
    """Run tests/gpu; count them, with the reasons of those that were skipped."""
    report = work / "tests.xml"
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-q", f"--junitxml={report}"]
    subprocess.run(command, cwd=Path(__file__).parents[1], check=False)
    cases = ElementTree.parse(report).getroot().iter("testcase")
    result: Result = {"passed": 0, "failed": [], "skipped": {}}
    for case in cases:
        name = f"{case.get('classname', '').rpartition('.')[2]}.{case.get('name')}"
        skipped = case.find("skipped")
        if skipped is not None:
            why = str(skipped.get("message"))
            result["skipped"][why] = result["skipped"].get(why, 0) + 1
        elif case.find("failure") is not None or case.find("error") is not None:
            result["failed"].append(name)
        else:
            result["passed"] += 1
    return result


def build(recipe: Recipe, run: Path, until: str) -> dict[str, float]:
    """Make the stages; return the seconds of each."""
    with open_pipeline(recipe, run, PlainTalk()) as pipeline:
        pipeline.current(until)
        timings = pipeline.run.folder.timings()
    return {name: timings[name]["seconds"] for name in STAGES if name in timings}


def stages(work: Path, gpu: str, changes: tuple[str, ...] = ()) -> Result:
    """Build the demo on both devices: seconds by stage, and how far results differ."""
    result: Result = {"seconds": {}, "plans": {}, "errors": {}}
    tables = []
    for name, device in ((CPU, CPU), (CUDA, gpu)):
        run = work / f"demo-{name}"
        recipe = bench_recipe(None, changes, {**QUICK, "compute.device": device})
        result["seconds"][name] = build(recipe, run, "evaluate")
        tables.append(SensitivityTable.load(run / "measure"))
        result["plans"][name] = PrecisionPlan.load(run / "allocate" / "plan.json").schemes
        result["errors"][name] = Evaluation.load(run / "evaluate").variants["ours"].measured_nmse
    first, second = (
        np.array([value for row in table.losses.values() for value in row.values()])
        for table in tables
    )
    result["loss_difference"] = float(
        np.median(np.abs(second - first)[first > 0] / first[first > 0])
    )
    return result


def demo_feeds(run: Any, rows: int) -> dict[str, np.ndarray]:
    """Return inputs of the demo: noise in the middle of the trajectory, with its conditions."""
    exported, random = run.exported, np.random.default_rng(0)
    sample = random.standard_normal((rows, *exported.spec.sample.shape), np.float32)
    conditions = {
        name: np.resize(values, (rows, *values.shape[1:]))
        for name, values in exported.conditions.items()
    }
    return model_feeds(exported.spec, sample, 500.0, conditions)


def call_times(model: Path, spec: Any, feeds: dict[str, np.ndarray], device: str) -> Result:
    """Return the output, and the median milliseconds of a call, transfers included."""
    with compute_on(find_compute(device)):
        denoiser = OrtDenoiser(model, spec, fake_quant_only=True)
        output, seconds = denoiser.run(feeds), []
        for _ in range(ROUNDS):
            start = time.perf_counter()
            denoiser.run(feeds)
            seconds.append(time.perf_counter() - start)
    return {"output": output.astype(np.float64), "ms": 1000 * float(np.median(seconds))}


def both_devices(model: Path, run: Any, gpu: str, rows: int = ROWS) -> Result:
    """Run one graph on both devices."""
    feeds = demo_feeds(run, rows)
    cpu, cuda = (call_times(model, run.exported.spec, feeds, device) for device in (CPU, gpu))
    difference = np.linalg.norm(cuda["output"] - cpu["output"]) / np.linalg.norm(cpu["output"])
    return {"difference": float(difference), "cpu_ms": cpu["ms"], "gpu_ms": cuda["ms"]}


def graphs(work: Path, gpu: str) -> Result:
    """Compare the demo's float graph and its quantized twin, as the part stages left them."""
    run = Run.opened(work / "demo-cpu", PlainTalk())
    files = {"float": run.exported.path, "quantized": run.stage("quantize") / SIMULATED}
    return {name: both_devices(path, run, gpu) for name, path in files.items()}


def sizes(work: Path, gpu: str, names: tuple[str, ...] = ("100M", "860M")) -> Result:
    """Build UNets of random weights on the GPU, the smaller ones on the CPU too; time one call of each."""
    kept, result = work / "sizes.part.json", {}
    if kept.is_file():
        result = json.loads(kept.read_text(encoding="utf-8"))
    for size in names:
        folder = work / size
        if not (folder / "model" / "model_index.json").is_file():
            make_model(SIZES[size], LATENT, folder / "model")
        model = {
            "model": str(folder / "model"),
            "conditions": str(folder / "model" / "conditions.npz"),
        }
        for name, device in ((CUDA, gpu), (CPU, CPU)):
            key = f"{size} {name}"
            if key in result or (name == CPU and size == names[-1]):
                continue
            run = folder / f"run-{name}"
            recipe = bench_recipe(None, (), {**SETTINGS, **model, "compute.device": device})
            result[key] = build(recipe, run, UNTIL)
            kept.write_text(json.dumps(result), encoding="utf-8")
        opened = Run.opened(folder / f"run-{CUDA}", PlainTalk())
        result[size] = both_devices(opened.exported.path, opened, gpu, rows=2)
        kept.write_text(json.dumps(result), encoding="utf-8")
    return result


def engines(work: Path, gpu: str) -> Result:
    """Build the demo's engine, time it, and measure a latency table, where TensorRT-RTX takes the card."""
    against = why_not_run(load_target("rtx"), find_gpus())
    if against:
        return {"against": against}
    run, said = work / "demo-cuda", []
    for arguments in (
        ("engine", str(run), "--target", "rtx"),
        ("bench", str(run)),
        ("profile", str(run)),
    ):
        command = [sys.executable, "-c", "from mpq_deploy.cli import main; main()", *arguments]
        done = subprocess.run(command, capture_output=True, encoding="utf-8", check=True)
        said.append(done.stdout)
    return {"said": said}


PARTS: dict[str, Callable[..., Result]] = {
    "machine": machine,
    "tests": tests,
    "stages": stages,
    "graphs": graphs,
    "sizes": sizes,
    "engines": engines,
}


def say_machine(page: Page, found: Result) -> None:
    page.say("## The machine")
    page.say("\n".join(f"- {line}" for line in found["found"]))
    page.say(
        f"Compute device: {found['place']}. TensorRT-RTX: {found['rtx'] or 'takes this card'}."
    )


def say_tests(page: Page, found: Result) -> None:
    skipped = "; ".join(f"{count}: {why}" for why, count in found["skipped"].items())
    page.say("## tests/gpu")
    failed = ", ".join(found["failed"]) or "none"
    page.say(f"{found['passed']} passed, failed: {failed}. Skipped: {skipped or 'none'}.")


def seconds_table(first: dict[str, float], second: dict[str, float] | None) -> str:
    """Return seconds by stage, on the CPU (where measured) and the GPU, and how many times faster."""
    rows = []
    names = [name for name in STAGES if name in first]
    for name in (*names, "all"):
        gpu = sum(first[n] for n in names) if name == "all" else first[name]
        row = [name, "", f"{gpu:.1f}", ""]
        if second:
            cpu = sum(second[n] for n in names) if name == "all" else second[name]
            row[1], row[3] = f"{cpu:.1f}", f"{cpu / max(gpu, 1e-3):.1f}x"
        rows.append(row)
    return markdown(("stage", "CPU s", "GPU s", "faster"), rows)


def say_stages(page: Page, found: Result) -> None:
    page.say("## The demo, built on both")
    page.say(seconds_table(found["seconds"][CUDA], found["seconds"][CPU]))
    cpu, cuda = found["plans"][CPU], found["plans"][CUDA]
    same = sum(cpu[name] == cuda[name] for name in cpu)
    errors = found["errors"]
    page.say(
        f"Losses differ by {found['loss_difference']:.1e} (median of all layers and schemes); {same} of {len(cpu)} "
        f"layers have the same scheme. Measured error of the plans, each on its own device: CPU {errors[CPU]:.3e}, "
        f"GPU {errors[CUDA]:.3e}."
    )


def say_graphs(page: Page, found: Result) -> None:
    page.say(f"## One call of {ROWS} samples in ONNX Runtime")
    page.say(calls_table(found))


def calls_table(found: Result) -> str:
    """Return a row per graph that was run on both devices."""
    rows = [
        [name, f"{one['cpu_ms']:.1f}", f"{one['gpu_ms']:.1f}", f"{one['difference']:.1e}"]
        for name, one in found.items()
        if "gpu_ms" in one
    ]
    return markdown(("graph", "CPU ms", "GPU ms", "relative difference"), rows)


def say_sizes(page: Page, found: Result) -> None:
    page.say(f"## UNets of random weights, latent {LATENT} x {LATENT}")
    page.say("One call of 2 samples:")
    page.say(calls_table(found))
    for key, seconds in found.items():
        size, _, device = key.partition(" ")
        if device == CUDA:
            page.say(f"### {size}: all stages, few counts (those of scale.py)")
            page.say(seconds_table(seconds, found.get(f"{size} {CPU}")))


def say_engines(page: Page, found: Result) -> None:
    page.say("## Engines")
    if "against" in found:
        page.say(f"None was run: {found['against']}.")
    for text in found.get("said", ()):
        page.say(f"```\n{text.strip()}\n```")


SAY: dict[str, Callable[[Page, Result], None]] = {
    "machine": say_machine,
    "tests": say_tests,
    "stages": say_stages,
    "graphs": say_graphs,
    "sizes": say_sizes,
    "engines": say_engines,
}


def checks(found: dict[str, Result]) -> list[tuple[bool, str]]:
    """Compare what was found with the goals."""
    lines = []
    if "tests" in found:
        failed = found["tests"]["failed"]
        lines.append((not failed, verdict(not failed, "tests/gpu pass", f"{len(failed)} failed")))
    if "graphs" in found:
        value = found["graphs"]["float"]["difference"]
        what = f"the float graph's outputs differ by less than {SAME_OUTPUT:g}"
        lines.append((value < SAME_OUTPUT, verdict(value < SAME_OUTPUT, what, f"{value:.1e}")))
    if "stages" in found:
        value = found["stages"]["loss_difference"]
        what = f"losses differ by less than {SAME_LOSS:g}"
        lines.append((value < SAME_LOSS, verdict(value < SAME_LOSS, what, f"{value:.1e}")))
        errors = found["stages"]["errors"]
        value = abs(errors[CUDA] / errors[CPU] - 1)
        what = f"measured errors differ by less than {SAME_ERROR:g}"
        lines.append((value < SAME_ERROR, verdict(value < SAME_ERROR, what, f"{value:.3f}")))
    return lines


def written(page: Path | None, found: dict[str, Result], dry: bool) -> list[tuple[bool, str]]:
    """Write the page of what is there; return its checks."""
    made = Page("A machine with a GPU")
    if dry:
        made.say("**A dry run: the CPU stands in the GPU's place; no figure here is a GPU's.**")
    for name, result in found.items():
        if "failed_part" in result:
            made.say(f"## {name}\n\nFailed: {result['failed_part']}")
        else:
            SAY[name](made, result)
    lines = checks({name: r for name, r in found.items() if "failed_part" not in r})
    if lines:
        made.say("\n".join(line for _, line in lines))
    made.save(page)
    return lines


def run_part(name: str, chosen: argparse.Namespace, gpu: str, seconds: float) -> Result:
    """Run a part in a process of its own, which keeps its result; a failure is a result that is not kept."""
    command = [sys.executable, __file__, "--child", name, "--gpu", gpu, "-o", str(chosen.out)]
    command += ["--sizes", *chosen.sizes, *(f"--set={change}" for change in chosen.set)]
    try:
        done = subprocess.run(command, check=False, timeout=seconds, stderr=subprocess.PIPE)
    except subprocess.TimeoutExpired:
        return {"failed_part": f"it took longer than the {seconds:.0f} s that were left"}
    if done.returncode:
        last = done.stderr.decode("utf-8", "replace").strip().splitlines()[-1:]
        return {"failed_part": last[0] if last else f"exit code {done.returncode}"}
    result: Result = json.loads((chosen.out / f"{name}.json").read_text(encoding="utf-8"))
    return result


def main() -> None:
    parser = bench_parser(__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("-o", "--out", type=Path, default=Path("runs") / "bench-gpu")
    parser.add_argument("--minutes", type=float, default=8.0, help="nothing is begun after them")
    parser.add_argument("--sizes", nargs="+", default=["100M", "860M"], choices=SIZES)
    parser.add_argument("--dry-run", action="store_true", help="the CPU stands for the GPU")
    parser.add_argument("--gpu", default=CUDA, help=argparse.SUPPRESS)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    if chosen.child:
        more = {"sizes": (tuple(chosen.sizes),), "stages": (tuple(chosen.set),)}
        result = PARTS[chosen.child](chosen.out, chosen.gpu, *more.get(chosen.child, ()))
        (chosen.out / f"{chosen.child}.json").write_text(json.dumps(result), encoding="utf-8")
        return
    end, found, lines = time.monotonic() + 60 * chosen.minutes, {}, []
    for name in chosen.parts or PARTS:
        kept = chosen.out / f"{name}.json"
        left = end - time.monotonic()
        if kept.is_file():
            found[name] = json.loads(kept.read_text(encoding="utf-8"))
        elif left > 0:
            found[name] = run_part(name, chosen, CPU if chosen.dry_run else CUDA, left)
        lines = written(chosen.page, found, chosen.dry_run)
    sys.exit(0 if all(passed for passed, _ in lines) else 1)


if __name__ == "__main__":
    main()
