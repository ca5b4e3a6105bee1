"""One program over the parts of a pipeline, which gives each part its share of budget and time.

In: each part's own problem, its gain and its calls per image. Out: the bytes, and the nanoseconds
of one call, that each part may take for the minimum predicted error of the final images.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from mpq_deploy.allocate.milp import Allocation, allocate, limited, penalty_per_kernel
from mpq_deploy.allocate.problem import LayerChoice, Plan, Problem
from mpq_deploy.errors import InfeasibleBudgetError
from mpq_deploy.recipe import AllocateSettings


@dataclass(frozen=True)
class PartProblem:
    """A part's problem (its budget is ignored), the gain of its losses, and its calls per image."""

    problem: Problem
    gain: float
    calls: float = 1.0


@dataclass(frozen=True)
class Share:
    """What a part may take: bytes, and nanoseconds of one call (None: no limit).

    ``plan``: the part's schemes in the joint plan; ``loss``: their error in the final images.
    """

    bytes: int
    latency_ns: int | None
    plan: dict[str, str]
    loss: float


def joint_problem(parts: Mapping[str, PartProblem], budget_bytes: int) -> Problem:
    """Return all parts' layers as one problem, with losses x gain and nanoseconds x calls."""
    layers: list[LayerChoice] = []
    foldable: dict[str, frozenset[str]] = {}
    times: dict[str, int] = {}
    fixed_ns = 0
    for name, part in parts.items():
        scope = f"{name}/"
        layers += [_scaled(layer, part, scope) for layer in part.problem.layers]
        for tensor, readers in part.problem.foldable.items():
            foldable[scope + tensor] = frozenset(scope + reader for reader in readers)
        for quantizer, ns in part.problem.quantizer_ns.items():
            times[scope + quantizer] = round(ns * part.calls)
        fixed_ns += round(part.problem.fixed_ns * part.calls)
    fixed = sum(part.problem.fixed_bytes for part in parts.values())
    return Problem(layers, fixed, budget_bytes, foldable, times, fixed_ns)


def _scaled(layer: LayerChoice, part: PartProblem, scope: str) -> LayerChoice:
    return replace(
        layer,
        name=scope + layer.name,
        loss={scheme: part.gain * loss for scheme, loss in layer.loss.items()},
        latency_ns={scheme: round(ns * part.calls) for scheme, ns in layer.latency_ns.items()},
        members=tuple(scope + member for member in layer.members),
        scope=scope,
    )


def solve_jointly(
    parts: Mapping[str, PartProblem], budget_bytes: int, section: AllocateSettings, timed: bool
) -> dict[str, Share]:
    """Return each part's share of the budget for the section's objective.

    ``timed``: the latency of every part's layers is known. The latency limit is for all calls of an
    image. Bytes that the plan leaves of the budget are distributed in proportion to the parts'
    bytes. Raises InfeasibleBudgetError, which names the smallest feasible budget, and
    InfeasibleLatencyError.
    """
    problem = joint_problem(parts, budget_bytes)

    def solved(one: Problem) -> Allocation:
        return allocate(one, section, penalty_per_kernel(one, section))

    if timed:
        limit = section.max_latency
        problem = replace(problem, max_latency_ns=limit.nanoseconds if limit else None)
        problem = limited(problem, section, solved)
    try:
        schemes = solved(problem).schemes
    except InfeasibleBudgetError as error:
        raise InfeasibleBudgetError(
            f"No plan of all parts fits the budget of {budget_bytes:,} bytes.",
            f"The smallest feasible budget is {error.smallest:,} bytes; pin fewer parts, or allow smaller schemes.",
            error.smallest,
        ) from error
    plans = {name: _own(schemes, name) for name in parts}
    left = budget_bytes - problem.plan_bytes(schemes)
    return _shares(parts, plans, left, timed=problem.max_latency_ns is not None)


def _own(schemes: Plan, name: str) -> dict[str, str]:
    scope = f"{name}/"
    return {k.removeprefix(scope): v for k, v in schemes.items() if k.startswith(scope)}


def _shares(
    parts: Mapping[str, PartProblem], plans: Mapping[str, dict[str, str]], left: int, timed: bool
) -> dict[str, Share]:
    sizes = {name: part.problem.plan_bytes(plans[name]) for name, part in parts.items()}
    whole = sum(sizes.values())
    shares = {}
    for name, part in parts.items():
        problem, plan = part.problem, plans[name]
        more = math.floor(max(left, 0) * sizes[name] / whole)
        time = problem.plan_ns(plan) if timed else None
        loss = part.gain * problem.plan_loss(plan)
        shares[name] = Share(sizes[name] + more, time, plan, loss)
    return shares
