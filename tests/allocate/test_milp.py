"""The MILP against brute force, and its constraints."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpq_deploy.allocate.milp import Nearby, allocate, solve
from mpq_deploy.allocate.problem import LayerChoice, Objective, Problem
from mpq_deploy.errors import InfeasibleBudgetError
from mpq_deploy.recipe import AllocateSettings

NAMES = ("fp16", "w8a8", "w4a16-b32", "w4a8-b64")
# To the optimum.
EXACT = AllocateSettings(gap=0.0)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    layers = []
    for number in range(draw(st.integers(1, 5))):
        names = draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=4, unique=True))
        layers.append(
            LayerChoice(
                f"layer{number}",
                (f"x{draw(st.integers(0, 2))}",),
                {name: draw(st.integers(1, 60)) for name in names},
                {name: draw(st.integers(0, 1000)) * 1e-6 for name in names},
            )
        )
    free = Problem(layers, 7, 0)
    least = free.plan_bytes(free.smallest_plan())
    return Problem(layers, 7, least + draw(st.integers(0, 120)))


def every_plan(problem: Problem) -> list[dict[str, str]]:
    options = [[(layer.name, scheme) for scheme in layer.bytes] for layer in problem.layers]
    return [dict(chosen) for chosen in itertools.product(*options)]


@settings(max_examples=120, deadline=None)
@given(problems())
def test_the_plan_is_the_best_of_all_that_fit(problem: Problem) -> None:
    fitting = [
        plan for plan in every_plan(problem) if problem.plan_bytes(plan) <= problem.budget_bytes
    ]
    allocation = allocate(problem, EXACT)
    plan, report = allocation.schemes, allocation.report
    assert problem.plan_bytes(plan) <= problem.budget_bytes
    best = min(problem.plan_loss(p) for p in fitting)
    assert problem.plan_loss(plan) == pytest.approx(best, abs=1e-9)
    assert report.status == "Optimal"
    assert report.bound <= best + 1e-9


@settings(max_examples=60, deadline=None)
@given(problems())
def test_the_smallest_feasible_budget_is_exact(problem: Problem) -> None:
    least = min(problem.plan_bytes(plan) for plan in every_plan(problem))
    with pytest.raises(InfeasibleBudgetError) as caught:
        allocate(replace(problem, budget_bytes=least - 1), EXACT)
    assert caught.value.smallest == least
    plan = allocate(replace(problem, budget_bytes=least), EXACT).schemes
    assert problem.plan_bytes(plan) == least


def test_an_impossible_budget_names_the_smallest_feasible_one() -> None:
    layers = [
        LayerChoice("conv", ("x",), {"fp16": 200, "w4a16-b32": 60}, {"fp16": 0.0, "w4a16-b32": 1.0})
    ]
    with pytest.raises(InfeasibleBudgetError, match="71") as caught:
        allocate(Problem(layers, 11, 70))
    plan = allocate(Problem(layers, 11, caught.value.smallest)).schemes
    assert plan == {"conv": "w4a16-b32"}


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(-12, 0), st.integers(-12, 0), st.integers(-14, -9)),
        min_size=3,
        max_size=6,
    )
)
def test_losses_that_span_many_orders_are_solved_as_well(
    powers: list[tuple[int, int, int]],
) -> None:
    sizes = {"fp16": 80, "w8a16": 41, "w4a16-b32": 23}
    layers = [
        LayerChoice(
            f"l{i}",
            (f"x{i}",),
            sizes,
            {"fp16": 10.0**c, "w8a16": 1.7 * 10.0**b, "w4a16-b32": 2.3 * 10.0**a},
        )
        for i, (a, b, c) in enumerate(powers)
    ]
    problem = Problem(layers, 0, 50 * len(layers))
    plan = allocate(problem, AllocateSettings(gap=1e-6)).schemes
    best = min(
        problem.plan_loss(p)
        for p in every_plan(problem)
        if problem.plan_bytes(p) <= problem.budget_bytes
    )
    assert problem.plan_loss(plan) <= best * (1 + 1e-4)


def test_equal_inputs_give_equal_plans_whatever_the_dictionary_order() -> None:
    def problem(reverse: bool) -> Problem:
        names = list(NAMES)[:: -1 if reverse else 1]
        sizes = {"fp16": 80, "w8a8": 42, "w4a16-b32": 23, "w4a8-b64": 23}
        losses = {"fp16": 0.0, "w8a8": 1.0, "w4a16-b32": 3.0, "w4a8-b64": 3.0}
        layers = [
            LayerChoice(
                f"l{i}", (f"x{i}",), {n: sizes[n] for n in names}, {n: losses[n] for n in names}
            )
            for i in range(6)
        ]
        return Problem(layers, 0, 250)

    assert allocate(problem(False)) == allocate(problem(True))


def test_what_presolve_takes_for_infeasible_is_solved() -> None:
    """Four layers of a real model, on which HiGHS 1.15.1 ended with 'Infeasible' although the present plan fits."""
    rows, int8 = (
        "w4a8-b32+rows",
        {"w8a8": 2, "w4a8-b32": 2, **{f"w4a8-b32+rows{n}": 2 for n in range(1, 6)}},
    )
    tables: list[tuple[dict[str, int], list[float]]] = [
        (
            {"w8a8": 2176, "w8a16": 2176, "w4a16-b32": 1152, "w4a8-b32": 1280, f"{rows}1": 1620},
            [
                -0.0003749713025984079,
                -0.000350680537079278,
                0.0,
                -0.000187510439570559,
                -0.00023320777052262227,
            ],
        ),
        (
            {
                "w8a8": 928,
                "w8a16": 928,
                "w4a16-b32": 528,
                "w4a16-b32+rows2": 737,
                "w4a16-b32+rows4": 818,
                f"{rows}2": 789,
                f"{rows}4": 858,
            },
            [
                -0.0019479551474903159,
                -0.0019475536191457211,
                0.0,
                -0.0006805136046251307,
                -0.0014264544567584546,
                -0.0013191425275066277,
                -0.001752693016010736,
            ],
        ),
        ({"w4a16-b32": 576, f"{rows}5": 978}, [0.0, -0.0014481799136573967]),
        (
            {"w4a16-b32": 576, f"{rows}3": 894, f"{rows}5": 978},
            [0.0, -0.002617007914298305, -0.0027005338910181605],
        ),
    ]
    layers = [
        LayerChoice(
            f"layer{i}",
            (f"x{i}",),
            sizes,
            dict(zip(sizes, losses)),
            {s: int8.get(s, 0) for s in sizes},
        )
        for i, (sizes, losses) in enumerate(tables)
    ]
    problem = Problem(layers, 494, 3384)
    current = {layer.name: "w4a16-b32" for layer in layers}
    found = solve(problem, Objective.predicted_loss(problem), 0.0, 10.0, Nearby(current, 2)).schemes
    fitting = [
        plan
        for plan in every_plan(problem)
        if problem.plan_bytes(plan) <= problem.budget_bytes
        and sum(plan[name] != scheme for name, scheme in current.items()) <= 2
    ]
    assert found in fitting
    assert problem.plan_loss(found) == pytest.approx(
        min(problem.plan_loss(plan) for plan in fitting), abs=1e-12
    )
