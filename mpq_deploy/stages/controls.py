"""The stage controls: the graphs that the plan is compared with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mpq_deploy.allocate.plan_solver import PlanSolver
from mpq_deploy.graph.writers.plan_graphs import write_plan
from mpq_deploy.rounding.candidate_store import CONTROLS, control_scheme
from mpq_deploy.run.stage import Stage, version_of
from mpq_deploy.sensitivity.methods import ORM_CONTROLS
from mpq_deploy.stages.allocate import STAGE as ALLOCATE
from mpq_deploy.system.files import Fields, canonical_json

if TYPE_CHECKING:
    from mpq_deploy.run.view import Run


def inputs(run: Run) -> Fields:
    """Return the settings and versions that the stage depends on, beside the stages it reads."""
    # Not the plan: another budget keeps the controls. Those of orm are plans of the same budget.
    like_the_plan = ALLOCATE.fields(run) if run.recipe.measure.method == "orm" else {}
    return {
        **like_the_plan,
        "dialect": run.target.dialect,
        "recipe.evaluate.controls": run.recipe.evaluate.controls,
        **version_of("onnx", "onnx-ir", "numpy"),
    }


def make(run: Run, folder: Path) -> str:
    """Make the stage in ``folder``; return a few words for the log."""
    sizes = {}
    if run.recipe.evaluate.controls:
        layers = run.exported.graph.layers
        target, stats = run.target, run.calibration.stats
        for name, preferred in CONTROLS.items():
            schemes = {
                layer.name: control_scheme(layer, preferred, target, stats).name for layer in layers
            }
            (folder / name).mkdir()
            sizes[name] = write_plan(run, schemes, folder / name)
        for name in ORM_CONTROLS if run.recipe.measure.method == "orm" else ():
            (folder / name).mkdir()
            plan = PlanSolver(run, name).solve(run.recipe.budget)
            sizes[name] = write_plan(run, plan.schemes, folder / name)
    (folder / "sizes.json").write_text(canonical_json(sizes), encoding="utf-8")
    return ", ".join(f"{name} {size:,} bytes" for name, size in sizes.items()) or "none"


STAGE = Stage(
    "controls",
    make,
    inputs,
    reads=("export", "calibrate", "candidates"),
    after=("allocate",),
)
