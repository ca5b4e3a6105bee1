"""Promoted rows against plain indexing."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mpq_deploy.formats.branches.rows import promote_rows
from tests.formats.branches.cases import quantized


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 30), st.integers(1, 12), st.integers(0, 1000))
def test_promoted_rows_come_from_int8_and_all_others_from_the_body(
    rows: int, promoted: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((rows, 8)).astype(np.float32)
    body, int8 = quantized(weight, 7), quantized(weight, 127)
    chosen = rng.permutation(rows)[: min(promoted, rows - 1)].astype(np.int32)
    whole = promote_rows(body, int8, chosen)
    expected = body.dequantize()
    expected[chosen] = int8.dequantize()[chosen]
    np.testing.assert_array_equal(whole.dequantize(), expected)
    assert len(whole.body.codes) + len(whole.promoted.codes) == rows
