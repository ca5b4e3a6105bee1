"""OMPQ's programme over bit widths: the most importance-weighted bits within a budget, by HiGHS.

Maximise sum_i c_i b_i subject to sum_i n_i b_i <= budget, with importances c_i, element counts n_i and bits b_i. The
linear programme takes every b_i from an interval: its answer is a bound on what real schemes can reach, and is never
rounded to a plan. The multiple-choice programme takes b_i from a list. Weights' bits are chosen by the plan's own
MILP (``allocate``), on exact bytes; activations' bits, which take no bytes, by ``chosen_bits`` (our reading).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mpq_deploy.errors import MpqError, UsageError
from mpq_deploy.models.spec import Array


@dataclass(frozen=True)
class BitSolution:
    """Bits per layer, float64 [L], and ``objective`` = sum_i c_i b_i."""

    bits: Array
    objective: float


def linear_bits(importance: Array, elements: Array, low: Array, high: Array, budget_bits: float) -> BitSolution:
    """Solve the linear programme over continuous bits low_i <= b_i <= high_i.

    ``importance`` and ``elements``: c and n, [L]. Raises UsageError when the lowest bits are over the budget.
    """
    _check_fits(elements, low, budget_bits)
    bits = _solve(importance, elements / elements.max(), low, high, budget_bits / elements.max())
    return BitSolution(bits, float(importance @ bits))


def chosen_bits(
    importance: Array, elements: Array, choices: Sequence[Sequence[int]], budget_bits: float
) -> BitSolution:
    """Solve the multiple-choice programme: b_i is one of ``choices[i]``.

    Raises UsageError when the lowest bits are over the budget.
    """
    _check_fits(elements, np.array([min(row) for row in choices], np.float64), budget_bits)
    pairs = [(layer, bits) for layer, row in enumerate(choices) for bits in row]
    owner = np.array([layer for layer, _ in pairs])
    width = np.array([bits for _, bits in pairs], np.float64)
    unit = float(elements.max())
    taken = _solve(
        importance[owner] * width,
        elements[owner] * width / unit,
        np.zeros(len(pairs)),
        np.ones(len(pairs)),
        budget_bits / unit,
        owner,
    )
    bits = np.zeros(len(choices))
    np.add.at(bits, owner, width * np.rint(taken))
    return BitSolution(bits, float(importance @ bits))


def _check_fits(elements: Array, low: Array, budget_bits: float) -> None:
    least = float(elements @ low)
    if least > budget_bits * (1 + 1e-9):
        raise UsageError(
            f"{budget_bits:,.0f} bits are fewer than the lowest bit widths take: {least:,.0f}.",
            f"Give at least {least / float(elements.sum()):.3f} bits per element.",
        )


def _solve(benefit: Array, cost: Array, low: Array, high: Array, budget: float, owner: Array | None = None) -> Array:
    """Return x in [low, high] of most ``benefit`` x with ``cost`` x <= budget.

    With ``owner`` [columns] x is binary, and the columns of one owner sum to 1.
    """
    import highspy

    from mpq_deploy.system.highs import QuietHighs

    highs = QuietHighs(mip_rel_gap=0.0)
    groups = [] if owner is None else [np.flatnonzero(owner == layer) for layer in np.unique(owner)]
    rows: list[tuple[float, float, Array, Array]] = [(1.0, 1.0, group, np.ones(len(group))) for group in groups]
    rows.append((-highspy.kHighsInf, budget, np.arange(len(cost)), cost))
    programme = highspy.HighsLp()
    programme.num_col_, programme.num_row_ = len(cost), len(rows)
    programme.sense_ = highspy.ObjSense.kMaximize
    # HiGHS' tolerances are absolute: the greatest benefit is brought to 1.
    programme.col_cost_ = benefit / (float(np.abs(benefit).max()) or 1.0)
    programme.col_lower_, programme.col_upper_ = np.asarray(low, np.float64), np.asarray(high, np.float64)
    if owner is not None:
        programme.integrality_ = [highspy.HighsVarType.kInteger] * len(cost)
    programme.row_lower_ = np.array([row[0] for row in rows])
    programme.row_upper_ = np.array([row[1] for row in rows])
    programme.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    programme.a_matrix_.start_ = np.cumsum([0] + [len(row[2]) for row in rows])
    programme.a_matrix_.index_ = np.concatenate([row[2] for row in rows])
    programme.a_matrix_.value_ = np.concatenate([row[3] for row in rows])
    highs.passModel(programme)
    highs.run()
    return _values(highs)


def _values(highs: Any) -> Array:
    status = highs.modelStatusToString(highs.getModelStatus())
    if status != "Optimal":
        raise MpqError(f"HiGHS ended with '{status}' on the bit widths.", "This is a defect: please report it.")
    return np.asarray(highs.getSolution().col_value, np.float64)
