"""The limit on latency and latency as the objective, against brute force over every plan."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpq_deploy.allocate.cross_terms import Quadratic, refine
from mpq_deploy.allocate.milp import (
    allocate,
    balanced_plan,
    fastest_plan,
    penalty_per_kernel,
)
from mpq_deploy.allocate.problem import LayerChoice, Problem
from mpq_deploy.errors import InfeasibleLatencyError, MpqError, UsageError
from mpq_deploy.recipe import AllocateSettings
from tests.allocate.test_milp import EXACT, every_plan

NAMES = ("fp16", "w8a8", "w4a16-b128", "w4a8-b64", "w4a16-b128+rows1")


@st.composite
def timed_problems(draw: st.DrawFn) -> Problem:
    """Problems of up to 4 layers that share inputs; every plan's latency is in nanoseconds."""
    layers = []
    for number in range(draw(st.integers(1, 4))):
        names = draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=4, unique=True))
        layers.append(
            LayerChoice(
                f"layer{number}",
                (f"x{draw(st.integers(0, 1))}",),
                {name: draw(st.integers(1, 60)) for name in names},
                {name: draw(st.integers(0, 1000)) * 1e-6 for name in names},
                latency_ns={name: draw(st.integers(1, 90_000)) for name in names},
            )
        )
    shared = {f"x{i}": draw(st.integers(0, 30_000)) for i in range(2)}
    free = Problem(layers, 7, 0, quantizer_ns=shared, fixed_ns=draw(st.integers(0, 5_000)))
    return replace(
        free, budget_bytes=free.plan_bytes(free.smallest_plan()) + draw(st.integers(0, 120))
    )


def time_of(problem: Problem, plan: dict[str, str]) -> int:
    """The plan's latency, counted apart from the code under test."""
    read = {
        n
        for layer in problem.layers
        if plan[layer.name][:4] in ("w8a8", "w4a8")
        for n in layer.inputs
    }
    layers = sum(layer.latency_ns[plan[layer.name]] for layer in problem.layers)
    return problem.fixed_ns + layers + sum(problem.quantizer_ns[name] for name in read)


def within_bytes(problem: Problem) -> list[dict[str, str]]:
    return [
        plan for plan in every_plan(problem) if problem.plan_bytes(plan) <= problem.budget_bytes
    ]


@settings(max_examples=100, deadline=None)
@given(timed_problems(), st.floats(0, 1))
def test_the_plan_is_the_best_of_all_that_are_small_and_fast_enough(
    problem: Problem, tightness: float
) -> None:
    times = [time_of(problem, plan) for plan in within_bytes(problem)]
    limit = int(min(times) + tightness * (max(times) - min(times)))
    limited = replace(problem, max_latency_ns=limit)
    plan = allocate(limited, EXACT).schemes
    assert time_of(problem, plan) == problem.plan_ns(plan) <= limit
    assert problem.plan_bytes(plan) <= problem.budget_bytes
    best = min(problem.plan_loss(p) for p in within_bytes(problem) if time_of(problem, p) <= limit)
    assert problem.plan_loss(plan) == pytest.approx(best, abs=1e-9)


@settings(max_examples=80, deadline=None)
@given(timed_problems())
def test_the_fastest_plan_is_the_fastest_of_all_within_the_budget(problem: Problem) -> None:
    least = min(time_of(problem, plan) for plan in within_bytes(problem))
    plan = fastest_plan(problem)
    assert problem.plan_bytes(plan) <= problem.budget_bytes
    assert time_of(problem, plan) == least
    default = allocate(problem, EXACT).schemes
    assert least <= time_of(problem, default)
    with pytest.raises(InfeasibleLatencyError) as caught:
        allocate(replace(problem, max_latency_ns=least - 1))
    assert caught.value.minimum_ns == least
    found = allocate(replace(problem, max_latency_ns=least), EXACT).schemes
    assert time_of(problem, found) == least


@settings(max_examples=60, deadline=None)
@given(timed_problems(), st.floats(0, 1))
def test_the_fastest_plan_holds_a_limit_on_the_loss(problem: Problem, share: float) -> None:
    losses = [problem.plan_loss(plan) for plan in within_bytes(problem)]
    limit = min(losses) + share * (max(losses) - min(losses)) + 1e-9
    plan = fastest_plan(replace(problem, max_loss=limit))
    assert problem.plan_loss(plan) <= limit + 1e-9
    allowed = [p for p in within_bytes(problem) if problem.plan_loss(p) <= limit]
    assert time_of(problem, plan) <= min(time_of(problem, p) for p in allowed)


@settings(max_examples=60, deadline=None)
@given(timed_problems(), st.floats(1, 8))
def test_balanced_is_the_fastest_of_all_within_the_slack(problem: Problem, slack: float) -> None:
    section = EXACT.replace(slack=slack)
    least = min(problem.plan_loss(plan) for plan in within_bytes(problem))
    found = balanced_plan(problem, section, allocate(problem, section).report.loss)
    limit = time_of(problem, found)
    # Losses are multiples of 1e-6: nothing lies within the solver's tolerance of the limit but itself.
    allowed = [p for p in within_bytes(problem) if problem.plan_loss(p) <= slack * least + 1e-10]
    strictly = [p for p in allowed if problem.plan_loss(p) <= slack * least - 1e-10] or allowed
    assert min(time_of(problem, p) for p in allowed) <= limit
    assert limit <= min(time_of(problem, p) for p in strictly)
    chosen = allocate(replace(problem, max_latency_ns=limit), section).schemes
    assert problem.plan_loss(chosen) <= slack * least + 1e-9


