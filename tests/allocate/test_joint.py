"""The program over several parts: against brute force, and against a budget for each part alone."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpq_deploy.allocate.joint import PartProblem, joint_problem, solve_jointly
from mpq_deploy.allocate.milp import allocate
from mpq_deploy.allocate.problem import Problem
from mpq_deploy.errors import InfeasibleBudgetError
from mpq_deploy.recipe import AllocateSettings
from tests.allocate.test_milp import every_plan, problems

EXACT = AllocateSettings(gap=0.0, objective="quality")


@st.composite
def pipelines(draw: st.DrawFn) -> dict[str, PartProblem]:
    gains = draw(st.lists(st.sampled_from([0.01, 0.5, 1.0, 3.0]), min_size=2, max_size=2))
    return {
        name: PartProblem(draw(problems()), gain) for name, gain in zip(("text", "unet"), gains)
    }


def least(part: PartProblem) -> int:
    return min(part.problem.plan_bytes(plan) for plan in every_plan(part.problem))


@settings(max_examples=60, deadline=None)
@given(pipelines(), st.integers(0, 150))
def test_the_shares_hold_the_best_plan_of_all(parts: dict[str, PartProblem], more: int) -> None:
    budget = sum(map(least, parts.values())) + more
    text, unet = parts.values()
    best = min(
        text.gain * text.problem.plan_loss(a) + unet.gain * unet.problem.plan_loss(b)
        for a, b in itertools.product(every_plan(text.problem), every_plan(unet.problem))
        if text.problem.plan_bytes(a) + unet.problem.plan_bytes(b) <= budget
    )
    shares = solve_jointly(parts, budget, EXACT, timed=False)
    assert sum(share.bytes for share in shares.values()) <= budget
    assert sum(share.loss for share in shares.values()) == pytest.approx(best, abs=1e-9)
    for name, share in shares.items():
        assert parts[name].problem.plan_bytes(share.plan) <= share.bytes
        alone = allocate(_within(parts[name].problem, share.bytes), EXACT)
        assert parts[name].gain * alone.report.loss <= share.loss + 1e-9


@settings(max_examples=40, deadline=None)
@given(pipelines(), st.integers(0, 150))
def test_no_proportional_budgets_are_better(parts: dict[str, PartProblem], more: int) -> None:
    sizes = {name: part.problem.budget_bytes for name, part in parts.items()}
    budget = sum(map(least, parts.values())) + more
    each = {name: budget * size // sum(sizes.values()) for name, size in sizes.items()}
    try:
        apart = sum(
            part.gain * allocate(_within(part.problem, each[name]), EXACT).report.loss
            for name, part in parts.items()
        )
    except InfeasibleBudgetError:
        return
    shares = solve_jointly(parts, budget, EXACT, timed=False)
    assert sum(share.loss for share in shares.values()) <= apart + 1e-9


def test_what_no_plan_fits_names_the_smallest_budget(small: dict[str, PartProblem]) -> None:
    smallest = sum(map(least, small.values()))
    with pytest.raises(InfeasibleBudgetError, match=f"{smallest:,} bytes") as caught:
        solve_jointly(small, smallest - 1, EXACT, timed=False)
    assert caught.value.smallest == smallest


def test_times_count_by_calls(small: dict[str, PartProblem]) -> None:
    problem = joint_problem(small, 10**6)
    one = {name: part.problem.smallest_plan() for name, part in small.items()}
    together = {f"{name}/{layer}": s for name, plan in one.items() for layer, s in plan.items()}
    calls = {name: part.calls for name, part in small.items()}
    expected = sum(calls[name] * small[name].problem.plan_ns(plan) for name, plan in one.items())
    assert problem.plan_ns(together) == expected
    limit = AllocateSettings(gap=0.0, objective="quality", max_latency=f"{expected / 1000}us")
    shares = solve_jointly(small, 10**6, limit, timed=True)
    spent = sum(calls[name] * (share.latency_ns or 0) for name, share in shares.items())
    assert 0 < spent <= expected


@pytest.fixture
def small() -> dict[str, PartProblem]:
    from mpq_deploy.allocate.problem import LayerChoice

    def part(losses: tuple[float, float], calls: float) -> PartProblem:
        layer = LayerChoice(
            "layer",
            ("x",),
            {"fp16": 40, "w8a8": 20},
            dict(zip(("fp16", "w8a8"), losses)),
            latency_ns={"fp16": 900, "w8a8": 500},
        )
        return PartProblem(Problem([layer], 5, 0, fixed_ns=10), 1.0, calls)

    return {"text": part((0.0, 1e-3), 2.0), "unet": part((0.0, 1e-4), 40.0)}


def _within(problem: Problem, budget: int) -> Problem:
    from dataclasses import replace

    return replace(problem, budget_bytes=budget)
