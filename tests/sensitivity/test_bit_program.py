"""The two programs over bits against SciPy, the fractional knapsack by hand, and every combination."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from mpq_deploy.errors import UsageError
from mpq_deploy.sensitivity.bit_program import chosen_bits, linear_bits

Array = np.ndarray[Any, Any]


def case(seed: int, layers: int) -> tuple[Array, Array]:
    rng = np.random.default_rng(seed)
    return rng.uniform(0.01, 1, layers), np.rint(10 ** rng.uniform(1, 6, layers))


def knapsack(importance: Array, elements: Array, low: Array, high: Array, budget: float) -> Array:
    """The continuous optimum: raise the bits of most importance per element first."""
    bits, room = low.copy(), budget - float(elements @ low)
    for layer in np.argsort(-importance / elements):
        step = min(high[layer] - low[layer], room / elements[layer])
        bits[layer] += step
        room -= step * elements[layer]
    return bits


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), layers=st.integers(1, 30), mean=st.floats(4.2, 15.5))
def test_the_linear_program(seed: int, layers: int, mean: float) -> None:
    importance, elements = case(seed, layers)
    low, high, budget = np.full(layers, 4.0), np.full(layers, 16.0), mean * float(elements.sum())
    found = linear_bits(importance, elements, low, high, budget)
    unit = elements.max()
    reference = linprog(
        -importance, A_ub=[elements / unit], b_ub=[budget / unit], bounds=[(4, 16)] * layers
    )
    assert found.objective == pytest.approx(-reference.fun, rel=1e-6)
    by_hand = knapsack(importance, elements, low, high, budget)
    assert found.objective == pytest.approx(importance @ by_hand, rel=1e-6)
    assert elements @ found.bits <= budget * (1 + 1e-6)
    # All but one layer are at a bound: that is why its answer is no plan.
    inside = (found.bits > 4 + 1e-6) & (found.bits < 16 - 1e-6)
    assert inside.sum() <= 1


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), mean=st.floats(8.0, 16.0))
def test_the_multiple_choice_program_by_every_combination(seed: int, mean: float) -> None:
    importance, elements = case(seed, 6)
    choices = [(8, 16), (8, 16), (4, 8, 16), (8,), (8, 16), (4, 8)]
    budget = mean * float(elements.sum())
    found = chosen_bits(importance, elements, choices, budget)
    fitting = [np.array(bits) for bits in product(*choices) if elements @ np.array(bits) <= budget]
    assert found.objective == pytest.approx(max(importance @ bits for bits in fitting), rel=1e-9)
    assert all(bits in row for bits, row in zip(found.bits, choices))
    assert elements @ found.bits <= budget * (1 + 1e-9)
    bound = linear_bits(
        importance, elements, np.array([min(r) for r in choices], float), np.full(6, 16.0), budget
    )
    assert bound.objective >= found.objective - 1e-9


def test_too_few_bits_are_refused_with_what_is_needed() -> None:
    with pytest.raises(UsageError, match=r"8\.000"):
        chosen_bits(np.ones(2), np.array([10.0, 10.0]), [(8, 16), (8, 16)], 100.0)
    with pytest.raises(UsageError, match="fewer than the lowest"):
        linear_bits(np.ones(2), np.array([10.0, 10.0]), np.full(2, 4.0), np.full(2, 16.0), 79.0)
