"""The stage controls: the graphs that the plan is compared with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mpq_deploy.allocate.exponents import best_int8
from mpq_deploy.allocate.plan_solver import PlanSolver
from mpq_deploy.graph.writers.plan_graphs import write_plan
from mpq_deploy.rounding.candidate_store import CONTROLS, STATIC_INT8, control_scheme
from mpq_deploy.run.stage import Stage, version_of
from mpq_deploy.sensitivity.methods import ORM_CONTROLS
from mpq_deploy.sensitivity.table import SensitivityTable
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
        for name, schemes in _control_schemes(run).items():
            (folder / name).mkdir()
            sizes[name] = write_plan(run, schemes, folder / name)
        for name in ORM_CONTROLS if run.recipe.measure.method == "orm" else ():
            (folder / name).mkdir()
            plan = PlanSolver(run, name).solve(run.recipe.budget)
            sizes[name] = write_plan(run, plan.schemes, folder / name)
    (folder / "sizes.json").write_text(canonical_json(sizes), encoding="utf-8")
    return ", ".join(f"{name} {size:,} bytes" for name, size in sizes.items()) or "none"


def _control_schemes(run: Run) -> dict[str, dict[str, str]]:
    """Return the controls by name, each as layer -> scheme."""
    layers, target = run.exported.graph.layers, run.target
    stats = run.calibration.stats
    table = SensitivityTable.load(run.stage("measure"))
    found = {
        name: {layer.name: control_scheme(layer, preferred, target, stats).name for layer in layers}
        for name, preferred in CONTROLS.items()
    }
    best = best_int8(layers, target, table.losses, table.predicts_nmse, stats)
    found["int8"] = {name: scheme.name for name, scheme in best.items()}
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
