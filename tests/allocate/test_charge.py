"""The charge for a branch's kernels, and quantizers that leave channels out."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpq_deploy.allocate.milp import LayerChoice, Problem, allocate, plan_bytes
from mpq_deploy.formats.sizes import ACTIVATION_SCALE_BYTES
from tests.allocate.penalized import allocate_charged

NAMES = ("fp16", "w4a16-b32", "w4a16-b128", "w4a16-b128+rows1", "w4a16-b128+rows3")


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    layers = []
    for number in range(draw(st.integers(1, 5))):
        sizes = {name: draw(st.integers(1, 60)) for name in NAMES}
        losses = {name: draw(st.integers(1, 1000)) * 1e-6 for name in NAMES}
        layers.append(LayerChoice(f"layer{number}", (f"x{number}",), sizes, losses))
    return Problem(layers, 7, draw(st.integers(67 * len(layers), 90 * len(layers))))


def loss_of(problem: Problem, plan: dict[str, str]) -> float:
    return sum(layer.loss[plan[layer.name]] for layer in problem.layers)


@settings(max_examples=60, deadline=None)
@given(problems(), st.sampled_from([0.0, 0.01, 0.1, 10.0]))
def test_every_branch_is_worth_its_charge(problem: Problem, charge: float) -> None:
    plan, report = allocate_charged(problem, charge, gap=0.0)
    free, _ = allocate(problem, gap=0.0)
    assert plan_bytes(problem, plan) <= problem.budget_bytes
    assert report.loss == pytest.approx(loss_of(problem, plan))
    assert report.bound <= report.loss + 1e-12
    kernels = 2 * sum("+" in scheme for scheme in plan.values())
    bodies = Problem(
        [
            LayerChoice(la.name, la.inputs, {s: la.bytes[s] for s in NAMES[:3]}, {s: la.loss[s] for s in NAMES[:3]})
            for la in problem.layers
        ],
        problem.fixed_bytes,
        problem.budget_bytes,
    )
    without = loss_of(problem, allocate(bodies, gap=0.0)[0])
    assert loss_of(problem, plan) + kernels * charge * without <= without * (1 + 1e-6) + 1e-9
    if not charge:
        assert loss_of(problem, plan) == pytest.approx(loss_of(problem, free), abs=1e-9)
    if charge == 10.0:
        assert not kernels


def test_quantizers_with_and_without_outlier_channels_are_two() -> None:
    sizes = {"w8a8": 10, "w8a8+cols1": 10}
    layers = [LayerChoice(name, ("x",), sizes, dict.fromkeys(sizes, 0.0)) for name in "abc"]
    problem = Problem(layers, 0, 100)
    alike = plan_bytes(problem, {"a": "w8a8", "b": "w8a8", "c": "w8a8"})
    mixed = plan_bytes(problem, {"a": "w8a8", "b": "w8a8+cols1", "c": "w8a8+cols1"})
    assert mixed - alike == ACTIVATION_SCALE_BYTES
