"""E4M3 and E2M1 against their definitions, written out here by themselves."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpq_deploy.formats.minifloat import E2M1, E4M3, Minifloat

FORMATS = {"e4m3": E4M3, "e2m1": E2M1}


def defined(name: str) -> list[Fraction]:
    """The values of the codes without a sign, in the order of the codes, from the definition."""
    if name == "e2m1":
        return [Fraction(x) for x in ("0", "1/2", "1", "3/2", "2", "3", "4", "6")]
    values = []
    for code in range(127):
        exponent, mantissa = divmod(code, 8)
        if exponent:
            values.append(Fraction(2) ** (exponent - 7) * (1 + Fraction(mantissa, 8)))
        else:
            values.append(Fraction(2) ** -6 * Fraction(mantissa, 8))
    return values


def nearest_code(values: list[Fraction], x: float) -> int:
    """Exact arithmetic over all codes; of two as near the even one; beyond the largest the largest."""
    return min(
        range(len(values)), key=lambda code: (abs(values[code] - abs(Fraction(x))), code % 2)
    )


@pytest.mark.parametrize("name", FORMATS)
def test_every_code_has_the_value_that_the_definition_gives_it(name: str) -> None:
    one, values = FORMATS[name], [float(value) for value in defined(name)]
    half = 2 ** (one.bits - 1)
    assert one.values[: len(values)].tolist() == values
    assert one.values[half : half + len(values)].tolist() == [-value for value in values]
    assert one.largest == values[-1] == {"e4m3": 448.0, "e2m1": 6.0}[name]
    assert not np.isinf(one.values).any()
    assert np.isnan(one.values).sum() == (2 if name == "e4m3" else 0)


@pytest.mark.parametrize("name", FORMATS)
@given(st.data())
@settings(max_examples=200, deadline=None)
def test_rounding_is_to_nearest_ties_to_even_and_saturates(name: str, data: st.DataObject) -> None:
    one, values = FORMATS[name], defined(name)
    middles = [float(a + b) / 2 for a, b in itertools.pairwise(values)]
    numbers = st.floats(-1000, 1000, width=32) | st.sampled_from(middles)
    x = data.draw(numbers)
    array = np.array([x], np.float32)
    expected = nearest_code(values, float(array[0]))
    sign = -1.0 if x < 0 else 1.0
    assert one.nearest(array, np)[0] == sign * float(values[expected])
    code = int(one.encode(array)[0])
    assert code % 2 ** (one.bits - 1) == expected
    assert one.decode(one.encode(array))[0] == sign * float(values[expected])


@pytest.mark.torch
@pytest.mark.parametrize("one", FORMATS.values(), ids=list(FORMATS))
def test_torch_and_numpy_round_alike(one: Minifloat) -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    x = (rng.standard_normal(20000) * 10.0 ** rng.integers(-6, 4, 20000)).astype(np.float32)
    found = one.nearest(torch.from_numpy(x), torch).numpy()
    assert np.array_equal(found, one.nearest(x, np))
    assert np.array_equal(found, one.decode(one.encode(x)))
