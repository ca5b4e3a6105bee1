"""The stage allocate: a scheme per layer within the budget."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mpq_deploy.allocate.plan_solver import ONE_CALL, PlanSolver
from mpq_deploy.allocate.predicted_images import psnr_text
from mpq_deploy.evaluate.interval import ends_text
from mpq_deploy.latency.costs import int8_warning
from mpq_deploy.latency.plan_latency import SHOWN, latency_inputs, shown_products
from mpq_deploy.run.stage import Stage, settings, version_of
from mpq_deploy.run.stage_memory import check_memory
from mpq_deploy.system.files import Fields

if TYPE_CHECKING:
    from mpq_deploy.allocate.plan import PrecisionPlan
    from mpq_deploy.run.view import Run


# Raised with every change of what plan.json holds.
PLAN_FORMAT = 3


def inputs(run: Run) -> Fields:
    """Return the settings and versions that the stage depends on, beside the stages it reads."""
    rank = run.recipe.lora_slots
    return {
        **({"recipe.lora_slots": rank} if rank else {}),
        "plan.format": PLAN_FORMAT,
        "recipe.budget": str(run.recipe.budget),
        "target.protected": list(run.target.protected),
        **settings(run.recipe.allocate, "allocate"),
        **latency_inputs(run.recipe),
        SHOWN: shown_products(run),
        **version_of("highspy", "numpy"),
    }


def make(run: Run, folder: Path) -> str:
    """Make the stage in ``folder``; return a few words for the log."""
    check_memory(run, STAGE)
    plan = PlanSolver(run).solve(run.recipe.budget)
    plan.save(folder / "plan.json")
    ratio = plan.size_bytes / plan.fp16_size_bytes
    loss = plan.predicted_loss
    predicted = "not predicted"
    if loss is not None:
        predicted = f"predicted NMSE {loss:.2e}{ends_text(plan.predicted_interval)}"
    if plan.predicted_images is not None:
        predicted = f"predicted {psnr_text(plan.predicted_images)}"
    if plan.prediction_note == ONE_CALL:
        run.talk.warn(ONE_CALL)
    kind = "nominal bytes, simulated" if plan.simulated else "bytes"
    warning = int8_warning(plan.latency, len(plan.layers)) if plan.latency else ""
    if warning:
        run.talk.warn(warning)
    tied = f", {len(plan.tied)} groups of q, k and v tied" if plan.tied else ""
    if plan.lora_slots:
        run.talk.line(f"  {plan.notes[-1]}")
    return f"{plan.size_bytes:,} {kind} ({ratio:.4f} of FP16), {predicted}{_speed(plan)}{tied}"


def _speed(plan: PrecisionPlan) -> str:
    if plan.latency is None:
        return ""
    return f", {plan.latency.ours_ms:.3g} ms of layers and other kernels ({plan.latency.source})"


STAGE = Stage(
    "allocate",
    make,
    inputs,
    reads=("export", "candidates", "measure"),
    computes=False,
    noted=frozenset({SHOWN}),
)
