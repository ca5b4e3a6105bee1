"""Layers under one scheme: as good as brute force over plans that keep them alike, at the same bytes and times."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpq_deploy.allocate.cross_terms import Quadratic, refine
from mpq_deploy.allocate.front import front
from mpq_deploy.allocate.milp import allocate
from mpq_deploy.allocate.problem import LayerChoice, Problem
from mpq_deploy.allocate.ties import tie, tied_layers
from mpq_deploy.engine.target import load_target
from mpq_deploy.formats.scheme import FP16, SCHEMES, W8A8, W8A16
from mpq_deploy.graph.layers import Layer, LayerGraph, LayerUse
from mpq_deploy.latency.costs import LatencyCosts
from mpq_deploy.latency.joins import Joins
from tests.allocate.test_milp import EXACT

NAMES = ("fp16", "w8a8", "w8a8+scale5", "w4a16-b32+rows1", "w4a16-b32")
TIES = (("q", "k", "v"), ("k2", "v2"))


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Six layers: q, k and v of x, which its producer may fold factors for; k2 and v2 of a text; one alone."""
    layers = []
    for name, tensor in zip(("q", "k", "v", "alone", "k2", "v2"), "xxxytt"):
        sizes = {s: b * draw(st.integers(1, 4)) for s, b in zip(NAMES, (80, 41, 41, 27, 23))}
        losses = {s: draw(st.floats(0, 1)) for s in NAMES}
        times = {s: draw(st.integers(1, 99)) for s in NAMES}
        inputs = {"w8a8+scale5": 18}
        layers.append(LayerChoice(name, (tensor,), sizes, losses, inputs, times))
    shared = {"x": draw(st.integers(0, 20)), "t": draw(st.integers(0, 20))}
    folds = {"x": frozenset("qkv")}
    free = Problem(layers, 11, 0, folds, quantizer_ns=shared, fixed_ns=5)
    unfolded = replace(tied(free), foldable={})
    least = unfolded.plan_bytes(unfolded.smallest_plan())
    return replace(free, budget_bytes=least + draw(st.integers(0, 600)))


def tied(problem: Problem) -> Problem:
    return replace(problem, layers=tie(problem.layers, TIES))


def alike(problem: Problem) -> list[dict[str, str]]:
    """Every plan of ``problem`` that keeps the layers of each tie alike, within the limits."""
    plans = []
    for first, alone, second in itertools.product(NAMES, repeat=3):
        plan = {**dict.fromkeys("qkv", first), "alone": alone, **dict.fromkeys(TIES[1], second)}
        if problem.fits(plan):
            plans.append(plan)
    return plans


@settings(max_examples=40, deadline=None)
@given(problems(), st.floats(0, 0.05))
def test_the_best_plan_that_keeps_them_alike_is_found(problem: Problem, penalty: float) -> None:
    together = tied(problem)
    found = allocate(together, EXACT, penalty)
    plan = together.spread(found.schemes)
    assert plan in alike(problem)

    def cost(one: dict[str, str]) -> float:
        kernels = sum(SCHEMES[s].branch.kernels for s in one.values())
        return problem.plan_loss(one) + penalty * kernels

    # The solver counts factors of channels even where a producer takes them.
    unfolded = alike(replace(problem, foldable={}))
    assert cost(plan) == pytest.approx(min(map(cost, unfolded)), abs=1e-6)
    assert together.plan_bytes(found.schemes) == problem.plan_bytes(plan)
    assert together.plan_ns(found.schemes) == problem.plan_ns(plan)
    assert found.report.loss == pytest.approx(problem.plan_loss(plan))


@settings(max_examples=20, deadline=None)
@given(problems())
def test_plans_of_the_front_keep_them_alike(problem: Problem) -> None:
    together, free = tied(problem), replace(problem, budget_bytes=10**9)
    for plan in front(together):
        spread = together.spread(plan.schemes)
        assert spread in alike(free)
        assert plan.size_bytes == problem.plan_bytes(spread)
        assert plan.latency_ns == problem.plan_ns(spread)


@settings(max_examples=20, deadline=None)
@given(problems(), st.integers(0, 999), st.floats(0, 1))
def test_cross_terms_see_all_layers_of_a_tie(problem: Problem, seed: int, rho: float) -> None:
    rng = np.random.default_rng(seed)
    vectors = {layer.name: {s: rng.standard_normal(12) for s in NAMES} for layer in problem.layers}
    losses = {n: {s: float(v @ v) for s, v in row.items()} for n, row in vectors.items()}
    problem = problem.with_losses(losses)
    together, apart = tied(problem), Quadratic(problem, vectors, rho, 0.1)
    assert together.with_losses(losses) == together
    quadratic = Quadratic(together, vectors, rho, 0.1)
    plan = allocate(together).schemes
    assert quadratic.loss(plan) == pytest.approx(apart.loss(together.spread(plan)))
    for (name, scheme), change in zip(quadratic.moves, quadratic.changes(plan), strict=True):
        moved = together.spread({**plan, name: scheme})
        assert change == pytest.approx(
            apart.loss(moved) - apart.loss(together.spread(plan)), abs=1e-9
        )
    refined = together.spread(refine(quadratic, plan))
    assert refined in alike(problem)
    assert apart.loss(refined) <= apart.loss(together.spread(plan)) * (1 + 1e-9)


def test_layers_that_may_take_other_schemes_stay_apart_and_a_note_says_so() -> None:
    allowed = {**dict.fromkeys("qkv", NAMES), **dict.fromkeys(("k2", "v2"), NAMES)}
    assert tied_layers(TIES, allowed) == (TIES, "")
    found, note = tied_layers(TIES, {**allowed, "q": ("fp16",), "v2": ("fp16", "w8a8")})
    assert found == (("k", "v"),)
    assert note.startswith("2 groups of queries, keys and values are not tied as a whole")
    assert note.endswith("q and k; k2 and v2")


def test_what_one_product_saves_is_reading_the_input_and_launching_once() -> None:
    layers = [Layer(n, "MatMul", f"{n}.w", (512, 512), 1, 1, (LayerUse(n, "x", n),)) for n in "qkv"]
    shapes = dict.fromkeys((*"xqkv",), (2, 1024, 512))
    graph = LayerGraph(None, tuple(layers), ())  # type: ignore[arg-type]
    target = load_target("rtx-ada")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mpq_deploy.latency.costs.others_seconds", lambda *_: 0.0)
        apart = LatencyCosts(graph, shapes, target, 2)
        joined = LatencyCosts(graph, shapes, target, 2, None, Joins(graph, [layers]))
    for scheme in (FP16, W8A8):
        assert (
            0
            < apart.joined_ns(layers, scheme)
            < apart.plan_ns(layers, dict.fromkeys("qkv", scheme))
        )
        plan = dict.fromkeys("qkv", scheme)
        assert joined.plan_ns(layers, plan) == apart.plan_ns(layers, plan) - apart.joined_ns(
            layers, scheme
        )
    assert apart.joined_ns(layers, W8A16) == apart.joined_ns(layers, SCHEMES["w4a16-b64"]) == 0
    mixed = {"q": FP16, "k": FP16, "v": W8A8}
    assert joined.plan_ns(layers, mixed) == apart.plan_ns(layers, mixed)
