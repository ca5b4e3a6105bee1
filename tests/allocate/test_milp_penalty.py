"""The penalty for a branch's kernels, and quantizers that leave channels out."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpq_deploy.allocate.milp import allocate, penalty_per_kernel
from mpq_deploy.allocate.problem import LayerChoice, Problem
from mpq_deploy.recipe import AllocateSettings

NAMES = ("fp16", "w4a16-b32", "w4a16-b128", "w4a16-b128+rows1", "w4a16-b128+rows3")


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    layers = []
    for number in range(draw(st.integers(1, 5))):
        sizes = {name: draw(st.integers(1, 60)) for name in NAMES}
        losses = {name: draw(st.integers(1, 1000)) * 1e-6 for name in NAMES}
        layers.append(LayerChoice(f"layer{number}", (f"x{number}",), sizes, losses))
    return Problem(layers, 7, draw(st.integers(67 * len(layers), 90 * len(layers))))


@settings(max_examples=60, deadline=None)
@given(problems(), st.sampled_from([0.0, 0.01, 0.1, 10.0]))
def test_every_branch_is_worth_its_penalty(problem: Problem, share: float) -> None:
    section = AllocateSettings(gap=0.0, branch_penalty=share)
    allocation = allocate(problem, section, penalty_per_kernel(problem, section))
    plan, report = allocation.schemes, allocation.report
    free = allocate(problem, section).schemes
    assert problem.plan_bytes(plan) <= problem.budget_bytes
    assert report.loss == pytest.approx(problem.plan_loss(plan))
    assert report.bound <= report.loss + 1e-12
    kernels = 2 * sum("+" in scheme for scheme in plan.values())
    bodies = Problem(
        [
            LayerChoice(
                la.name,
                la.inputs,
                {s: la.bytes[s] for s in NAMES[:3]},
                {s: la.loss[s] for s in NAMES[:3]},
            )
            for la in problem.layers
        ],
        problem.fixed_bytes,
        problem.budget_bytes,
    )
    without = problem.plan_loss(allocate(bodies, section).schemes)
    assert problem.plan_loss(plan) + kernels * share * without <= without * (1 + 1e-6) + 1e-9
    if not share:
        assert problem.plan_loss(plan) == pytest.approx(problem.plan_loss(free), abs=1e-9)
    if share == 10.0:
        assert not kernels
