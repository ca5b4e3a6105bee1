"""Allocate in two groups with a budget each (MixDQ, arXiv 2405.17873): content by SSIM, quality by the output's error.

In: a ``Problem``, and the content layers' losses. Out: a plan for each way to split the budget. MixDQ solves integer
programmes and chooses from a family of plans by what the model then does **[its code's description]**; the grid of
splits, and that the second group gets what the first really leaves, are **[ours]**.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace

import numpy as np

from mpq_deploy.allocate.cross_terms import Solved
from mpq_deploy.allocate.milp import LayerChoice, Problem, SolverReport, plan_bytes, smallest_plan
from mpq_deploy.errors import InfeasibleBudgetError

# Ways to split the budget between the least and the most that content can take (our choice).
POINTS = 9


@dataclass(frozen=True)
class Split:
    """A plan of both groups: ``content_bytes`` of the content layers, their own shared scales included."""

    content_bytes: int
    solved: Solved


def split_plans(
    problem: Problem,
    content: Mapping[str, Mapping[str, float]],
    solve: Callable[[Problem], Solved],
    also: Collection[int] = (),
) -> list[Split]:
    """Solve both groups for ``POINTS`` splits, and for ``also`` (bytes of content); return the distinct plans.

    ``content``: layer -> scheme -> loss, in whatever unit; the problem's own losses are those of all other layers.
    Raises InfeasibleBudgetError where the two smallest plans do not fit.
    """
    ours, rest = _part(problem, content), _part(problem, {n.name for n in problem.layers} - set(content))
    ours = replace(ours, layers=[_with_losses(layer, content[layer.name]) for layer in ours.layers])
    room = problem.budget_bytes - problem.fixed_bytes
    least, least_rest = (plan_bytes(part, smallest_plan(part)) for part in (ours, rest))
    if least + least_rest > room:
        smallest = problem.fixed_bytes + least + least_rest
        raise InfeasibleBudgetError(
            f"The smallest plans of MixDQ's two groups take {smallest:,} bytes.",
            "Set allocate.groups to none.",
            smallest,
        )
    most = min(sum(max(layer.bytes.values()) for layer in ours.layers), room - least_rest)
    grid = np.linspace(least, max(least, most), POINTS).astype(np.int64).tolist()
    found: dict[tuple[str, ...], Split] = {}
    for limit in sorted({*grid, *(size for size in also if least <= size <= room - least_rest)}):
        first = solve(replace(ours, budget_bytes=int(limit)))
        used = plan_bytes(ours, first.schemes)
        second = solve(replace(rest, budget_bytes=room - used)) if rest.layers else Solved({}, first.report, 0.0)
        split = Split(used, _both(problem, first, second))
        found.setdefault(tuple(split.solved.schemes.values()), split)
    return list(found.values())


def content_bytes(problem: Problem, content: Collection[str], schemes: Mapping[str, str]) -> int:
    """Return the bytes that the layers ``content`` take under a plan."""
    return plan_bytes(_part(problem, content), schemes)


def _part(problem: Problem, names: Collection[str]) -> Problem:
    """Return the problem of some of the layers alone; what they share with others is counted in full."""
    layers = [layer for layer in problem.layers if layer.name in names]
    foldable = {tensor: readers for tensor, readers in problem.foldable.items() if readers <= set(names)}
    return Problem(layers, 0, 0, foldable)


def _with_losses(layer: LayerChoice, losses: Mapping[str, float]) -> LayerChoice:
    return replace(layer, loss={scheme: losses[scheme] for scheme in layer.bytes})


def _both(problem: Problem, first: Solved, second: Solved) -> Solved:
    """Join two groups' plans; the loss is that of the problem, of which groups prove nothing but that it is above 0."""
    chosen = {**first.schemes, **second.schemes}
    schemes = {layer.name: chosen[layer.name] for layer in problem.layers}
    loss = sum(layer.loss[schemes[layer.name]] for layer in problem.layers)
    reports = (first.report, second.report)
    status = next((r.status for r in reports if r.status != "Optimal"), "Optimal")
    return Solved(schemes, SolverReport(status, max(r.gap for r in reports), loss, 0.0), 0.0)
