"""Cross terms: never worse, within every constraint, as good as brute force where that can be tried."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpq_deploy.allocate.cross_terms import (
    FOLDS,
    Quadratic,
    allocate_with_cross_terms,
    refine,
    shrinkage,
)
from mpq_deploy.allocate.milp import Allocation, Nearby, allocate, solve
from mpq_deploy.allocate.problem import LayerChoice, Objective, Problem
from mpq_deploy.models.spec import Array
from mpq_deploy.sensitivity.steadied import steadied
from mpq_deploy.sensitivity.table import SensitivityTable, table_from_projections
from tests.allocate.test_milp import EXACT

SIZES = {"fp16": 80, "w8a8": 41, "w4a16-b32": 23}
Case = tuple[Problem, dict[str, dict[str, Array]]]


def case(seed: int, layers: int, correlated: float, entries: int = 40, budget: int = 45) -> Case:
    """Layers whose errors share a direction to the degree ``correlated``; two of them at a time share an input."""
    rng = np.random.default_rng(seed)
    common = rng.standard_normal(entries)
    projections: dict[str, dict[str, Array]] = {}
    choices = []
    for number in range(layers):
        size = 10 ** rng.uniform(-2, -1)
        direction = correlated * rng.choice([-1.0, 1.0]) * common + (
            1 - correlated
        ) * rng.standard_normal(entries)
        factors = {"fp16": 1e-3, "w8a8": rng.uniform(0.05, 0.5), "w4a16-b32": 1.0}
        vectors = {s: (size * f * direction).astype(np.float32) for s, f in factors.items()}
        projections[f"l{number}"] = vectors
        losses = {s: float(np.sum(np.square(v, dtype=np.float64))) for s, v in vectors.items()}
        choices.append(LayerChoice(f"l{number}", (f"x{number // 2}",), SIZES, losses))
    return Problem(choices, 0, budget * layers), projections


def quadratic_loss(projections: dict[str, dict[str, Array]], plan: dict[str, str]) -> float:
    """||sum_l a_{l,s_l}||^2, entry by entry."""
    entries = zip(
        *(projections[name][scheme].tolist() for name, scheme in plan.items()), strict=True
    )
    return sum(sum(entry) ** 2 for entry in entries)


def fitting(problem: Problem) -> list[dict[str, str]]:
    every = itertools.product(*[[(layer.name, s) for s in layer.bytes] for layer in problem.layers])
    return [plan for p in every if problem.plan_bytes(plan := dict(p)) <= problem.budget_bytes]


@pytest.mark.parametrize("rho", [0.4, 1.0])
@pytest.mark.parametrize("correlated", [0.0, 0.5, 0.8])
def test_the_optimum_is_found_in_most_cases_and_a_worse_plan_never(
    correlated: float, rho: float
) -> None:
    optimal = 0
    for seed in range(12):
        problem, projections = case(seed, 6, correlated)
        quadratic = Quadratic(problem, projections, rho)
        plan = allocate(problem).schemes
        better = refine(quadratic, plan)
        assert problem.plan_bytes(better) <= problem.budget_bytes
        assert quadratic.loss(better) <= quadratic.loss(plan)
        best = min(quadratic.loss(p) for p in fitting(problem))
        optimal += quadratic.loss(better) <= best * (1 + 1e-9)
    assert optimal >= 9


def test_the_loss_is_the_shrunk_quadratic_and_changes_are_its_differences() -> None:
    problem, projections = case(3, 5, 0.5)
    plan = {layer.name: "w8a8" for layer in problem.layers}
    apart = sum(
        float(np.square(projections[name][s], dtype=np.float64).sum()) for name, s in plan.items()
    )
    for rho in (0.0, 0.3, 1.0):
        quadratic = Quadratic(problem, projections, rho)
        expected = (1 - rho) * apart + rho * quadratic_loss(projections, plan)
        assert quadratic.loss(plan) == pytest.approx(expected, rel=1e-9)
        for (layer, scheme), change in zip(quadratic.moves, quadratic.changes(plan), strict=True):
            moved = {**plan, layer: scheme}
            assert change == pytest.approx(
                quadratic.loss(moved) - quadratic.loss(plan), rel=1e-6, abs=1e-12
            )


@st.composite
def random_cases(draw: st.DrawFn) -> Case:
    problem, projections = case(
        draw(st.integers(0, 10**6)), draw(st.integers(1, 7)), draw(st.floats(0, 1))
    )
    layers = []
    for layer in problem.layers:
        kept = draw(st.lists(st.sampled_from(list(SIZES)), min_size=1, max_size=3, unique=True))
        size = draw(st.integers(1, 9))
        layers.append(
            replace(
                layer,
                bytes={s: size * SIZES[s] for s in kept},
                loss={s: layer.loss[s] for s in kept},
                inputs=(f"x{draw(st.integers(0, 3))}",),
            )
        )
    free = Problem(layers, draw(st.integers(0, 50)), 0)
    least = free.plan_bytes(free.smallest_plan())
    return replace(free, budget_bytes=least + draw(st.integers(0, 600))), projections


@settings(max_examples=60, deadline=None)
@given(random_cases(), st.floats(0, 1))
def test_no_constraint_is_broken(made: Case, rho: float) -> None:
    problem, projections = made
    plan = allocate(problem).schemes
    quadratic = Quadratic(problem, projections, rho)
    better = refine(quadratic, plan)
    # plan_bytes counts a scale of a shared input once, for all its readers.
    assert problem.plan_bytes(better) <= problem.budget_bytes
    # Protected layers have fewer schemes to choose from, down to one.
    assert all(better[layer.name] in layer.bytes for layer in problem.layers)
    assert quadratic.loss(better) <= quadratic.loss(plan) * (1 + 1e-12)
    assert refine(quadratic, plan) == better


def test_without_cross_terms_the_milp_is_left_alone() -> None:
    for seed in range(5):
        problem, projections = case(seed, 7, 0.8)
        plan = allocate(problem, EXACT).schemes
        assert refine(Quadratic(problem, projections, 0.0), plan) == plan


def test_the_shared_scale_decides() -> None:
    """Two INT8 layers of one input fit where two of different inputs do not."""
    none, error = np.zeros(4, np.float32), np.ones(4, np.float32)
    projections = {"a": {"fp16": none, "w8a8": error}, "b": {"fp16": none, "w8a8": -error}}
    sizes = {"fp16": 80, "w8a8": 41}
    # The two errors cancel, but the MILP sees two that do not, and must take at least one.
    loss = {"fp16": 0.0, "w8a8": 4.0}

    def refined(inputs: tuple[str, str], budget: int) -> dict[str, str]:
        layers = [LayerChoice(n, (i,), sizes, loss) for n, i in zip("ab", inputs, strict=True)]
        problem = Problem(layers, 0, budget)
        return refine(Quadratic(problem, projections), {"a": "w8a8", "b": "fp16"})

    both = {"a": "w8a8", "b": "w8a8"}
    shared = Problem([LayerChoice(n, ("x",), sizes, loss) for n in "ab"], 0, 0)
    apart = Problem([LayerChoice(n, (n,), sizes, loss) for n in "ab"], 0, 0)
    assert shared.plan_bytes(both) < apart.plan_bytes(both)
    start = {"a": "w8a8", "b": "fp16"}
    assert refined(("x", "x"), max(shared.plan_bytes(both), shared.plan_bytes(start))) == both
    assert refined(("x", "y"), 125) == both


def test_errors_that_cancel_are_found() -> None:
    """Two layers whose INT4 errors are opposite cost nothing together: the linear plan cannot know."""
    error, none = np.ones(8, np.float32), np.zeros(8, np.float32)
    projections = {
        "a": {"fp16": none, "w4a16-b32": error},
        "b": {"fp16": none, "w4a16-b32": -error},
        "c": {"fp16": none, "w4a16-b32": 0.5 * np.tile([1.0, -1.0], 4).astype(np.float32)},
    }
    sizes = {"fp16": 80, "w4a16-b32": 23}
    layers = [
        LayerChoice(n, (n,), sizes, {s: float(v @ v) for s, v in vectors.items()})
        for n, vectors in projections.items()
    ]
    problem = Problem(layers, 0, 126)
    plan = allocate(problem).schemes
    assert quadratic_loss(projections, plan) > 1
    assert quadratic_loss(projections, refine(Quadratic(problem, projections), plan)) == 0


def test_branches_bear_a_penalty_here_too() -> None:
    """A branch that pays without the penalty is not taken with it."""
    small, large = np.full(4, 0.1, np.float32), np.full(4, 0.11, np.float32)
    projections = {"a": {"w4a16-b32": large, "w4a16-b32+rows1": small}}
    layer = LayerChoice(
        "a",
        ("a",),
        {"w4a16-b32": 10, "w4a16-b32+rows1": 11},
        {"w4a16-b32": 0.05, "w4a16-b32+rows1": 0.04},
    )
    problem, plan = Problem([layer], 0, 20), {"a": "w4a16-b32"}
    assert refine(Quadratic(problem, projections, kernel_penalty=0.0), plan) != plan
    assert refine(Quadratic(problem, projections, kernel_penalty=1.0), plan) == plan


def test_at_most_so_many_moves() -> None:
    problem, _ = case(1, 8, 0.0)
    plan = {layer.name: "w4a16-b32" for layer in problem.layers}
    wide = replace(problem, budget_bytes=10_000)
    for most in (1, 3, 8):
        found = solve(wide, Objective.predicted_loss(wide), 0.0, 10.0, Nearby(plan, most)).schemes
        assert sum(found[name] != plan[name] for name in plan) == most


# --- shrinkage and held-back calls ----------------------------------------------------------------------------


def made_table(
    seed: int, calls: int, correlated: float, layers: int = 6, steps: int = 3
) -> tuple[Problem, SensitivityTable]:
    """A table whose entries of one call are alike; fresh entries for every call."""
    rng = np.random.default_rng(seed)
    signs = np.random.default_rng(77).choice([-1.0, 1.0], layers)
    shape = (steps, 2, calls)
    common, hardness = rng.standard_normal(shape), np.exp(0.5 * rng.standard_normal(calls))
    values: dict[str, dict[str, Array]] = {}
    for number in range(layers):
        direction = correlated * signs[number] * common + (1 - correlated) * rng.standard_normal(
            shape
        )
        size = 0.05 * (1 + number % 3) * hardness
        factors = {"fp16": 1e-3, "w8a8": 0.3, "w4a16-b32": 1.0}
        values[f"l{number}"] = {
            s: (f * size * direction).astype(np.float32) for s, f in factors.items()
        }
    turns = np.tile(np.arange(calls), (steps, 1))
    table = table_from_projections(np.arange(steps, dtype=np.float32), values, (), turns)
    choices = [LayerChoice(n, (n,), SIZES, table.losses[n]) for n in values]
    return Problem(choices, 0, 45 * layers), table


def chosen_vectors(table: SensitivityTable) -> Array:
    assert table.projections is not None
    return np.stack([row["w4a16-b32"].astype(np.float64) for row in table.projections.values()])


def test_shrinkage_tells_noise_from_correlation() -> None:
    noise = [made_table(seed, 24, 0.0)[1] for seed in range(20)]
    alike = [made_table(seed, 24, 0.7)[1] for seed in range(20)]
    rhos = [
        [shrinkage(chosen_vectors(t), t.calls, 3) for t in tables if t.calls is not None]
        for tables in (noise, alike)
    ]
    assert np.mean(rhos[0]) < 0.2
    assert np.mean(rhos[1]) > 0.8
    assert all(0 <= rho <= 1 for row in rhos for rho in row)


@pytest.mark.parametrize("correlated", [0.3, 0.45])
def test_the_shrunk_products_are_nearer_to_the_truth(correlated: float) -> None:
    """Against the products of very many calls, shrunk ones beat both the raw ones and none at all."""
    truth = chosen_vectors(made_table(999, 20_000, correlated)[1])
    expected = truth @ truth.T
    off = ~np.eye(len(expected), dtype=bool)
    distances = []
    for seed in range(30):
        table = made_table(seed, 12, correlated)[1]
        assert table.calls is not None
        vectors = chosen_vectors(table)
        gram = vectors @ vectors.T
        rho = shrinkage(vectors, table.calls, 3)
        distances.append([np.square(f * gram - expected)[off].sum() for f in (rho, 1.0, 0.0)])
    shrunk, raw, none = np.mean(distances, axis=0)
    assert shrunk < raw and shrunk < none


def test_calls_that_were_taken_out_do_not_count() -> None:
    _, table = made_table(5, 16, 0.5)
    seen, _ = table.folds(4)[0]
    assert seen.calls is not None and table.calls is not None
    kept = seen.calls >= 0
    fewer = chosen_vectors(table)[:, kept]
    expected = shrinkage(fewer, table.calls[kept], 3)
    assert shrinkage(chosen_vectors(seen), seen.calls, 3) == pytest.approx(expected, rel=1e-5)


def test_one_call_or_one_layer_has_no_products() -> None:
    assert shrinkage(np.ones((3, 4)), np.zeros(4, np.int32), 2) == 0.0
    assert shrinkage(np.ones((1, 4)), np.arange(4), 1) == 0.0


def test_folds_share_no_call_and_average_to_the_whole() -> None:
    problem, table = made_table(4, 24, 0.4)
    plan = {layer.name: "w4a16-b32" for layer in problem.layers}
    parts = table.folds(FOLDS)
    assert len(parts) == FOLDS
    apart = [part.plan_loss(plan) for _, part in parts]
    assert np.mean(apart) == pytest.approx(table.plan_loss(plan), rel=1e-5)
    for (seen, part), loss in zip(parts, apart, strict=True):
        rest = (FOLDS * table.plan_loss(plan) - loss) / (FOLDS - 1)
        assert seen.plan_loss(plan) == pytest.approx(rest, rel=1e-5)
        assert seen.calls is not None and part.calls is not None
        assert not set(seen.calls[seen.calls >= 0]) & set(part.calls[part.calls >= 0])


def test_parts_of_unequal_calls_are_unbiased() -> None:
    """7 calls in 4 parts: each timestep still counts for its share."""
    _, table = made_table(4, 7, 0.0)
    flat = {
        n: {s: np.ones_like(v) for s, v in row.items()}
        for n, row in (table.projections or {}).items()
    }
    table = replace(table, projections=flat)
    one = {"l0": "fp16"}
    for seen, part in table.folds(FOLDS):
        assert seen.plan_loss(one) == pytest.approx(table.plan_loss(one), rel=1e-5)
        assert part.plan_loss(one) == pytest.approx(table.plan_loss(one), rel=1e-5)


def test_too_few_calls_cannot_be_split() -> None:
    problem, table = made_table(4, FOLDS - 1, 0.5)
    assert table.folds(FOLDS) == []
    found, crossed = allocate_with_cross_terms(problem, table, allocate)
    assert not crossed.kept and not crossed.moves and crossed.folds == 0
    assert crossed.predicted_loss == table.plan_loss(found.schemes)
    assert replace(table, calls=None).folds(FOLDS) == []


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("correlated", [0.0, 0.6])
def test_the_refined_plan_is_kept_only_when_held_back_calls_confirm_it(
    seed: int, correlated: float
) -> None:
    problem, table = made_table(seed, 8, correlated)
    found, crossed = allocate_with_cross_terms(problem, table, allocate)
    plain = allocate(problem)
    assert crossed.milp_held_back is not None and crossed.refined_held_back is not None
    assert crossed.kept == (
        crossed.moves > 0 and crossed.refined_held_back < crossed.milp_held_back
    )
    assert (found.schemes != plain.schemes) == crossed.kept
    assert crossed.predicted_loss == min(crossed.milp_held_back, crossed.predicted_loss)
    assert crossed.refined_seen <= crossed.milp_seen or crossed.rho < 1
    assert problem.plan_bytes(found.schemes) <= problem.budget_bytes
    assert allocate_with_cross_terms(problem, table, allocate) == (found, crossed)


def test_held_back_losses_are_those_of_plans_that_did_not_see_them() -> None:
    problem, table = made_table(2, 12, 0.5)
    seen_problems: list[Problem] = []

    def watched(part: Problem, kernel_penalty: float = 0.0) -> Allocation:
        seen_problems.append(part)
        return allocate(part, kernel_penalty=kernel_penalty)

    _, crossed = allocate_with_cross_terms(problem, table, watched, improve=False)
    assert not crossed.kept and crossed.moves == 0
    expected = []
    for part, (seen, apart) in zip(seen_problems[1:], table.folds(FOLDS), strict=True):
        assert {layer.name: dict(layer.loss) for layer in part.layers} == seen.losses
        expected.append(apart.plan_loss(allocate(part).schemes))
    assert crossed.predicted_loss == pytest.approx(np.mean(expected))


def test_from_one_call_the_prediction_counts_what_the_choice_flatters() -> None:
    """Schemes of one expected loss, which differs from timestep to timestep: the solver takes the luckiest."""
    names = ("w4a16-b32", "w4a16-b64", "w4a16-b128", "w4a16-b256")
    steps, spread, found = 6, 1.0, []
    for seed in range(5):
        rng = np.random.default_rng(seed)
        shape = (steps, 1, 1)
        squares = {
            f"l{number}": {s: np.exp(spread * rng.standard_normal(shape)) for s in names}
            for number in range(40)
        }
        values = {
            n: {s: np.sqrt(own) * rng.standard_normal(shape) for s, own in row.items()}
            for n, row in squares.items()
        }
        turns = np.arange(steps)[:, None]
        table = steadied(
            table_from_projections(np.arange(steps, dtype=np.float32), values, (), turns, squares)
        )
        choices = [LayerChoice(n, (n,), dict.fromkeys(names, 4), table.losses[n]) for n in squares]
        _, crossed = allocate_with_cross_terms(Problem(choices, 0, 400), table, allocate)
        truth = len(squares) * np.exp(spread**2 / 2)
        found.append([crossed.milp_seen / truth, crossed.predicted_loss / truth])
        assert crossed.folds == 0 and crossed.interval is None
    raw, grown = np.mean(found, axis=0)
    assert raw < 0.7
    assert 0.8 < grown < 1.2


def test_cross_terms_bring_a_gain_on_fresh_calls() -> None:
    """Where errors do cancel, refined plans do better on calls that nobody has seen, in the mean over seeds."""
    gains = []
    for seed in range(10):
        problem, table = made_table(seed, 24, 0.7)
        _, fresh = made_table(1000 + seed, 400, 0.7)
        found, crossed = allocate_with_cross_terms(problem, table, allocate)
        gains.append(fresh.plan_loss(found.schemes) / fresh.plan_loss(allocate(problem).schemes))
        assert crossed.predicted_loss == pytest.approx(fresh.plan_loss(found.schemes), rel=0.8)
    assert np.mean(gains) < 0.8
