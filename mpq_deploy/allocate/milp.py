"""Choose one scheme per layer for minimum predicted loss within the budget: a MILP in HiGHS.

In: a ``Problem`` and an ``Objective``. Out: a plan (layer -> scheme) that never exceeds the
problem's limits.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mpq_deploy.allocate.problem import LayerChoice, Objective, Problem
from mpq_deploy.errors import InfeasibleBudgetError, InfeasibleLatencyError, MpqError, UsageError
from mpq_deploy.formats.scheme import SCHEMES
from mpq_deploy.models.spec import Array
from mpq_deploy.recipe import AllocateSettings
from mpq_deploy.system.highs import LinearProgram, Outcome, Row, solve_program

# Where a plan's objective is a smaller share of the largest single cost, it is solved again without
# the large costs, as HiGHS' tolerances are absolute.
SMALL_OBJECTIVE = 1e-4
# How often a solution may exceed a limit by HiGHS' tolerance before an error is raised.
ATTEMPTS = 4


@dataclass(frozen=True)
class SolverReport:
    """How the solver ended. ``gap``: relative, of the objective; ``bound``: proven minimum loss."""

    status: str
    gap: float
    loss: float
    bound: float


@dataclass(frozen=True)
class Allocation:
    """A plan, how the solver ended, and the penalty per branch kernel (in units of the loss)."""

    schemes: dict[str, str]
    report: SolverReport
    kernel_penalty: float = 0.0


@dataclass(frozen=True)
class Solution:
    """HiGHS' plan, with the objective's ``value`` and its proven minimum ``bound``."""

    schemes: dict[str, str]
    status: str
    value: float
    bound: float


@dataclass(frozen=True)
class Nearby:
    """A limit on the distance from a ``current`` plan: at most ``moves`` layers change."""

    current: Mapping[str, str]
    moves: int


def allocate(
    problem: Problem, section: AllocateSettings | None = None, kernel_penalty: float = 0.0
) -> Allocation:
    """Minimize the predicted loss within the problem's limits, to the section's ``gap``.

    ``kernel_penalty``: loss added per branch kernel (``penalty_per_kernel``); the report's loss and
    bound are without it. Deterministic. Raises InfeasibleBudgetError, which names the smallest
    feasible budget, and InfeasibleLatencyError, which names the minimum latency within the budget.
    """
    section = section or AllocateSettings()
    _check_budget(problem, section)
    _check_latency(problem, section)
    objective = Objective.predicted_loss(problem, kernel_penalty)
    solution = solve(problem, objective, section.gap, section.time_limit)
    largest = max(cost for layer in problem.layers for cost in objective.costs[layer.name].values())
    if 0 < solution.value < SMALL_OBJECTIVE * largest:
        # HiGHS' tolerances are absolute, and costs are scaled by the largest one. A scheme that
        # alone costs more than a known plan is in no better plan: without such schemes the
        # remaining costs have similar sizes.
        affordable = _affordable(problem, objective, solution)
        finer = solve(affordable, objective, section.gap, section.time_limit)
        solution = finer if finer.value <= solution.value else solution
    gap = (solution.value - solution.bound) / abs(solution.value) if solution.value else 0.0
    loss = problem.plan_loss(solution.schemes)
    added = sum(layer.kernels(solution.schemes[layer.name]) for layer in problem.layers)
    penalty = added * kernel_penalty
    report = SolverReport(solution.status, gap, loss, min(loss, solution.bound - penalty))
    return Allocation(solution.schemes, report, kernel_penalty)


def penalty_per_kernel(problem: Problem, section: AllocateSettings) -> float:
    """Return the penalty per branch kernel: ``section.branch_penalty`` times a plan's loss.

    The plan is the best one without branches (where none fits, with unpenalized branches), so that
    the setting has no unit and suits every budget. Our choice. 0 where no layer may take a branch.
    """
    branches = any(SCHEMES[s].branch for layer in problem.layers for s in layer.bytes)
    if not section.branch_penalty or not branches:
        return 0.0
    try:
        report = allocate(problem.without_branches(), section).report
    except (InfeasibleBudgetError, InfeasibleLatencyError):
        report = allocate(problem, section).report
    return section.branch_penalty * report.loss


def fastest_plan(problem: Problem, section: AllocateSettings | None = None) -> dict[str, str]:
    """Return the plan of minimum latency within ``problem.max_loss`` and a feasible budget.

    ``problem.max_latency_ns`` is ignored. Raises UsageError, which names the minimum loss, where no
    plan has a loss of at most ``problem.max_loss``.
    """
    section = section or AllocateSettings()
    free = replace(problem, max_latency_ns=None)
    if problem.max_loss is not None:
        least = allocate(replace(free, max_loss=None), section)
        minimum, free = least.report.loss, replace(free, start=least.schemes)
        if minimum > problem.max_loss:
            raise UsageError(
                f"No plan within the budget has a predicted loss of at most {problem.max_loss:.3g}.",
                f"The minimum is {minimum:.3g} (allocate.max_loss).",
            )
    return solve(free, Objective.latency(problem), 0.0, section.time_limit).schemes


def balanced_plan(problem: Problem, section: AllocateSettings, least: float) -> dict[str, str]:
    """Return the fastest plan whose loss is at most ``section.slack`` times ``least``.

    ``least``: the minimum loss within the budget. Solved to the section's gap.
    """
    slack = replace(problem, max_latency_ns=None, max_loss=section.slack * least)
    return solve(slack, Objective.latency(problem), section.gap, section.time_limit).schemes


def limited(
    problem: Problem, section: AllocateSettings, allocated: Callable[[Problem], Allocation]
) -> Problem:
    """Return ``problem`` with its latency limited to that of the fastest plan for the objective.

    Unchanged for the objective quality, for a budget that is too small, and where the problem's own
    limit is lower. ``allocated``: solves a problem without cross terms.
    """
    limit = problem.max_latency_ns
    if (
        section.objective == "quality"
        # ``allocate`` raises the error that names the smallest feasible budget.
        or problem.plan_bytes(problem.smallest_plan()) > problem.budget_bytes
    ):
        return problem
    if section.objective == "balanced":
        least = allocated(problem)
        known = replace(problem, start=least.schemes)
        found = balanced_plan(known, section, least.report.loss)
    else:
        found = fastest_plan(replace(problem, max_loss=section.max_loss), section)
    minimum = problem.plan_ns(found)
    return (
        problem
        if limit is not None and limit < minimum
        else replace(problem, max_latency_ns=minimum, start=found)
    )


def _check_budget(problem: Problem, section: AllocateSettings) -> None:
    """Raise InfeasibleBudgetError when no plan is within the budget."""
    minimum = problem.plan_bytes(problem.smallest_plan())
    if minimum > problem.budget_bytes:
        # The choice layer by layer counts shared activation scales repeatedly: solve exactly.
        unlimited = replace(problem, budget_bytes=sys.maxsize, max_latency_ns=None)
        frugal = solve(unlimited, Objective.size(problem), 0.0, section.time_limit)
        minimum = problem.plan_bytes(frugal.schemes)
    if minimum > problem.budget_bytes:
        raise InfeasibleBudgetError(
            f"No plan fits {problem.budget_bytes:,} bytes: the smallest takes {minimum:,} bytes.",
            "Raise the budget, allow smaller schemes in the recipe, or protect fewer layers.",
            minimum,
        )


def _check_latency(problem: Problem, section: AllocateSettings) -> None:
    """Raise InfeasibleLatencyError when no plan within the budget is fast enough."""
    if problem.max_latency_ns is None or problem.fits(problem.smallest_plan()):
        return
    minimum = problem.plan_ns(fastest_plan(problem, section))
    if minimum > problem.max_latency_ns:
        raise InfeasibleLatencyError(
            f"No plan within the budget takes at most {problem.max_latency_ns / 1e6:,.6g} ms: "
            f"the fastest takes {ceil_ms(minimum)} ms.",
            "Raise the limit on latency or the budget, or allow more schemes in the recipe.",
            minimum,
        )


def ceil_ms(nanoseconds: int) -> str:
    """Return the milliseconds of ``nanoseconds``, rounded up to three decimals (``1.235``)."""
    return f"{-(-nanoseconds // 1000) / 1000:,.3f}"


def _affordable(problem: Problem, objective: Objective, solution: Solution) -> Problem:
    """Leave out the schemes that alone cost more than the whole plan of ``solution``."""

    def schemes(layer: LayerChoice) -> list[str]:
        costs, chosen = objective.costs[layer.name], solution.schemes[layer.name]
        return [s for s in layer.bytes if s == chosen or costs[s] <= solution.value]

    return replace(problem, layers=[layer.only(schemes(layer)) for layer in problem.layers])


def solve(
    problem: Problem,
    objective: Objective,
    gap: float,
    time_limit: float,
    near: Nearby | None = None,
) -> Solution:
    """Solve a feasible problem; costs may be negative (changes of a loss).

    HiGHS satisfies constraints only to a tolerance, so the exact integer bytes and nanoseconds are
    checked and enforced here. Raises MpqError where that fails.
    """
    model = _Model(problem, objective, near)
    late = excess = 0
    for _ in range(ATTEMPTS):
        solution = model.solve(gap, time_limit)
        if problem.fits(solution.schemes):
            return solution
        excess = max(problem.plan_bytes(solution.schemes) - problem.budget_bytes, 0)
        if problem.max_latency_ns is not None:
            late = max(problem.plan_ns(solution.schemes) - problem.max_latency_ns, 0)
        model.tighten(excess, late)
    raise MpqError(
        f"The solver exceeds its limits by {excess} bytes and {late} ns.",
        "This is a bug: please report the plan.",
    )


def undominated(layer: LayerChoice, costs: Sequence[Mapping[str, float]]) -> list[str]:
    """Return the schemes of ``layer`` that no other dominates without reading more quantizers.

    ``costs``: scheme -> value, for the objective and then for each other limited quantity. At least
    one optimal plan remains, and the MILP shrinks by half.
    """
    best: list[str] = []
    for scheme in sorted(layer.bytes, key=lambda s: (layer.bytes[s], costs[0][s], s)):
        readable: tuple[dict[str, int], ...] = ({}, layer.quantizers(scheme))
        beaten = any(
            all(cost.get(k, 0.0) <= cost.get(scheme, 0.0) for cost in costs)
            and layer.quantizers(k) in readable
            for k in best
        )
        if not beaten:
            best.append(scheme)
    return best


class _Model:
    """The MILP: a binary x[l, s] per layer and scheme, and a binary y[q] per activation quantizer.

    minimize    sum cost[l, s] x[l, s] + sum cost[q] y[q]
    subject to  sum_s x[l, s] = 1                              for every layer l
                sum bytes[l, s] x[l, s] + sum bytes[q] y[q] <= budget - fixed bytes
                the same for nanoseconds and for losses        where they are limited
                sum_l x[l, current l] >= layers - moves        only with ``near``
                sum of x[l, s] that read q <= y[q]             for every quantizer q and layer l

    A term of at most 1e-9 of the largest cost in total breaks ties towards fewer bytes.
    """

    def __init__(self, problem: Problem, objective: Objective, near: Nearby | None) -> None:
        self.problem, self.objective, self.near = problem, objective, near
        self.room = problem.budget_bytes - problem.fixed_bytes
        limit = problem.max_latency_ns
        self.time = None if limit is None else limit - problem.fixed_ns
        self.pairs = [(layer, s) for layer in problem.layers for s in self._schemes(layer)]
        read = {name: size for layer, s in self.pairs for name, size in layer.quantizers(s).items()}
        self.quantizers = sorted(read)
        self.cost = _floats(objective.costs[layer.name][s] for layer, s in self.pairs)
        if not np.all(np.isfinite(self.cost)):
            layer, scheme = self.pairs[int(np.flatnonzero(~np.isfinite(self.cost))[0])]
            raise MpqError(
                f"The measured loss of {layer.name} under {scheme} is not finite.", "Measure again."
            )
        self.bytes = _floats(layer.bytes[s] for layer, s in self.pairs)
        self.quantizer_bytes = _floats(read[name] for name in self.quantizers)

    def _schemes(self, layer: LayerChoice) -> list[str]:
        costs = [self.objective.costs[layer.name]]
        if self.problem.max_loss is not None:
            costs.append(layer.loss)
        if self.problem.max_latency_ns is not None:
            costs.append(layer.latency_ns)
        # Keep the schemes of the current plan and of the start even where another dominates them.
        kept = [plan for plan in (self.near and self.near.current, self.problem.start) if plan]
        current = [plan[layer.name] for plan in kept if plan[layer.name] in layer.bytes]
        return list(dict.fromkeys([*undominated(layer, costs), *current]))

    def tighten(self, excess: int, late: int) -> None:
        """Lower the limits by ``excess`` bytes and ``late`` ns, to undo the solver's tolerances."""
        self.room -= excess
        self.time = None if self.time is None else self.time - late

    def solve(self, gap: float, time_limit: float) -> Solution:
        """Run HiGHS; take each layer's scheme of largest x. Raises MpqError without a solution."""
        started = time.monotonic()
        outcome, scale = self._run(gap, time_limit)
        if not len(outcome.values) or outcome.status not in ("Optimal", "Time limit reached"):
            raise MpqError(
                f"HiGHS ended with '{outcome.status}' after {time.monotonic() - started:.1f} s.",
                "Raise allocate.time_limit in the recipe."
                if "limit" in outcome.status
                else "This is a bug: please report it.",
            )
        schemes: dict[str, str] = {}
        largest: dict[str, float] = {}
        for (layer, scheme), value in zip(self.pairs, outcome.values):
            if value > largest.get(layer.name, -1.0):
                largest[layer.name], schemes[layer.name] = float(value), scheme
        value = self.objective.of(schemes, self.problem.layers)
        return Solution(schemes, outcome.status, value, min(value, outcome.bound * scale))

    def _run(self, gap: float, time_limit: float) -> tuple[Outcome, float]:
        """Return HiGHS' outcome, and the scale by which its objective was divided."""
        # HiGHS compares costs with absolute tolerances, so the largest cost is scaled to 1e3.
        scale = (float(np.abs(self.cost).max()) or 1.0) / 1e3
        tie_break = 1e-9 * 1e3 / max(float(self.bytes.sum()), 1.0)
        shared = _floats(self.objective.quantizers.get(name, 0.0) for name in self.quantizers)
        columns = len(self.pairs) + len(self.quantizers)
        program = LinearProgram(
            cost=np.concatenate([self.cost / scale + tie_break * self.bytes, shared / scale]),
            low=np.zeros(columns),
            high=np.ones(columns),
            rows=self._rows(),
            integer=True,
        )
        options = {"mip_rel_gap": gap, "time_limit": time_limit, "mip_feasibility_tolerance": 1e-9}
        return solve_program(program, self._start(), **options), scale

    def _start(self) -> Array | None:
        """Return the problem's start as values of the columns; None where a scheme is missing."""
        plan = self.problem.start
        if plan is None:
            return None
        taken = [plan[layer.name] == scheme for layer, scheme in self.pairs]
        if sum(taken) < len(self.problem.layers):
            return None
        chosen = [pair for pair, here in zip(self.pairs, taken) if here]
        read = {name for layer, scheme in chosen for name in layer.quantizers(scheme)}
        return np.array([*taken, *(name in read for name in self.quantizers)], np.float64)

    def _rows(self) -> list[Row]:
        of_layer: dict[str, list[int]] = {}
        readers: dict[str, dict[str, list[int]]] = {name: {} for name in self.quantizers}
        for column, (layer, scheme) in enumerate(self.pairs):
            of_layer.setdefault(layer.name, []).append(column)
            for name in layer.quantizers(scheme):
                readers[name].setdefault(layer.name, []).append(column)
        rows = [Row(1.0, 1.0, columns, np.ones(len(columns))) for columns in of_layer.values()]
        rows += self._limits()
        if self.near is not None:
            current = self.near.current
            same = [i for i, (layer, s) in enumerate(self.pairs) if current[layer.name] == s]
            unchanged = float(len(of_layer) - self.near.moves)
            rows.append(Row(unchanged, math.inf, same, np.ones(len(same))))
        for number, name in enumerate(self.quantizers, len(self.pairs)):
            for columns in readers[name].values():
                rows.append(Row(-math.inf, 0.0, [*columns, number], [1.0] * len(columns) + [-1.0]))
        return rows

    def _limits(self) -> list[Row]:
        problem = self.problem
        rows = [_at_most(self.room, self.bytes, self.quantizer_bytes)]
        if self.time is not None:
            each = _floats(layer.latency_ns.get(s, 0) for layer, s in self.pairs)
            shared = _floats(problem.quantizer_ns.get(name, 0) for name in self.quantizers)
            rows.append(_at_most(self.time, each, shared))
        if problem.max_loss is not None:
            each = _floats(layer.loss[s] for layer, s in self.pairs)
            rows.append(_at_most(problem.max_loss, each, np.zeros(len(self.quantizers))))
        return rows


def _floats(values: Iterable[float]) -> Array:
    return np.fromiter(values, np.float64)


def _at_most(limit: float, each: Array, shared: Array) -> Row:
    """Return the row ``each`` x + ``shared`` y <= ``limit``, its largest coefficient scaled to 1.

    HiGHS' tolerances are absolute.
    """
    coefficients = np.concatenate([each, shared])
    unit = float(coefficients.max(initial=0.0)) or 1.0
    return Row(-math.inf, limit / unit, np.arange(len(coefficients)), coefficients / unit)
