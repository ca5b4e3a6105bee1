"""Time and memory of every stage for UNets of 2 M to 2.57 B parameters with random weights.

    python benchmarks/scale.py [SIZE ...]

SIZE is one of 2M, 20M, 100M, 860M (Stable Diffusion 1.5) and 2570M (SDXL); by default 2M and 20M. Each stage runs in
a process of its own; memory is the peak of the resident memory of that process and its children together, every page
of a mapped file that is in memory included ("private": without those). CPU minutes are those of all its threads.
Goals: each stage of 860M under 8 GB, measuring under 10 minutes (4 timesteps, 4 probes, a latent of 32 x 32) and all
stages under 40 minutes on two cores; allocate, quantize and engine of 2570M under 20 GB. The exit code is 1 when one
is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from scale_models import SIZES, make_model
from table import Page, bench_parser, bench_recipe, markdown, verdict

from mpq_deploy.recipe import Recipe, load_recipe
from mpq_deploy.run.pipeline import open_pipeline
from mpq_deploy.system.progress import PlainTalk

STAGES = ("export", "calibrate", "candidates", "measure", "allocate", "quantize", "engine")
# Few timesteps, calls and schemes: what a stage takes is proportional to them, and quality is not looked at.
SETTINGS: dict[str, Any] = {
    "calibrate.timesteps": 4,
    "calibrate.steps": 4,
    "calibrate.samples": 6,
    "calibrate.observed": 4,
    "calibrate.batch_size": 2,
    "measure.timesteps": 4,
    "measure.probes": 4,
    "measure.samples": 2,
    "measure.calls": 2,
    "measure.batch_size": 2,
    "allocate.schemes": ["fp16", "w8a8", "w4a16-b32", "w4a8-b64"],
    "allocate.branches": [],
    "quantize.hessian_width": 1024,
    "quantize.hessian_rows": 1024,
    "quantize.memory_mb": 1536,
    "quantize.noise_draws": 0,
    "quantize.refinements": 0,
    "engine.batch_opt": 1,
    "engine.batch_max": 2,
    "budget": "0.3",
}
# Size -> most bytes of a stage, and the stages that are held to it.
MOST_BYTES = {"860M": (8e9, STAGES), "2570M": (20e9, ("allocate", "quantize", "engine"))}
MOST_MINUTES, MOST_MEASURE_MINUTES = 40, 10
MEASURED_TIMESTEPS, MEASURED_PROBES = 4, 4
POLL_SECONDS = 0.1


@dataclass
class StageCost:
    """What a stage took; ``written_bytes`` is what it left in the run folder."""

    stage: str
    seconds: float
    cpu_seconds: float
    peak_bytes: int
    private_bytes: int
    written_bytes: int


def tree_memory(pid: int) -> tuple[int, int]:
    """Return the resident and the private bytes of process ``pid`` and all below it; those that ended count nothing."""
    resident = private = 0
    waiting = [pid]
    while waiting:
        one = waiting.pop()
        try:
            status = Path(f"/proc/{one}/status").read_text(encoding="utf-8")
            waiting += [
                int(c)
                for c in Path(f"/proc/{one}/task/{one}/children")
                .read_text(encoding="utf-8")
                .split()
            ]
        except (FileNotFoundError, ProcessLookupError):
            continue
        sizes = {
            line.split(":")[0]: line.split()[1]
            for line in status.splitlines()
            if line.startswith("Rss")
        }
        resident += 1024 * sum(map(int, sizes.values()))
        private += 1024 * int(sizes.get("RssAnon", 0))
    return resident, private


def in_child(arguments: Sequence[str], script: str = __file__) -> StageCost:
    """Run a script (this one) with ``arguments`` and watch it. Raises CalledProcessError when it fails."""
    started, before = time.monotonic(), os.times()
    command = [sys.executable, str(Path(script).resolve()), *arguments]
    peak = private = 0
    with subprocess.Popen(command) as child:
        while child.poll() is None:
            found = tree_memory(child.pid)
            peak, private = max(peak, found[0]), max(private, found[1])
            time.sleep(POLL_SECONDS)
    if child.returncode:
        raise subprocess.CalledProcessError(child.returncode, command)
    after = os.times()
    cpu = (
        after.children_user + after.children_system - before.children_user - before.children_system
    )
    return StageCost(arguments[1], time.monotonic() - started, cpu, peak, private, 0)


def run_stage(name: str, recipe: Recipe, run: Path) -> None:
    """Make the stage ``name``; those before it are there."""
    with open_pipeline(recipe, run, PlainTalk()) as pipeline:
        pipeline.run_until(name)


def stage_costs(size: str, work: Path, recipe: Recipe, stages: Sequence[str]) -> list[StageCost]:
    """Make the model and run the stages, each in a child; those measured before by the same call are kept."""
    kept = work / "costs.json"
    work.mkdir(parents=True, exist_ok=True)
    costs = (
        [StageCost(**values) for values in json.loads(kept.read_text(encoding="utf-8"))]
        if kept.is_file()
        else []
    )
    (work / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    for stage in ("model", *stages):
        if any(cost.stage == stage for cost in costs):
            continue
        cost = in_child(
            ["--child", stage, "--out", str(work), "--latent", str(latent_of(recipe)), size]
        )
        folder = work / "model" if stage == "model" else work / "run" / stage
        cost.written_bytes = sum(
            path.stat().st_size for path in folder.rglob("*") if path.is_file()
        )
        costs.append(cost)
        kept.write_text(json.dumps([asdict(c) for c in costs], indent=1) + "\n", encoding="utf-8")
        print(f"{size} {cost}", file=sys.stderr, flush=True)
    return [cost for cost in costs if cost.stage in ("model", *stages)]


def latent_of(recipe: Recipe) -> int:
    """Return the side of the latent, which the folder's name ends in."""
    return int(Path(str(recipe.model)).parent.name.rpartition("-")[2])


