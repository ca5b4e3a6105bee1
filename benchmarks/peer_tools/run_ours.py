"""The stages of mpq-deploy, each call in a process of its own.

python run_ours.py export MODEL RUN KEY=VALUE ...     open the model, write it as ONNX
python run_ours.py measure RUN                        calibrate, round all candidates, measure the sensitivities
python run_ours.py plan RUN BUDGET SCHEMES OUT        solve for a budget with these schemes (or families), write it
python run_ours.py uniform RUN SCHEMES OUT            give every layer the first of these schemes that it may take
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import yaml

from mpq_deploy.allocate.plan_solver import PlanSolver
from mpq_deploy.graph.writers.plan_graphs import write_plan
from mpq_deploy.recipe import Recipe, load_recipe
from mpq_deploy.rounding.candidate_store import choices_of
from mpq_deploy.run.pipeline import Pipeline, open_pipeline
from mpq_deploy.run.view import Run
from mpq_deploy.system.progress import PlainTalk


def export(model: str, run: Path, *changes: str) -> None:
    values = {
        key: yaml.safe_load(value) for key, value in (change.split("=", 1) for change in changes)
    }
    recipe = load_recipe(None, {"model": model, "engine.build": False, **values})
    within(run, recipe, lambda pipeline: pipeline.current("export"))


def measure(run: Path) -> None:
    within(run, load_recipe(run / "recipe.yaml"), lambda pipeline: pipeline.current("measure"))


def plan(run: Path, budget: str, schemes: str, out: Path) -> None:
    rule = {"layers": "*", "schemes": schemes.split(",")}
    recipe = load_recipe(run / "recipe.yaml", {"allocate.protect": [rule]})

    def write(run: Run) -> None:
        solved = PlanSolver(run).solve(budget)
        write_plan(run, solved.schemes, out)
        say_shares(run, solved.schemes)

    within(run, recipe, lambda pipeline: write(pipeline.run))


def uniform(run: Path, schemes: str, out: Path) -> None:
    def write(run: Run) -> None:
        graph, chosen = run.exported.graph, {}
        for name, choices in choices_of(run, graph).items():
            present = {scheme.name for scheme in choices.schemes}
            chosen[name] = next((s for s in schemes.split(",") if s in present), "fp16")
        write_plan(run, chosen, out)
        say_shares(run, chosen)

    within(run, load_recipe(run / "recipe.yaml"), lambda pipeline: write(pipeline.run))


def within(run: Path, recipe: Recipe, work: Callable[[Pipeline], object]) -> None:
    """Do ``work`` in the run folder; the recipe stored there is what ``export`` was given."""
    stored = run / "recipe.yaml"
    before = stored.read_text(encoding="utf-8") if stored.is_file() else None
    with open_pipeline(recipe, run, PlainTalk()) as pipeline:
        work(pipeline)
    if before is not None:
        stored.write_text(before, encoding="utf-8")


def say_shares(run: Run, chosen: dict[str, str]) -> None:
    """Print the share of the weights by scheme family, for the log."""
    weights: dict[str, int] = {}
    for layer in run.exported.graph.layers:
        family = chosen[layer.name].split("-")[0]
        weights[family] = weights.get(family, 0) + layer.weights
    total = sum(weights.values())
    print(
        ", ".join(
            f"{family} {100 * count / total:.0f} %" for family, count in sorted(weights.items())
        )
    )


if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    if what == "export":
        export(rest[0], Path(rest[1]), *rest[2:])
    elif what == "measure":
        measure(Path(rest[0]))
    elif what == "plan":
        plan(Path(rest[0]), rest[1], rest[2], Path(rest[3]))
    else:
        uniform(Path(rest[0]), rest[1], Path(rest[2]))
