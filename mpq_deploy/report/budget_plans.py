"""The plans of other budgets and times, each layer's options and its kurtosis, for the report.

In: a run whose plan is made. Out: ``BudgetPlans`` and the layers' kurtosis. Both are kept in the
run folder (``page.json``) under a digest of their inputs; a damaged or foreign file is made again.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import ValidationError

from mpq_deploy.allocate.plan import PrecisionPlan
from mpq_deploy.allocate.plan_solver import PlanSolver, PredictedPlan
from mpq_deploy.allocate.problem import LayerChoice
from mpq_deploy.errors import InputError
from mpq_deploy.formats.scheme import FP16
from mpq_deploy.latency.plan_latency import SHOWN, shown_products
from mpq_deploy.report.data import BudgetPlan, BudgetPlans, LayerOption, PlanTimes
from mpq_deploy.run.folder import RECIPE
from mpq_deploy.run.view import Exported
from mpq_deploy.system.files import canonical_json, read_sealed, sealed_json, write_text

if TYPE_CHECKING:
    from mpq_deploy.run.view import Run

CACHE = "page.json"
# Changes when the file's form or the way to its values does.
CACHE_FORMAT = 3
# So many plans, and so many characters for their layers, at most: they take about a quarter of a
# megabyte of the page, whatever the model (our choice).
MOST_PLANS, MOST_CHARACTERS = 200, 100_000
FEWEST_PLANS = 60


def budget_plans(run: Run, plan: PrecisionPlan, solver: PlanSolver) -> BudgetPlans:
    """Return plans of other sizes and times than ``plan``, and the other options of its layers."""
    record = run.folder.record("allocate")
    fields = {k: v for k, v in (record.inputs if record else {}).items() if k != "recipe.budget"}
    most = most_plans(len(solver.choices))
    made_from = canonical_json({**fields, "most": most, SHOWN: shown_products(run)})
    stored = _read(run).get("budgets", {})
    plans = (
        _stored_plans(stored)
        if isinstance(stored, dict) and stored.get("from") == made_from
        else None
    )
    if plans is None:
        plans = front_plans(solver)
        _keep(run, "budgets", {"from": made_from, "plans": plans.model_dump(mode="json")})
    smaller, larger = zip(
        *(_options(choice, plan, solver.table.predicts) for choice in solver.choices)
    )
    return plans.model_copy(
        update={
            "smaller": {
                name: option for name, option in zip(plans.layers, smaller) if option is not None
            },
            "larger": {
                name: option for name, option in zip(plans.layers, larger) if option is not None
            },
            "command": _command(run),
        }
    )


def front_plans(solver: PlanSolver) -> BudgetPlans:
    """Return the run's plans of which none is better in size, predicted error and time."""
    return packed(solver, solver.front(most_plans(len(solver.choices))))


