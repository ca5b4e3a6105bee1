"""The front of size, error and latency, against every plan there is."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpq_deploy.allocate.front import ALIKE, FrontPlan, front
from mpq_deploy.allocate.problem import LayerChoice, Problem

SCHEMES = ("fp16", "w8a8", "w8a16", "w4a16-b32")


def made_up(layers: int, seed: int, shared: bool = False) -> Problem:
    """Layers of random sizes; fewer bytes cost more loss, and times are anything."""
    rng = np.random.default_rng(seed)
    choices = []
    for number in range(layers):
        weights = int(rng.integers(100, 2000))
        loss = np.sort(rng.lognormal(-6, 2, len(SCHEMES) - 1))
        choices.append(
            LayerChoice(
                f"layer{number}",
                ("x" if shared else f"x{number}",),
                {"fp16": 2 * weights, "w8a8": weights, "w8a16": weights, "w4a16-b32": weights // 2},
                {
                    "fp16": 0.0,
                    **{s: float(v) for s, v in zip(("w8a16", "w8a8", "w4a16-b32"), loss)},
                },
                latency_ns={s: int(rng.integers(100, 5000)) for s in SCHEMES},
            )
        )
    return Problem(
        choices, 50, 10**9, quantizer_ns={"x": 70, **{f"x{i}": 70 for i in range(layers)}}
    )


def every_plan(problem: Problem) -> list[FrontPlan]:
    plans = []
    for row in itertools.product(*(layer.bytes for layer in problem.layers)):
        plan = {layer.name: scheme for layer, scheme in zip(problem.layers, row)}
        sizes = problem.plan_bytes(plan), problem.plan_loss(plan), problem.plan_ns(plan)
        plans.append(FrontPlan(plan, *sizes))
    return plans


@pytest.mark.parametrize("seed", range(4))
def test_no_plan_of_the_front_is_beaten_by_any_plan(seed: int) -> None:
    """Without shared quantizers each is the optimum of a weighted sum, so nothing is better in all three."""
    problem = made_up(5, seed)
    found = front(problem)
    every = np.array([(p.size_bytes, p.loss, p.latency_ns) for p in every_plan(problem)])
    for plan in found:
        values = np.array([plan.size_bytes, plan.loss, plan.latency_ns])
        better = (every <= values * (1 + 1e-12)).all(axis=1) & (every < values * (1 - 1e-9)).any(
            axis=1
        )
        assert not better.any()
    sizes = [plan.size_bytes for plan in found]
    assert sizes == sorted(sizes)
    # Its ends: the least error of all, and the smallest size.
    assert min(p.loss for p in found) == every[:, 1].min()
    assert sizes[0] == every[:, 0].min()


@given(layers=st.integers(1, 12), seed=st.integers(0, 10**6), shared=st.booleans())
@settings(max_examples=25, deadline=None)
def test_its_figures_are_those_of_its_plans(layers: int, seed: int, shared: bool) -> None:
    problem = made_up(layers, seed, shared)
    for plan in front(problem):
        assert set(plan.schemes) == {layer.name for layer in problem.layers}
        assert plan.size_bytes == problem.plan_bytes(plan.schemes)
        assert plan.latency_ns == problem.plan_ns(plan.schemes)
        assert plan.loss == problem.plan_loss(plan.schemes)


def test_so_many_plans_at_most_with_both_ends() -> None:
    problem = made_up(40, 1)
    whole, some = front(problem), front(problem, 9)
    assert len(whole) > 100 and len(some) == 9
    assert some[0] == whole[0] and some[-1] == whole[-1]


@pytest.mark.parametrize("seed", range(3))
def test_every_plan_has_one_hardly_worse_among_the_distinct(seed: int) -> None:
    problem = made_up(30, seed)
    whole, some = front(problem), front(problem, 10**6)
    kept = np.array([(p.size_bytes, p.loss, p.latency_ns) for p in some])
    assert len(some) < len(whole) and all(plan in whole for plan in some)
    for plan in whole:
        limit = np.array([plan.size_bytes, plan.loss, plan.latency_ns]) * ALIKE
        assert (kept <= limit).all(axis=1).any()
    fastest = min(plan.latency_ns for plan in whole)
    assert fastest == min(plan.latency_ns for plan in some)


def test_layers_with_one_scheme_are_a_plan() -> None:
    layer = LayerChoice("only", ("x",), {"fp16": 10}, {"fp16": 0.0})
    (plan,) = front(Problem([layer], 5, 100))
    assert (plan.size_bytes, plan.loss, plan.latency_ns) == (15, 0.0, 0)


def test_the_least_errors_that_a_float_can_hold_have_prices() -> None:
    least = float(np.nextafter(0.0, 1.0))
    layer = LayerChoice("one", ("x",), {"fp16": 80, "w8a8": 41}, {"fp16": 0.0, "w8a8": least})
    # With the scale of its activations.
    assert [plan.size_bytes for plan in front(Problem([layer], 0, 10**9))] == [43, 80]
