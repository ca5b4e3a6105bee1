"""How often each trajectory counts in what a plan is for, or a plan for the worst of them.

Worst images: the mean of the n worst trajectories is the maximum of the means over all sets of n trajectories: a
minimax problem, solved by fictitious play. Each round solves for weighted trajectories and then
adds weight to the set that is worst for that plan. The best plan of all rounds is returned; the
first round minimizes the mean over all trajectories. Our choice.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mpq_deploy.allocate.cross_terms import CrossTerms
from mpq_deploy.allocate.milp import Allocation
from mpq_deploy.allocate.problem import Problem
from mpq_deploy.models.spec import Array
from mpq_deploy.sensitivity.table import SensitivityTable

ROUNDS = 5
# How often a trajectory counts that is left out: more than never, so that its error can be divided
# by this.
LEFT_OUT = 1e-6
# The smallest error that a trajectory counts by the inverse of, relative to the mean one.
SMALLEST = 1e-6
Solve = Callable[[Problem, SensitivityTable], tuple[Allocation, CrossTerms]]


def image_weights(table: SensitivityTable, share: float, inverse: bool) -> Array | None:
    """Return how often each trajectory counts, float64 [N] of mean 1; None where all count alike.

    ``inverse``: each counts by the inverse of its own error, so that the objective is about the mean
    PSNR: a few trajectories through which errors grow a thousand times as much as through others
    would decide a plan alone, and they are others in each calibration. The ``share`` of those with
    the largest errors hardly counts. A trajectory's own error is judged before any plan is known: the mean over
    the schemes of each layer alone, summed over layers. Our choice.
    """
    if not table.of_images or table.projections is None or table.calls is None:
        return None
    count = len(np.unique(table.calls))
    errors = np.zeros(count)
    for row in table.projections.values():
        squares = [np.square(vector, dtype=np.float64) for vector in row.values()]
        errors += table.errors_by_call(np.mean(squares, axis=0))
    left_out = round(share * count)
    if not errors.any() or not (inverse or left_out):
        return None
    weights = 1 / np.maximum(errors, SMALLEST * errors.mean()) if inverse else np.ones(count)
    weights[np.argsort(-errors, kind="stable")[:left_out]] *= LEFT_OUT
    return np.asarray(weights * (count / weights.sum()))


def allocate_tail(
    problem: Problem, table: SensitivityTable, share: float, solve: Solve
) -> tuple[Allocation, CrossTerms]:
    """Minimize the mean error of the worst ``share`` of the trajectories of ``table``.

    ``solve`` minimizes the mean over all trajectories, given a problem and a (weighted) table.
    """
    assert table.calls is not None
    count = len(np.unique(table.calls))
    worst = max(1, round(share * count))
    weights, found = np.ones(count), list[tuple[float, Allocation, CrossTerms]]()
    for number in range(1, ROUNDS + 1):
        part = table.weighing(weights)
        plan, crossed = solve(problem.with_losses(part.losses), part)
        errors = table.errors_by_call(table.plan_entries(problem.spread(plan.schemes)))
        order = np.argsort(-errors, kind="stable")[:worst]
        found.append((float(errors[order].mean()), plan, crossed.unweighted(weights)))
        weights *= number / (number + 1)
        weights[order] += count / worst / (number + 1)
    _, best, crossed = min(found, key=lambda one: one[0])
    return best, crossed
