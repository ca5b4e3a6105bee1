"""OMPQ's program over bit widths (arXiv 2109.07865), solved by HiGHS.

Maximize sum_i c_i b_i subject to sum_i n_i b_i <= budget, with importances c_i, element counts n_i
and bits b_i. ``linear_bits`` takes each b_i from an interval: the optimum is an upper bound for
real schemes and is never rounded to a plan. ``chosen_bits`` takes each b_i from a list. It chooses
the bits of activations, which take no bytes in the file (our reading); the bits of weights are
chosen by the plan's MILP (``allocate``) on exact bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mpq_deploy.errors import MpqError, UsageError
from mpq_deploy.models.spec import Array
from mpq_deploy.system.highs import LinearProgram, Row, solve_program


@dataclass(frozen=True)
class BitSolution:
    """Bits per layer, float64 [L], and ``objective`` = sum_i c_i b_i."""

    bits: Array
    objective: float


def linear_bits(
    importance: Array, elements: Array, low: Array, high: Array, budget_bits: float
) -> BitSolution:
    """Solve the linear program over continuous bits low_i <= b_i <= high_i.

    ``importance`` [L]: c; ``elements`` [L]: n. Raises UsageError when ``low`` exceeds the budget.
    """
    _check_fits(elements, low, budget_bits)
    bits = _solve(importance, elements / elements.max(), low, high, budget_bits / elements.max())
    return BitSolution(bits, float(importance @ bits))


def chosen_bits(
    importance: Array, elements: Array, choices: Sequence[Sequence[int]], budget_bits: float
) -> BitSolution:
    """Solve the multiple-choice program: b_i is one of ``choices[i]``.

    Raises UsageError when the lowest choices exceed the budget.
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
    minimum = float(elements @ low)
    if minimum > budget_bits * (1 + 1e-9):
        raise UsageError(
            f"{budget_bits:,.0f} bits are fewer than the lowest bit widths take: {minimum:,.0f}.",
            f"Give at least {minimum / float(elements.sum()):.3f} bits per element.",
        )


def _solve(
    benefit: Array, cost: Array, low: Array, high: Array, budget: float, owner: Array | None = None
) -> Array:
    """Return the x in [low, high] that maximizes ``benefit`` x subject to ``cost`` x <= ``budget``.

    ``owner`` [columns]: x is binary, and exactly one column of each owner is 1.
    """
    owned = [] if owner is None else [np.flatnonzero(owner == layer) for layer in np.unique(owner)]
    rows = [Row(1.0, 1.0, columns, np.ones(len(columns))) for columns in owned]
    rows.append(Row(-math.inf, budget, np.arange(len(cost)), cost))
    program = LinearProgram(
        # HiGHS' tolerances are absolute, so the largest benefit is scaled to 1.
        cost=benefit / (float(np.abs(benefit).max()) or 1.0),
        low=np.asarray(low, np.float64),
        high=np.asarray(high, np.float64),
        rows=rows,
        integer=owner is not None,
        maximize=True,
    )
    outcome = solve_program(program, mip_rel_gap=0.0)
    if outcome.status != "Optimal":
        raise MpqError(
            f"HiGHS ended with '{outcome.status}' on the bit widths.",
            "This is a bug: please report it.",
        )
    return outcome.values
