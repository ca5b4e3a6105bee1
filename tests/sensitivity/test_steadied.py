"""Steadied losses against draws whose truth is known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mpq_deploy.sensitivity.steadied import steadied, steadied_folds
from mpq_deploy.sensitivity.table import SensitivityTable, table_from_projections

SCHEMES = ("w4a16-b32", "w4a16-b64", "w4a16-b128", "w4a16-b256", "w8a16")
PARTS, LAYERS = 200, 40


def drawn(
    entries: tuple[int, int, int], together: float = 0.0, seed: int = 1
) -> tuple[SensitivityTable, dict[str, dict[str, float]]]:
    """Return a table [steps, probes, calls] of layers with equal losses 1, and the true losses.

    ``together``: how much of each projection its parts have in common.
    """
    random = np.random.default_rng(seed)
    values, partial, truth = {}, {}, {}
    for layer in range(LAYERS):
        rows, squares, losses = {}, {}, {}
        for scheme in SCHEMES:
            parts = random.standard_normal((PARTS, *entries)) / np.sqrt(PARTS)
            parts += together * random.standard_normal(entries) / PARTS
            rows[scheme] = parts.sum(0)
            squares[scheme] = np.square(parts).sum(0)
            losses[scheme] = 1 + together**2
        name = f"layer{layer}"
        values[name], partial[name], truth[name] = rows, squares, losses
    steps, _, calls = entries
    turns = np.arange(steps * calls).reshape(steps, calls) % max(calls, steps)
    table = table_from_projections(np.arange(steps, dtype=np.float32), values, (), turns, partial)
    return table, truth


def errors(table: SensitivityTable, truth: dict[str, dict[str, float]]) -> np.ndarray:
    return np.array(
        [table.losses[n][s] / loss for n, row in truth.items() for s, loss in row.items()]
    )


@pytest.mark.parametrize("together", [0.0, 2.0])
def test_few_entries_give_losses_near_the_truth(together: float) -> None:
    """Four squares of one draw each scatter by 70 %; those of the parts, by their pooled ratio, by 20 %."""
    table, truth = drawn((4, 1, 1), together)
    raw, found = errors(table, truth), errors(steadied(table), truth)
    assert raw.std() > 0.5
    assert found.std() < 0.25
    assert found.mean() == pytest.approx(1, rel=0.15)


def test_the_solver_no_longer_takes_what_noise_flatters() -> None:
    """The best of five equal schemes looks four times too good from four entries, and hardly so when steadied."""
    table, _ = drawn((4, 1, 1))
    best = {
        number: np.mean([min(row.values()) for row in one.losses.values()])
        for number, one in enumerate((table, steadied(table)))
    }
    assert best[0] < 0.4
    assert best[1] > 0.8


def test_with_many_entries_a_scheme_s_own_square_decides() -> None:
    """Where parts of some schemes err together and of others apart, only the square of the sum tells."""
    table, _ = drawn((10, 8, 12))
    assert table.partial is not None and table.projections is not None
    vectors = {
        name: {s: v * (3 if s == "w8a16" else 1) for s, v in row.items()}
        for name, row in table.projections.items()
    }
    losses = {
        name: {s: float(np.square(v, dtype=np.float64).sum()) for s, v in row.items()}
        for name, row in vectors.items()
    }
    found = steadied(replace(table, projections=vectors, losses=losses))
    for name, row in losses.items():
        for scheme, loss in row.items():
            assert found.losses[name][scheme] == pytest.approx(loss, rel=0.15)


def test_projections_have_the_losses_as_their_squares_and_entries_add_up_to_the_plan_s() -> None:
    table = steadied(drawn((3, 2, 4))[0])
    assert table.projections is not None
    for name, row in table.losses.items():
        for scheme, loss in row.items():
            square = np.square(table.projections[name][scheme], dtype=np.float64).sum()
            assert square == pytest.approx(loss, rel=1e-4)
            assert table.losses_by_timestep[name][scheme].mean() == pytest.approx(loss, rel=1e-4)
    plan = dict.fromkeys(table.losses, "w8a16")
    own = sum(row["w8a16"] for row in table.losses.values())
    assert table.plan_loss(plan, rho=0.0) == pytest.approx(own, rel=1e-4)
    assert table.projections is not None
    together = np.sum([row["w8a16"] for row in table.projections.values()], axis=0)
    assert table.plan_loss(plan) == pytest.approx(float(together @ together), rel=1e-3)


def test_a_fold_does_not_change_what_is_learned_without_it() -> None:
    table, _ = drawn((2, 2, 8))
    changed = {
        name: {s: np.where(table.calls % 4 == 0, 9 * v, v) for s, v in row.items()}
        for name, row in (table.projections or {}).items()
    }
    first, second = (
        steadied_folds(one, 4)[0]
        for one in (steadied(table), steadied(replace(table, projections=changed)))
    )
    assert first[0].losses == second[0].losses
    assert first[1].losses == second[1].losses


def test_a_table_without_parts_stays_as_it_is() -> None:
    table = replace(drawn((2, 1, 2))[0], partial=None)
    assert steadied(table) is table
