"""The plans of a grid of budgets, each layer's options and its kurtosis, for the report.

In: a run whose plan is made. Out: ``BudgetPlans`` and the layers' kurtosis. Both take seconds, so
they are kept in the run folder (``page.json``) under a digest of their inputs; a damaged or foreign
file is made again.
"""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import ValidationError

from mpq_deploy.allocate.plan import PrecisionPlan
from mpq_deploy.allocate.plan_solver import PlanSolver
from mpq_deploy.allocate.problem import LayerChoice
from mpq_deploy.errors import InfeasibleLatencyError, InputError
from mpq_deploy.report.data import BudgetPlan, BudgetPlans, LayerOption
from mpq_deploy.run.view import RECIPE, Exported
from mpq_deploy.system.files import canonical_json, read_sealed, sealed_json, write_text

if TYPE_CHECKING:
    from mpq_deploy.run.view import Run

# Schemes by layer, bytes, predicted loss.
Plan = tuple[dict[str, str], int, float | None]

CACHE = "page.json"
# Changes when the file's form or the way to its values does.
CACHE_FORMAT = 1
# The grid, in shares of the FP16 size (our choice): from the smallest feasible budget up to HIGH,
# at least SPAN beyond that and ROOM beyond the run's own.
STEP, HIGH, SPAN, ROOM = 0.01, 0.6, 0.3, 0.05
# A plan on the curve may cost this share more than the best one; nobody builds it.
GAP = 1e-3
# The whole grid's limit in seconds of this process. Coarse budgets come first, so what is solved
# when the time is up is spread evenly.
MOST_SECONDS = 20.0


def budget_plans(run: Run, plan: PrecisionPlan) -> BudgetPlans:
    """Return plans of a grid of budgets around ``plan``, and the other options of its layers."""
    solver = PlanSolver(run)
    record = run.folder.record("allocate")
    fields = {k: v for k, v in (record.inputs if record else {}).items() if k != "recipe.budget"}
    ratio = plan.budget_bytes / plan.fp16_size_bytes
    made_from = canonical_json(
        {**fields, "highest": _highest(solver.smallest / solver.fp16_size, ratio)}
    )
    stored = _read(run).get("budgets", {})
    plans = (
        _stored_plans(stored)
        if isinstance(stored, dict) and stored.get("from") == made_from
        else None
    )
    if plans is None:
        plans = grid_plans(run, solver, ratio)
        if len(plans.plans) == plans.wanted:
            _keep(run, "budgets", {"from": made_from, "plans": plans.model_dump(mode="json")})
    smaller, larger = zip(
        *(_options(choice, plan, solver.table.predicts_nmse) for choice in solver.choices)
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


def grid_plans(run: Run, solver: PlanSolver, ratio: float) -> BudgetPlans:
    """Solve the grid of budgets up to ``ratio`` at least, coarse first, in ``MOST_SECONDS``."""
    budgets = grid(solver.smallest, solver.fp16_size, ratio)
    solved: dict[int, Plan] = {}
    started = time.process_time()
    stopped = False
    with run.talk.bar("plans of other budgets", len(budgets)) as advance:
        for budget in coarse_first(budgets):
            stopped = bool(solved) and time.process_time() - started > MOST_SECONDS
            if stopped:
                break
            try:
                plan = solver.unrefined(budget, GAP)
            except InfeasibleLatencyError:
                plan = None  # no plan of this size is fast enough: the curve starts later
            if plan is not None:
                solved[budget] = plan
            advance(1)
    return packed(solver, undominated(solved.values()), len(budgets) if stopped else 0)


def grid(smallest: int, fp16_size: int, ratio: float) -> list[int]:
    """Return budgets in bytes, ascending: the smallest feasible, then every ``STEP`` of FP16."""
    low = smallest / fp16_size
    first, last = math.floor(low / STEP) + 1, round(_highest(low, ratio) / STEP)
    steps = [int(number * STEP * fp16_size) for number in range(first, last + 1)]
    return sorted({smallest, *(step for step in steps if step > smallest)})


def coarse_first(values: Sequence[int]) -> list[int]:
    """Return ``values`` so that every prefix is spread evenly: every 16th, 8th, 4th ..."""
    order: dict[int, None] = {}
    for stride in (16, 8, 4, 2, 1):
        order.update(dict.fromkeys(range(0, len(values), stride)))
    return [values[number] for number in order]


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


def undominated(plans: Iterable[Plan]) -> list[Plan]:
    """Drop plans whose predicted loss a smaller plan equals; keep all where none is predicted."""
    kept: list[Plan] = []
    for plan in sorted(plans, key=lambda plan: plan[1]):
        if not kept or plan[2] is None or kept[-1][2] is None or plan[2] < kept[-1][2]:
            kept.append(plan)
    return kept


def packed(solver: PlanSolver, solved: Iterable[Plan], wanted: int = 0) -> BudgetPlans:
    """Return plans as the page reads them, with the schemes in use numbered.

    One plan per size, none with a non-finite prediction. ``wanted``: how many there would be if
    some are missing.
    """
    by_size = {
        size: (schemes, loss)
        for schemes, size, loss in solved
        if loss is None or math.isfinite(loss)
    }
    used = sorted({scheme for schemes, _ in by_size.values() for scheme in schemes.values()})
    number = {scheme: i for i, scheme in enumerate(used)}
    names = tuple(choice.name for choice in solver.choices)
    return BudgetPlans(
        layers=names,
        schemes=tuple(used),
        layer_bytes=tuple(
            {
                number[s]: c.bytes[s]
                for s in sorted({schemes[c.name] for schemes, _ in by_size.values()})
            }
            for c in solver.choices
        ),
        plans=tuple(
            BudgetPlan(
                size_bytes=size,
                predicted_nmse=loss,
                schemes=tuple(number[schemes[name]] for name in names),
            )
            for size, (schemes, loss) in sorted(by_size.items())
        ),
        wanted=max(wanted, len(by_size)),
    )


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


def _highest(low: float, ratio: float) -> float:
    return min(1.0, max(HIGH, low + SPAN, math.ceil((ratio + ROOM) / STEP) * STEP))


def _command(run: Run) -> str:
    """Build another budget on this run folder: measuring is done, so it takes seconds."""
    recipe, out = run.path / RECIPE, run.path
    return shlex.join(["mpq-deploy", "build", "--recipe", str(recipe), "-o", str(out), "--budget"])


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
