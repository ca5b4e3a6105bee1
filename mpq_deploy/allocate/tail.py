"""Plans that minimize the mean error of the worst images (a share of the trajectories).

The mean of the n worst trajectories is the maximum of the means over all sets of n trajectories: a
minimax problem, solved by fictitious play. Each round solves for weighted trajectories and then
adds weight to the set that is worst for that plan. The best plan of all rounds is returned; the
first round minimizes the mean over all trajectories. Our choice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from mpq_deploy.allocate.cross_terms import CrossTerms
from mpq_deploy.allocate.milp import Allocation
from mpq_deploy.allocate.problem import Problem
from mpq_deploy.sensitivity.table import SensitivityTable

ROUNDS = 5
Solve = Callable[[Problem, SensitivityTable], tuple[Allocation, CrossTerms]]


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
        # Undo the weights: predictions are for unweighted trajectories.
        own = tuple(float(error) for error in np.array(crossed.by_call) / weights)
        errors = table.errors_by_call(table.plan_entries(problem.spread(plan.schemes)))
        order = np.argsort(-errors, kind="stable")[:worst]
        found.append((float(errors[order].mean()), plan, replace(crossed, by_call=own)))
        weights *= number / (number + 1)
        weights[order] += count / worst / (number + 1)
    _, best, crossed = min(found, key=lambda one: one[0])
    return best, crossed
