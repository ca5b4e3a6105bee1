"""MixDQ's groups: each split against brute force, the budget, and what cannot be split."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest

from mpq_deploy.allocate.cross_terms import Solved
from mpq_deploy.allocate.groups import content_bytes, split_plans
from mpq_deploy.allocate.milp import LayerChoice, Problem, allocate_with_fee, plan_bytes
from mpq_deploy.errors import InfeasibleBudgetError, UsageError
from mpq_deploy.recipe import load_recipe
from mpq_deploy.stages.groups import check_groups

SCHEMES = ("fp16", "w8a8", "w4a16-b32")
CONTENT = ("b", "d")


def solve(part: Problem) -> Solved:
    return Solved(*allocate_with_fee(part, 0.0, gap=0.0), 0.0)


def problem(seed: int, budget: int = 200) -> Problem:
    """Five layers, a and b with one input, so that one INT8 scale serves both groups."""
    rng = np.random.default_rng(seed)
    layers = [
        LayerChoice(
            name,
            (tensor,),
            {s: int(rng.integers(low, 2 * low)) for s, low in zip(SCHEMES, (40, 20, 10), strict=True)},
            {s: float(loss) for s, loss in zip(SCHEMES, [0.0, *rng.random(2)], strict=True)},
        )
        for name, tensor in zip("abcde", ("x", "x", "y", "z", "z"), strict=True)
    ]
    return Problem(layers, 11, budget)


def losses(seed: int) -> dict[str, dict[str, float]]:
    rng = np.random.default_rng(100 + seed)
    return {name: {s: float(v) for s, v in zip(SCHEMES, np.sort(rng.random(3)), strict=True)} for name in CONTENT}


def best(whole: Problem, names: Sequence[str], loss: dict[str, dict[str, float]], limit: int) -> float:
    """The least loss of some layers within ``limit`` bytes, by trying everything."""
    layers = [layer for layer in whole.layers if layer.name in names]
    part = Problem(layers, 0, 0)
    plans = (dict(zip(names, chosen, strict=True)) for chosen in itertools.product(SCHEMES, repeat=len(names)))
    return min(sum(loss[n][s] for n, s in plan.items()) for plan in plans if plan_bytes(part, plan) <= limit)


@pytest.mark.parametrize("seed", range(8))
def test_every_split_is_the_best_of_both_groups(seed: int) -> None:
    whole, content = problem(seed), losses(seed)
    quality = {layer.name: dict(layer.loss) for layer in whole.layers}
    rest = [layer.name for layer in whole.layers if layer.name not in CONTENT]
    splits = split_plans(whole, content, solve)
    assert len(splits) > 1
    for split in splits:
        schemes = split.solved.schemes
        assert list(schemes) == [layer.name for layer in whole.layers]
        assert plan_bytes(whole, schemes) <= whole.budget_bytes
        assert split.content_bytes == content_bytes(whole, CONTENT, schemes)
        got = sum(content[name][schemes[name]] for name in CONTENT)
        assert got == pytest.approx(best(whole, CONTENT, content, split.content_bytes), abs=1e-9)
        left = whole.budget_bytes - whole.fixed_bytes - split.content_bytes
        got = sum(quality[name][schemes[name]] for name in rest)
        assert got == pytest.approx(best(whole, rest, quality, left), abs=1e-9)
        everything = sum(quality[name][scheme] for name, scheme in schemes.items())
        assert split.solved.report.loss == pytest.approx(everything)


def test_of_one_measure_no_split_beats_all_layers_together() -> None:
    whole = problem(3)
    content = {layer.name: dict(layer.loss) for layer in whole.layers if layer.name in CONTENT}
    together = solve(whole)
    size = content_bytes(whole, CONTENT, together.schemes)
    found = [split.solved.report.loss for split in split_plans(whole, content, solve, (size,))]
    assert min(found) >= together.report.loss - 1e-9


def test_losses_of_the_other_group_change_nothing_within_a_split() -> None:
    whole, content = problem(5), losses(5)
    before = {split.content_bytes: split.solved.schemes for split in split_plans(whole, content, solve)}
    scaled = {name: {s: 1e-4 * loss for s, loss in row.items()} for name, row in content.items()}
    assert {s.content_bytes: s.solved.schemes for s in split_plans(whole, scaled, solve)} == before


def test_a_budget_below_both_groups_names_the_least() -> None:
    with pytest.raises(InfeasibleBudgetError, match="two groups") as error:
        split_plans(problem(0, budget=30), losses(0), solve)
    smallest = error.value.smallest
    assert split_plans(problem(0, budget=smallest), losses(0), solve)


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"allocate.max_latency": "120ms"}, "limit on latency"),
        ({"allocate.objective": "latency"}, "limit on latency"),
        ({"measure.method": "orm"}, "orm does not predict one"),
    ],
)
def test_what_groups_do_not_go_with_is_refused(entries: dict[str, str], said: str) -> None:
    check_groups(load_recipe(None, entries))
    with pytest.raises(UsageError, match=said):
        check_groups(load_recipe(None, {**entries, "allocate.groups": "mixdq"}))
