"""The stage controls: the graphs that the plan is compared with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mpq_deploy.allocate.exponents import best_int8
from mpq_deploy.allocate.plan_solver import PlanSolver
from mpq_deploy.evaluate.variants import CONTROLS_FILE, ControlFacts
from mpq_deploy.graph.writers.plan_graphs import write_plan
from mpq_deploy.rounding.control_schemes import STATIC_INT8, control_plans, layer_counts
from mpq_deploy.run.stage import Stage, version_of
from mpq_deploy.sensitivity.methods import ORM_CONTROLS
from mpq_deploy.sensitivity.steadied import steadied
from mpq_deploy.sensitivity.table import SensitivityTable
from mpq_deploy.stages.allocate import STAGE as ALLOCATE
from mpq_deploy.system.files import Fields, canonical_json

if TYPE_CHECKING:
    from mpq_deploy.run.view import Run


# Raised with every change of what the controls are, or of what their files hold.
CONTROLS_FORMAT = 1


def inputs(run: Run) -> Fields:
    """Return the settings and versions that the stage depends on, beside the stages it reads."""
    # Not the plan: another budget keeps the controls. Those of orm are plans of the same budget.
    like_the_plan = ALLOCATE.fields(run) if run.recipe.measure.method == "orm" else {}
    return {
        **like_the_plan,
        "controls.format": CONTROLS_FORMAT,
        "dialect": run.target.dialect,
        "recipe.evaluate.controls": run.recipe.evaluate.controls,
        **version_of("onnx", "onnx-ir", "numpy"),
    }


def make(run: Run, folder: Path) -> str:
    """Make the stage in ``folder``; return a few words for the log."""
    made: dict[str, ControlFacts] = {}
    if run.recipe.evaluate.controls:
        plans = _control_schemes(run)
        for name in ORM_CONTROLS if run.recipe.measure.method == "orm" else ():
            plans[name] = PlanSolver(run, name).solve(run.recipe.budget).schemes
        for name, schemes in plans.items():
            (folder / name).mkdir()
            size = write_plan(run, schemes, folder / name)
            made[name] = ControlFacts(size_bytes=size, layers=layer_counts(schemes.values()))
    text = {name: facts.model_dump() for name, facts in made.items()}
    (folder / CONTROLS_FILE).write_text(canonical_json(text), encoding="utf-8")
    return ", ".join(f"{name} {facts.size_bytes:,} bytes" for name, facts in made.items()) or "none"


def _control_schemes(run: Run) -> dict[str, dict[str, str]]:
    """Return the controls by name, each as layer -> scheme."""
    graph, target, stats = run.exported.graph, run.target, run.calibration.stats
    table = steadied(SensitivityTable.load(run.stage("measure")))
    plans = control_plans(graph, target, stats)
    plans["int8"] = best_int8(graph.layers, target, table.losses, table.predicts, stats)
    found = {
        name: {layer: scheme.name for layer, scheme in plan.items()} for name, plan in plans.items()
    }
    if found["int8"] == found[STATIC_INT8]:
        del found[STATIC_INT8]
    return found


STAGE = Stage(
    "controls",
    make,
    inputs,
    reads=("export", "calibrate", "candidates", "measure"),
    after=("allocate",),
)
