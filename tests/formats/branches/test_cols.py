"""What outlier columns take from a layer, against plain linear algebra."""

from __future__ import annotations

import numpy as np

from mpq_deploy.formats.branches.cols import beside_body, columns_of, without_columns
from tests.formats.branches.cases import quantized


def test_outlier_columns_are_exact_to_fp16_and_zero_in_the_body() -> None:
    weight = np.random.default_rng(0).standard_normal((6, 4 * 9)).astype(np.float32)
    body = quantized(weight, 127)
    taken = [*range(9), *range(18, 27)]
    np.testing.assert_array_equal(columns_of(np.array([0, 2]), 9), taken)
    body.codes[:, taken] = 0
    split = beside_body(body, weight, np.array([0, 2], np.int32), 9)
    np.testing.assert_array_equal(
        split.dequantize()[:, taken], weight[:, taken].astype(np.float16).astype(np.float32)
    )
    others = [k for k in range(36) if k not in taken]
    np.testing.assert_array_equal(split.dequantize()[:, others], body.dequantize()[:, others])


def test_what_is_taken_out_neither_weighs_nor_correlates_with_the_rest() -> None:
    rng = np.random.default_rng(3)
    weight = rng.standard_normal((5, 20)).astype(np.float32)
    x = rng.standard_normal((100, 20)).astype(np.float32)
    hessian = x.T @ x
    taken = np.array([1, 11, 12])
    rest, parts = without_columns(weight, [hessian[:12, :12], hessian[12:, 12:]], taken)
    without = x.copy()
    without[:, taken] = 0
    expected = without.T @ without
    np.testing.assert_allclose(parts[0], expected[:12, :12], rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(parts[1], expected[12:, 12:], rtol=1e-5, atol=1e-4)
    assert not rest[:, taken].any() and (rest != 0).sum() == 5 * 17
    assert hessian[1, 1] > 0  # the Hessian itself is shared by layers and stays
