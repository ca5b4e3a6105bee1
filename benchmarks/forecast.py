"""The forecast of every stage beside what it took: bundled models, UNets of random weights, a transformer.

    python benchmarks/forecast.py [MODEL ...]

MODEL is a bundled model (digits, emoji), a size of scale.py (2M, 20M ...) or dit (a diffusion transformer of two
blocks); by default all of digits, emoji, dit, 2M and 20M. Each model is built by a process of its own, from an empty
folder, as users build it; the forecast is the one that was said after its export, which the run folder keeps. The
bundled models have the default recipe, the others its schemes and fewer counts, which change no cost per call. Goal:
the whole build, and each stage of at least a tenth of it, within 1.5 times of the forecast. The exit code is 1 when
one is missed. --kept runs nothing that is there already.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from scale_models import SIZES, make_model
from table import Page, bench_parser, bench_recipe, markdown, verdict

from mpq_deploy.recipe import Recipe, load_recipe
from mpq_deploy.run.forecast import rounding_seconds, stage_seconds
from mpq_deploy.run.machine_speed import Speed, speed_of
from mpq_deploy.run.pipeline import open_pipeline
from mpq_deploy.run.stage_work import ModelWork
from mpq_deploy.run.view import Run
from mpq_deploy.system.progress import PlainTalk, Talk
from mpq_deploy.system.quantities import duration_text

DEMOS = ("digits", "emoji")
MODELS = (*DEMOS, "dit", "2M", "20M")
LATENT = 32
FEW: dict[str, Any] = {
    "calibrate.timesteps": 8,
    "calibrate.samples": 16,
    "calibrate.observed": 8,
    "measure.timesteps": 8,
    "measure.samples": 8,
    "measure.calls": 4,
    "evaluate.samples": 4,
    "evaluate.timesteps": 8,
}
# A forecast may be off by so much; stages of less than this share of the build are not judged alone.
GOAL, SHARE = 1.5, 0.1
RECIPE = "recipe.yaml"


def prepare(name: str, work: Path, changes: list[str]) -> Recipe:
    """Make the model and its recipe in ``work``, unless they are there."""
    if (work / RECIPE).is_file():
        return load_recipe(work / RECIPE)
    work.mkdir(parents=True, exist_ok=True)
    given: dict[str, Any] = {"model": name}
    if name == "dit":
        from transformer_engines import MODELS as TRANSFORMERS
        from transformer_engines import write_model

        given = {**FEW, **write_model("dit", work / "model", 0, TRANSFORMERS["dit"][1])}
    elif name not in DEMOS:
        make_model(SIZES[name], LATENT, work / "model")
        conditions = work / "model" / "conditions.npz"
        given = {**FEW, "model": str(work / "model"), "conditions": str(conditions)}
    recipe = bench_recipe(None, changes, given)
    (work / RECIPE).write_text(recipe.to_yaml(), encoding="utf-8")
    return recipe


def build(work: Path) -> None:
    """Build the model of ``work`` (in a child)."""
    with open_pipeline(load_recipe(work / RECIPE), work / "run", PlainTalk()) as pipeline:
        pipeline.run_until("report")


def beside(run: Path) -> tuple[dict[str, tuple[float, float]], Speed]:
    """Return what each stage was expected to take and took, in seconds, and the speed that was timed."""
    view = Run.opened(run, Talk())
    model = ModelWork.of(view)
    speed = speed_of(view, model, lambda layer: rounding_seconds(layer, view.recipe))
    expected, taken = stage_seconds(view.recipe, model, speed), view.folder.timings()
    both = {name: (expected[name], taken[name]["seconds"]) for name in taken if name in expected}
    return both, speed


def off(pair: tuple[float, float]) -> float:
    """Return by how many times a forecast is off, either way."""
    expected, taken = pair
    return max(expected / taken, taken / max(expected, 1e-9))


def judge(page: Page, name: str, run: Path) -> list[tuple[bool, str]]:
    """Say the table of one model; return its checks."""
    both, speed = beside(run)
    whole = tuple(sum(pair[place] for pair in both.values()) for place in (0, 1))
    rows = [
        [stage, f"{pair[0]:.1f}", f"{pair[1]:.1f}", f"{pair[0] / max(pair[1], 1e-9):.2f}"]
        for stage, pair in [*both.items(), ("together", (whole[0], whole[1]))]
    ]
    page.say(f"## {name}")
    page.say(markdown(("stage", "forecast s", "took s", "forecast / took"), rows))
    timed = ", ".join(f"{1e3 * s:.1f} ms in batches of {n}" for n, s in speed.rows.items())
    page.say(
        f"Timed: a row of the float graph {timed}; a call in torch {1e3 * speed.forward:.1f} ms, a backward pass "
        f"{1e3 * speed.back:.1f} ms; {1e-9 / speed.product:.0f} billion multiplications per second; rounding "
        f"{speed.pace:.2f} times what the constants say."
    )
    long = {stage: pair for stage, pair in both.items() if pair[1] >= SHARE * whole[1]}
    worst = max(long, key=lambda stage: off(long[stage]))
    found = off((whole[0], whole[1]))
    said = f"{duration_text(whole[0])} forecast, {duration_text(whole[1])} taken"
    return [
        (
            found <= GOAL,
            verdict(
                found <= GOAL, f"{name}: the build within {GOAL} times", f"{found:.2f} ({said})"
            ),
        ),
        (
            off(long[worst]) <= GOAL,
            verdict(
                off(long[worst]) <= GOAL,
                f"{name}: each of its {len(long)} long stages within {GOAL} times",
                f"the worst, {worst}, is off by {off(long[worst]):.2f}",
            ),
        ),
    ]


def main() -> None:
    parser = bench_parser(__doc__)
    choices = [*DEMOS, "dit", *SIZES]
    parser.add_argument(
        "models", nargs="*", choices=[[], *choices], metavar="MODEL", help=", ".join(choices)
    )
    parser.add_argument(
        "-o", "--out", type=Path, default=Path("runs") / "bench-forecast", help="folder of the runs"
    )
    parser.add_argument("--kept", action="store_true", help="run nothing that is there already")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.child:
        build(chosen.child)
        return
    page, checks = Page("Forecasts beside what builds took"), []
    for name in chosen.models or MODELS:
        work = chosen.out / name
        if not chosen.kept:
            shutil.rmtree(work, ignore_errors=True)
        prepare(name, work, chosen.set)
        if not (work / "run" / "report.json").is_file():
            load = os.getloadavg()[0]
            command = [sys.executable, str(Path(__file__).resolve()), "--child", str(work)]
            subprocess.run(command, check=True)
            page.say(
                f"{name}: load average {load:.1f} before its build, {os.getloadavg()[0]:.1f} after it."
            )
        checks += judge(page, name, work / "run")
    page.conclude(checks, chosen.page)


if __name__ == "__main__":
    main()