def settings_text(recipe: Recipe) -> str:
    """Say what the stages did: every setting that this benchmark chooses, as the recipe has it."""
    values = recipe.model_dump(mode="json")
    found = []
    for key in SETTINGS:
        section, _, name = key.rpartition(".")
        found.append(f"{key} {(values[section] if section else values)[name]}")
    return ", ".join([*found, f"quantize.rounding {recipe.quantize.rounding}"])


def cost_table(costs: Sequence[StageCost]) -> str:
    """Return one row per stage and their sum."""
    rows = [
        [
            cost.stage,
            f"{cost.seconds / 60:.1f}",
            f"{cost.cpu_seconds / 60:.1f}",
            f"{cost.peak_bytes / 1e9:.2f}",
            f"{cost.private_bytes / 1e9:.2f}",
            f"{cost.written_bytes / 1e6:,.0f}",
        ]
        for cost in costs
    ]
    made = [cost for cost in costs if cost.stage != "model"]
    total = [sum(c.seconds for c in made) / 60, sum(c.cpu_seconds for c in made) / 60]
    peaks = [max(c.peak_bytes for c in made) / 1e9, max(c.private_bytes for c in made) / 1e9]
    rows.append(["all stages", *(f"{t:.1f}" for t in total), *(f"{p:.2f}" for p in peaks), ""])
    return markdown(
        ("stage", "minutes", "CPU minutes", "peak GB", "private GB", "MB written"), rows
    )


def goals(size: str, costs: Sequence[StageCost], recipe: Recipe) -> list[tuple[bool, str]]:
    """Compare what ``costs`` hold with the goals of ``size``; those of time only where ``recipe`` measures so much."""
    made = [cost for cost in costs if cost.stage != "model"]
    found = []
    if size in MOST_BYTES:
        limit, stages = MOST_BYTES[size]
        most = max(
            (cost for cost in made if cost.stage in stages), key=lambda cost: cost.peak_bytes
        )
        passed = most.peak_bytes < limit
        which = "every stage stays" if stages == STAGES else f"{', '.join(stages)} stay"
        what = f"{size}: {which} under {limit / 1e9:g} GB"
        found.append(
            (passed, verdict(passed, what, f"{most.peak_bytes / 1e9:.2f} GB ({most.stage})"))
        )
    minutes = {cost.stage: cost.seconds / 60 for cost in made}
    wanted = (
        recipe.measure.timesteps >= MEASURED_TIMESTEPS and recipe.measure.probes >= MEASURED_PROBES
    )
    if size == "860M" and wanted and set(STAGES) <= set(minutes):
        passed = minutes["measure"] < MOST_MEASURE_MINUTES
        what = f"{size}: measuring takes less than {MOST_MEASURE_MINUTES} minutes"
        found.append((passed, verdict(passed, what, f"{minutes['measure']:.1f}")))
        passed = sum(minutes.values()) < MOST_MINUTES
        what = f"{size}: all stages take less than {MOST_MINUTES} minutes"
        found.append((passed, verdict(passed, what, f"{sum(minutes.values()):.1f}")))
    return found


def main() -> None:
    parser = bench_parser(__doc__)
    parser.add_argument(
        "sizes", nargs="*", choices=[[], *SIZES], metavar="SIZE", help=", ".join(SIZES)
    )
    parser.add_argument("--latent", type=int, default=32, help="side of the latent (default 32)")
    parser.add_argument("--until", default=STAGES[-1], choices=STAGES, help="the last stage")
    parser.add_argument(
        "-o", "--out", type=Path, default=Path("runs") / "bench-scale", help="folder of the runs"
    )
    parser.add_argument(
        "--keep", action="store_true", help="keep models and runs, which take gigabytes"
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.child == "model":
        print(
            f"{make_model(SIZES[chosen.sizes[0]], chosen.latent, chosen.out / 'model'):,} parameters"
        )
        return
    if chosen.child:
        run_stage(chosen.child, load_recipe(chosen.out / "recipe.yaml"), chosen.out / "run")
        return
    page, checks = Page("Time and memory by size of the model"), []
    for size in chosen.sizes or ("2M", "20M"):
        work = chosen.out / f"{size}-{chosen.latent}"
        model = {"model": str(work / "model"), "conditions": str(work / "model" / "conditions.npz")}
        recipe = bench_recipe(None, chosen.set, {**SETTINGS, **model})
        costs = stage_costs(size, work, recipe, STAGES[: STAGES.index(chosen.until) + 1])
        page.say(f"## {size}, latent {chosen.latent} x {chosen.latent}")
        page.say(cost_table(costs))
        page.say(f"Settings: {settings_text(recipe)}.")
        checks += goals(size, costs, recipe)
        if not chosen.keep:
            shutil.rmtree(work)
    if checks:
        page.conclude(checks, chosen.page)


if __name__ == "__main__":
    main()
