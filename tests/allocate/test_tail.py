"""The worst images' plan against all plans that fit, and against the plan of the mean."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mpq_deploy.allocate.cross_terms import CrossTerms, allocate_with_cross_terms
from mpq_deploy.allocate.milp import Allocation, allocate
from mpq_deploy.allocate.problem import LayerChoice, Problem
from mpq_deploy.allocate.tail import allocate_tail, image_weights
from mpq_deploy.sensitivity.table import SensitivityTable, table_from_projections
from tests.allocate.test_cross_terms import SIZES, fitting
from tests.allocate.test_milp import EXACT

PROBES, IMAGES = 8, 20


def case(seed: int) -> tuple[Problem, SensitivityTable]:
    """Six layers: half hurt all images alike, half only two of them, and these much more."""
    rng = np.random.default_rng(seed)
    values = {}
    for layer in range(6):
        images = np.full(IMAGES, rng.uniform(0.7, 1.3))
        if layer % 2:
            images = np.where(rng.permutation(IMAGES) < 2, rng.uniform(2.0, 2.8), 0.1)
        row = rng.standard_normal((1, PROBES, IMAGES)) * images
        values[f"l{layer}"] = {s: f * row for s, f in zip(SIZES, (1e-3, 0.3, 1.0))}
    calls = np.arange(IMAGES)[None]
    table = table_from_projections(np.zeros(1, np.float32), values, (), calls)
    table = replace(table, metric="trajectory", mean_square=0.25)
    choices = [LayerChoice(n, (n,), SIZES, row) for n, row in table.losses.items()]
    return Problem(choices, 0, 33 * 6), table


def solved(problem: Problem, table: SensitivityTable) -> tuple[Allocation, CrossTerms]:
    def by_milp(part: Problem, kernel_penalty: float | None = None) -> Allocation:
        return allocate(part, EXACT, kernel_penalty or 0.0)

    return allocate_with_cross_terms(problem, table, by_milp)


def tail(table: SensitivityTable, plan: dict[str, str]) -> float:
    errors = table.errors_by_call(table.plan_entries(plan))
    return float(np.sort(errors)[-2:].mean())


def test_the_worst_images_lose_less_than_by_the_plan_of_the_mean() -> None:
    gains, excess = [], []
    for seed in range(8):
        problem, table = case(seed)
        mean, _ = solved(problem, table)
        found, crossed = allocate_tail(problem, table, 0.1, solved)
        assert problem.plan_bytes(found.schemes) <= problem.budget_bytes
        best = min(tail(table, plan) for plan in fitting(problem))
        assert tail(table, found.schemes) <= tail(table, mean.schemes)
        gains.append(tail(table, found.schemes) / tail(table, mean.schemes))
        excess.append(tail(table, found.schemes) / best)
        assert len(crossed.by_call) == IMAGES
    assert np.mean(gains) < 0.9 and np.median(excess) < 1.1, (gains, excess)


@pytest.mark.parametrize("inverse", [True, False])
def test_what_is_left_out_does_not_decide_and_is_predicted_all_the_same(inverse: bool) -> None:
    changed = 0
    for seed in range(8):
        problem, table = case(seed)
        weights = image_weights(table, 0.1, inverse)
        assert weights is not None and weights.mean() == pytest.approx(1, rel=1e-5)
        kept = np.flatnonzero(weights > 1e-3)
        assert len(kept) == IMAGES - 2
        # As if those two had never been measured.
        rows = {
            name: {
                s: (v.reshape(1, PROBES, IMAGES) * np.sqrt(weights))[..., kept]
                for s, v in row.items()
            }
            for name, row in table.projections.items()
        }
        without = table_from_projections(np.zeros(1, np.float32), rows, (), np.arange(18)[None])
        part = table.weighing(weights)
        found = allocate(problem.with_losses(part.losses), EXACT, 0.0)
        assert found.schemes == allocate(problem.with_losses(without.losses), EXACT, 0.0).schemes
        changed += found.schemes != allocate(problem, EXACT, 0.0).schemes
        plan, crossed = solved(problem.with_losses(part.losses), part)
        crossed = crossed.unweighted(weights)
        errors = np.array(crossed.by_call)
        assert crossed.predicted_loss == pytest.approx(errors.mean())
        assert crossed.interval is not None
        assert crossed.interval[0] < errors.mean() < crossed.interval[1]
        if not crossed.folds:
            entries = table.plan_entries(problem.spread(plan.schemes))
            np.testing.assert_allclose(errors, table.errors_by_call(entries), rtol=1e-3)
    assert changed


def test_each_image_counts_by_the_inverse_of_its_own_error() -> None:
    _, table = case(0)
    weights = image_weights(table, 0.0, True)
    assert weights is not None
    part = table.weighing(weights)
    errors = np.zeros(IMAGES)
    for row in part.projections.values():
        errors += sum(part.errors_by_call(np.square(v, dtype=np.float64)) for v in row.values())
    np.testing.assert_allclose(errors, errors.mean(), rtol=1e-4)
    assert image_weights(replace(table, metric="probe"), 0.1, True) is None
    # Fewer than one is none.
    assert image_weights(table, 0.02, False) is None


def test_errors_by_call_are_the_mean_squares_of_its_entries() -> None:
    _, table = case(0)
    plan = dict.fromkeys(table.losses, "w8a8")
    entries = np.sum([table.projections[n][s] for n, s in plan.items()], axis=0)
    squares = np.square(entries.reshape(PROBES, IMAGES).astype(np.float64)).sum(0) * IMAGES
    np.testing.assert_allclose(table.errors_by_call(table.plan_entries(plan)), squares, rtol=1e-5)
    np.testing.assert_allclose(squares.mean(), table.plan_loss(plan), rtol=1e-5)
