"""What recovery is worth, and each part of it: the error that training takes off a plan on fresh noise.

    python benchmarks/recover.py [MODEL ...] [--budget 0.27] [--steps N] [--seeds 4 5 6] [--parts NAME ...]

MODEL is what `mpq-deploy build` takes; by default both bundled models. The plan at the budget is trained once per
part and seed, written, and evaluated as `mpq-deploy evaluate` does, on noise that neither rounding nor training nor the
choice of the best state has seen. "Removed" is the share of the plan's error (NMSE of the output, mean over timesteps)
that is gone. With several seeds each figure is the mean, and the spread is the largest less the smallest. CPU minutes
are those of training alone. The check fails when the part "recovery" removes less than half of the error, or takes more
than 30 CPU minutes: 15 minutes of two cores.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from table import Page, bench_parser, bench_recipe, decibels, markdown, verdict, weights_digest

from mpq_deploy.evaluate.evaluation_result import Evaluation
from mpq_deploy.evaluate.variants import evaluate_variants
from mpq_deploy.graph.writers.deployed_graphs import SIMULATED
from mpq_deploy.recover.recover import recover, write_recovered
from mpq_deploy.recover.training_trajectories import TrajectoryRecorder
from mpq_deploy.run.pipeline import open_pipeline
from mpq_deploy.run.view import Run
from mpq_deploy.stages.recover import recover_task
from mpq_deploy.system.progress import PlainTalk

# Settings that differ from the recipe's. "base" is EfficientDM's training as its code has it: adapters and scales at
# its learning rate, the noise as target, all timesteps alike.
PARTS: dict[str, dict[str, Any]] = {
    "base": {
        "losses": {"eps": 1.0},
        "timesteps": "uniform",
        "rank": 32,
        "adapter_rate": 1.0,
        "constant_rate": 0.0,
    },
    "scales alone": {"adapter_rate": 0.0, "constant_rate": 0.0},
    "scales, constants": {"adapter_rate": 0.0},
    "recovery": {},
    "low-rank adapters": {"rank": 32, "adapter_rate": 100.0},
    "+ latents off their codes": {"margin": 0.499, "adapter_rate": 3.0},
    "+ SVD start": {"initialization": "svd"},
    "+ relation": {"losses": {"output": 1.0, "relation": 1e-3}},
    "+ memory": {"losses": {"output": 1.0, "memory": 1e-2}},
    "all timesteps alike": {"timesteps": "uniform"},
}
GOAL, CPU_MINUTES = 0.5, 30.0
HEADER = ("", "held-out NMSE", "NMSE", "removed", "spread", "PSNR dB", "CPU minutes", "minutes")

ABOUT = """\
"recovery" is what `mpq-deploy recover` does by default; each "+" adds one thing to it. A Q/DQ graph in ONNX Runtime on
a CPU is what is evaluated. The weights of the losses "relation" and "memory" were not searched."""


@dataclass(frozen=True)
class Row:
    """One part with one seed: held-out error before and after, and the evaluation's error and PSNR."""

    held_out: tuple[float, float]
    nmse: float
    psnr_db: float
    cpu_minutes: float
    minutes: float


def train_and_evaluate(run: Run, part: str, seed: int, folder: Path) -> Row:
    """Train the plan of an open run as ``part`` says, and evaluate what is written."""
    plan = run.plan
    task = recover_task(run, plan.schemes)
    options = run.recipe.recover.replace(seed=seed, **PARTS[part])
    steps, sampler = run.recipe.calibrate.steps, run.recipe.evaluate.sampler
    recorder = TrajectoryRecorder(run.exported.model, steps, sampler)
    started, cpu = time.monotonic(), time.process_time()
    recovered = recover(task, options, recorder, run.talk, folder / "checkpoint", part)
    minutes, cpu_minutes = (time.monotonic() - started) / 60, (time.process_time() - cpu) / 60
    graph = run.stage("quantize") / SIMULATED
    if recovered.recovery.improved:
        write_recovered(task, recovered, folder)
        graph = folder / SIMULATED
    result = evaluate_variants(run, graph, plan.size_bytes, latency=False).variants["ours"]
    held_out = (recovered.recovery.before, recovered.recovery.after)
    return Row(held_out, result.measured_nmse, result.psnr_db, cpu_minutes, minutes)


