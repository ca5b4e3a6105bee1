"""What recovery takes of memory beside what it says before it starts.

    python benchmarks/recover_memory.py [MODEL ...] [--set KEY=VALUE]

MODEL is what `mpq-deploy build` takes; by default both bundled models. Each plan is made once, with rounded weights
and no sensitivity, since memory does not depend on them. Each row then trains two updates in a child process of its
own: the peak is the largest resident memory of that process, from its start to its end. Its share of the estimate is
checked to lie within 25 %; the estimate is for training on a CPU.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from table import Page, bench_parser, bench_recipe, markdown, verdict

from mpq_deploy.recover.recover import expected_memory, recover
from mpq_deploy.recover.training_trajectories import TrajectoryRecorder
from mpq_deploy.run.pipeline import open_pipeline
from mpq_deploy.stages.recover import recover_task
from mpq_deploy.system.progress import PlainTalk

CASES: dict[str, dict[str, int]] = {
    "every code, batch 8": {"rank": 0, "batch_size": 8},
    "every code, batch 32": {"rank": 0, "batch_size": 32},
    "rank 32, batch 8": {"rank": 32, "batch_size": 8},
    "every code, batch 8, 8 segments": {"rank": 0, "batch_size": 8, "segments": 8},
}
QUICK: dict[str, Any] = {
    "engine.build": False,
    "budget": "0.3",
    "calibrate.samples": 4,
    "calibrate.timesteps": 2,
    "calibrate.observed": 4,
    "measure.method": "size-only",
    "measure.samples": 2,
    "allocate.branches": [],
    "allocate.cross_terms": False,
    "quantize.rounding": "nearest",
    "quantize.noise_draws": 0,
    "quantize.refinements": 0,
    "recover.steps": 2,
    "recover.trajectories": 2,
    "recover.held_out": 2,
    "recover.check_every": 2,
}
NEAR = 0.25
HEADER = (
    "",
    "estimate MB",
    "weights",
    "adapters",
    "values",
    "trajectories",
    "peak MB",
    "peak / estimate",
)


def child(recipe_text: str, run: Path) -> None:
    """Train two updates; print what was expected and the peak, bytes."""
    recipe = bench_recipe(None, [], json.loads(recipe_text))
    with (
        open_pipeline(recipe, run, PlainTalk()) as pipeline,
        tempfile.TemporaryDirectory() as folder,
    ):
        plan = pipeline.run.plan
        task, options = recover_task(pipeline.run, plan.schemes), pipeline.recipe.recover
        steps, sampler = recipe.calibrate.steps, recipe.evaluate.sampler
        recorder = TrajectoryRecorder(run.exported.model, steps, sampler)
        estimate = expected_memory(task, options, recorder.calls, pipeline.run.talk)
        recover(task, options, recorder, pipeline.run.talk, Path(folder) / "checkpoint", "memory")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    parts = {
        key: getattr(estimate, key)
        for key in ("total", "weights", "adapters", "values", "trajectories")
    }
    print(json.dumps({**parts, "peak": peak}))


def measure_model(model: str, changes: Sequence[str], out: Path, page: Page) -> list[bool]:
    """Measure all cases of one model; say its table; return whether each was near."""
    run, values = out / Path(model).stem, {**QUICK, "model": model}
    recipe = bench_recipe(None, changes, values)
    with open_pipeline(recipe, run, PlainTalk()) as pipeline:
        pipeline.run_until("quantize")
    rows, near = [], []
    for name, case in CASES.items():
        given = {**values, **{f"recover.{key}": value for key, value in case.items()}}
        command = (sys.executable, __file__, "--child", json.dumps(given), "--out", str(run))
        done = subprocess.run(command, capture_output=True, encoding="utf-8", check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        share = found["peak"] / found["total"]
        near.append(abs(share - 1) <= NEAR)
        sizes = [
            f"{found[key] / 1e6:,.0f}"
            for key in ("total", "weights", "adapters", "values", "trajectories", "peak")
        ]
        rows.append([name, *sizes, f"{share:.2f}"])
    page.say(f"## {Path(model).stem}\n\n{markdown(HEADER, rows)}")
    page.say(
        verdict(
            all(near),
            f"{Path(model).stem}: every peak is within 25 % of the estimate",
            f"{sum(near)} are",
        )
    )
    return near


def main() -> None:
    parser = bench_parser(__doc__)
    parser.add_argument(
        "models", nargs="*", default=["digits", "emoji"], help="bundled names, folders, ONNX files"
    )
    parser.add_argument(
        "-o", "--out", type=Path, default=Path("runs/bench-memory"), help="folder of run folders"
    )
    parser.add_argument("--child", metavar="JSON", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.child:
        child(chosen.child, chosen.out)
        return
    page = Page("Memory of recovery")
    near = [
        ok for model in chosen.models for ok in measure_model(model, chosen.set, chosen.out, page)
    ]
    page.save(chosen.page)
    sys.exit(0 if all(near) else 1)


if __name__ == "__main__":
    main()