def most_plans(layers: int) -> int:
    """Return how many plans a page shows of a model of so many layers."""
    return min(MOST_PLANS, max(FEWEST_PLANS, MOST_CHARACTERS // layers))


def layer_kurtoses(run: Run, exported: Exported) -> dict[str, float]:
    """Mean Pearson kurtosis of each layer's weight rows, pre-scaled (MPQ-DM, arXiv 2412.11549)."""
    made_from = canonical_json({name: run.digest(name) for name in ("export", "calibrate")})
    stored = _read(run).get("kurtosis", {})
    if (
        isinstance(stored, dict)
        and stored.get("from") == made_from
        and isinstance(stored.get("values"), dict)
    ):
        return dict(stored["values"])
    from mpq_deploy.sensitivity.kurtosis import layer_kurtosis
    from mpq_deploy.sensitivity.layer_weights import float_matrix

    stats = run.calibration.stats
    layers = [
        layer
        for layer in exported.graph.layers
        if all(name in stats.activations for name in layer.inputs)
    ]
    kurtoses = {
        layer.name: layer_kurtosis(layer, float_matrix(exported.graph, layer), stats)
        for layer in layers
    }
    values = {name: value for name, value in kurtoses.items() if np.isfinite(value)}
    _keep(run, "kurtosis", {"from": made_from, "values": values})
    return values


def packed(solver: PlanSolver, plans: Iterable[PredictedPlan]) -> BudgetPlans:
    """Return plans as the page reads them, by size, with the schemes in use numbered.

    None with a prediction that is not finite.
    """
    kept = sorted(
        (one for one in plans if one.error is None or math.isfinite(one.error)),
        key=lambda one: (one.size_bytes, one.error or 0.0, one.latency_ms or 0.0),
    )
    used = sorted({scheme for one in kept for scheme in one.schemes.values()})
    number = {scheme: i for i, scheme in enumerate(used)}
    return BudgetPlans(
        layers=tuple(choice.name for choice in solver.choices),
        schemes=tuple(used),
        layer_bytes=tuple(
            {number[s]: choice.bytes[s] for s in sorted({one.schemes[choice.name] for one in kept})}
            for choice in solver.choices
        ),
        plans=tuple(
            BudgetPlan(
                size_bytes=one.size_bytes,
                predicted_nmse=one.predicted_loss,
                predicted_psnr_db=one.psnr_db,
                latency_ms=one.latency_ms,
                schemes=tuple(number[one.schemes[choice.name]] for choice in solver.choices),
            )
            for one in kept
        ),
        times=_times(solver),
    )


def _times(solver: PlanSolver) -> PlanTimes | None:
    """Say what the plans' times are; None where nothing is known of the target's speed."""
    costs = solver.costs
    if costs is None:
        return None
    source = costs.source()  # before FP16 is asked for, which some layers may not take
    fp16_ns = costs.plan_ns(solver.layers, {layer.name: FP16 for layer in solver.layers})
    return PlanTimes(fp16_ms=fp16_ns / 1e6, source=source, batch=costs.batch)


def _options(
    choice: LayerChoice, plan: PrecisionPlan, predicts: bool
) -> tuple[LayerOption | None, LayerOption | None]:
    """Return the best smaller option of a layer and the next larger one on its frontier.

    The next is the smallest that has less loss than the plan's scheme. None where there is none.
    """
    taken = plan.schemes[choice.name]
    size, loss = choice.bytes[taken], choice.loss[taken]
    below = [s for s in choice.bytes if choice.bytes[s] < size]
    above = [s for s in choice.bytes if choice.bytes[s] > size and choice.loss[s] < loss]

    def option(scheme: str) -> LayerOption:
        shown = float(choice.loss[scheme]) if predicts else None
        return LayerOption(scheme=scheme, bytes=choice.bytes[scheme], predicted_loss=shown)

    return (
        option(min(below, key=lambda s: (choice.loss[s], choice.bytes[s], s))) if below else None,
        option(min(above, key=lambda s: (choice.bytes[s], choice.loss[s], s))) if above else None,
    )


def _command(run: Run) -> str:
    """Build another plan on this run folder: measuring is done, so it takes seconds.

    Empty where the recipe limits the loss, which only goes with another objective.
    """
    if run.recipe.allocate.max_loss is not None:
        return ""
    recipe, out = run.path / RECIPE, run.path
    return shlex.join(["mpq-deploy", "build", "--recipe", str(recipe), "-o", str(out)])


def _stored_plans(stored: dict[str, Any]) -> BudgetPlans | None:
    try:
        return BudgetPlans.model_validate(stored.get("plans"))
    except ValidationError:
        return None


def _read(run: Run) -> dict[str, Any]:
    """Read what was kept; empty where there is nothing of this form."""
    try:
        kept = read_sealed(run.path / CACHE)
    except InputError:
        return {}
    return kept if kept.get("format") == CACHE_FORMAT else {}


def _keep(run: Run, name: str, value: dict[str, Any]) -> None:
    kept = {**_read(run), "format": CACHE_FORMAT, name: value}
    write_text(run.path / CACHE, sealed_json(kept))