def cells(name: str, rows: Sequence[Row], plan_nmse: float) -> list[str]:
    """Return one row of the table: the means over seeds."""
    removed = [1 - row.nmse / plan_nmse for row in rows]
    spread = f"{100 * (max(removed) - min(removed)):.1f} %" if len(rows) > 1 else ""
    mean = {key: float(np.mean([getattr(row, key) for row in rows])) for key in ("nmse", "psnr_db")}
    held = " -> ".join(f"{np.mean([row.held_out[i] for row in rows]):.2e}" for i in (0, 1))
    times = [
        f"{np.mean([getattr(row, key) for row in rows]):.1f}" for key in ("cpu_minutes", "minutes")
    ]
    share = f"{100 * float(np.mean(removed)):.1f} %"
    return [name, held, f"{mean['nmse']:.2e}", share, spread, decibels(mean["psnr_db"]), *times]


def measure_model(model: str, chosen: argparse.Namespace, page: Page) -> bool:
    """Measure one model; say its table and checks; return whether they passed."""
    values = {"model": model, "budget": chosen.budget, "engine.build": False, "recover.steps": 0}
    recipe = bench_recipe(None, chosen.set, values)
    recipe = recipe.model_copy(
        update={"recover": recipe.recover.model_copy(update={"steps": chosen.steps})}
    )
    rows: dict[str, list[Row]] = {part: [] for part in chosen.parts}
    with open_pipeline(recipe, chosen.out / Path(model).stem, PlainTalk()) as pipeline:
        for stage in ("quantize", "controls"):
            pipeline.run_until(stage)
        page.say(f"## {Path(model).stem}, budget {chosen.budget}\n\n{weights_digest(pipeline.run)}")
        plan = planned(pipeline.run)
        for part in chosen.parts:
            for seed in chosen.seeds:
                with tempfile.TemporaryDirectory(dir=pipeline.run.scratch()) as folder:
                    rows[part].append(train_and_evaluate(pipeline.run, part, seed, Path(folder)))
                    pipeline.run.talk.line(" | ".join(cells(part, rows[part][-1:], plan.nmse)))
    first = ["the plan", "", f"{plan.nmse:.2e}", "", "", decibels(plan.psnr_db), "", ""]
    page.say(
        markdown(HEADER, [first, *(cells(part, found, plan.nmse) for part, found in rows.items())])
    )
    if "recovery" not in rows:
        return True
    removed = 1 - float(np.mean([row.nmse for row in rows["recovery"]])) / plan.nmse
    spent = max(row.cpu_minutes for row in rows["recovery"])
    passed = removed >= GOAL and spent <= CPU_MINUTES
    page.say(
        verdict(
            passed,
            f"{model}: at least half of the error is removed",
            f"{100 * removed:.1f} %, {spent:.1f} CPU min",
        )
    )
    return passed


def planned(run: Run) -> Row:
    """Evaluate the plan as it is."""
    plan = run.plan
    graph = run.stage("quantize") / SIMULATED
    found: Evaluation = evaluate_variants(run, graph, plan.size_bytes, latency=False)
    return Row(
        (0.0, 0.0), found.variants["ours"].measured_nmse, found.variants["ours"].psnr_db, 0.0, 0.0
    )


def main() -> None:
    parser = bench_parser(__doc__)
    parser.add_argument(
        "models", nargs="*", default=["emoji", "digits"], help="bundled names, folders, ONNX files"
    )
    parser.add_argument("--budget", default="0.27")
    parser.add_argument("--steps", type=int, default=2050, help="updates of each training")
    parser.add_argument("--seeds", type=int, nargs="+", default=[4, 5, 6])
    parser.add_argument(
        "--parts", nargs="+", choices=list(PARTS), default=list(PARTS), metavar="PART"
    )
    parser.add_argument(
        "-o", "--out", type=Path, default=Path("runs/bench-recover"), help="folder of run folders"
    )
    chosen = parser.parse_args()
    page = Page("Recovery")
    page.say(ABOUT)
    passed = [measure_model(model, chosen, page) for model in chosen.models]
    page.save(chosen.page)
    sys.exit(0 if all(passed) else 1)


if __name__ == "__main__":
    main()