def test_out_of_time_a_known_plan_is_kept_and_without_one_it_says_so() -> None:
    random = np.random.default_rng(0)
    layers = [
        LayerChoice(
            f"l{i}",
            (f"x{i}",),
            {"w4a16-b32": 10, "w8a16": int(random.integers(12, 30)), "fp16": 40},
            {"w4a16-b32": 9.0, "w8a16": float(random.random()), "fp16": 0.0},
            latency_ns={"w4a16-b32": 50, "w8a16": int(random.integers(20, 90)), "fp16": 60},
        )
        for i in range(400)
    ]
    problem = Problem(layers, 0, 9000)
    known = fastest_plan(problem)
    tight = replace(problem, max_latency_ns=time_of(problem, known))
    late = EXACT.replace(time_limit=1e-9)
    assert allocate(replace(tight, start=known), late).schemes == known
    with pytest.raises(MpqError, match=r"allocate\.time_limit|Time limit"):
        allocate(tight, late)


def test_a_start_that_is_not_the_fastest_does_not_mislead_presolve() -> None:
    """HiGHS 1.16.0 claims 3 ns for the start's 6 here, where 4 ns is the minimum."""
    times = [{"fp16": 1}, {"fp16": 1}, {"fp16": 1, "w8a8": 2, "w4a16-b128": 3, "w4a8-b64": 1}]
    times.append({"w8a8": 1, "w4a8-b64": 1, "fp16": 1})
    sizes = [{"fp16": 1}, {"fp16": 1}, {"fp16": 1, "w8a8": 1, "w4a16-b128": 1, "w4a8-b64": 3}]
    sizes.append({"w8a8": 1, "w4a8-b64": 2, "fp16": 3})
    losses = [dict.fromkeys(layer, 0.0) for layer in sizes]
    losses[2]["fp16"] = losses[3]["w8a8"] = 2e-6
    layers = [
        LayerChoice(f"layer{i}", ("x0",), size, loss, latency_ns=time)
        for i, (size, loss, time) in enumerate(zip(sizes, losses, times))
    ]
    problem = Problem(layers, 7, 16, quantizer_ns={"x0": 0}, max_loss=2.001e-6)
    assert time_of(problem, fastest_plan(problem)) == 4


def test_a_loss_that_no_plan_reaches_names_the_minimum() -> None:
    layer = LayerChoice("conv", ("x",), {"w8a8": 5}, {"w8a8": 0.25}, latency_ns={"w8a8": 10})
    with pytest.raises(UsageError, match=r"0\.25"):
        fastest_plan(Problem([layer], 0, 100, max_loss=0.1))


def test_a_limit_too_small_says_the_minimum_in_milliseconds() -> None:
    layer = LayerChoice("conv", ("x",), {"fp16": 5}, {"fp16": 0.0}, latency_ns={"fp16": 1_234_567})
    with pytest.raises(InfeasibleLatencyError, match=r"1\.235 ms"):
        allocate(Problem([layer], 0, 100, max_latency_ns=1_000_000))


def test_branches_bear_a_penalty_and_hold_the_limit() -> None:
    names = ("w4a16-b128", "w4a16-b128+rows1")
    layers = [
        LayerChoice(
            f"l{i}",
            (f"x{i}",),
            dict(zip(names, (10, 12))),
            dict(zip(names, (1.0, 0.1))),
            latency_ns=dict(zip(names, (5, 9))),
        )
        for i in range(4)
    ]
    problem, section = Problem(layers, 0, 100, max_latency_ns=28), AllocateSettings()
    plan = allocate(problem, section, penalty_per_kernel(problem, section)).schemes
    assert sorted(plan.values()) == sorted([names[0]] * 2 + [names[1]] * 2)


@settings(max_examples=60, deadline=None)
@given(timed_problems(), st.integers(0, 2**31), st.floats(0, 1))
def test_refining_holds_the_limit_on_latency(problem: Problem, seed: int, tightness: float) -> None:
    rng = np.random.default_rng(seed)
    vectors = {
        n.name: {s: rng.standard_normal(3).astype(np.float32) for s in n.bytes}
        for n in problem.layers
    }
    squares = {name: {s: float(v @ v) for s, v in found.items()} for name, found in vectors.items()}
    times = [time_of(problem, plan) for plan in within_bytes(problem)]
    limit = int(min(times) + tightness * (max(times) - min(times)))
    layers = [replace(layer, loss=squares[layer.name]) for layer in problem.layers]
    limited = replace(problem, layers=layers, max_latency_ns=limit)
    quadratic = Quadratic(limited, vectors)
    plan = allocate(limited, EXACT).schemes
    better = refine(quadratic, plan)
    assert limited.fits(better)
    assert time_of(problem, better) <= limit
    assert quadratic.loss(better) <= quadratic.loss(plan) + 1e-12
