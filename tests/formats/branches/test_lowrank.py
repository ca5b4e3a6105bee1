"""Low-rank factors against their bound."""

from __future__ import annotations

import numpy as np
import pytest

from mpq_deploy.formats.branches.lowrank import low_rank_factors


@pytest.mark.parametrize("cut", [None, 12])
def test_low_rank_factors_are_the_best_of_their_rank_in_the_output_s_error(cut: int | None) -> None:
    rng = np.random.default_rng(1)
    x = rng.standard_normal((400, 32)) * np.geomspace(0.1, 10, 32)
    error = rng.standard_normal((16, 32)).astype(np.float32)
    hessian = x.T @ x / len(x)
    if cut:  # block-diagonal moments, as of very wide layers
        hessian[:cut, cut:] = hessian[cut:, :cut] = 0
    moments = [hessian] if cut is None else [hessian[:cut, :cut], hessian[cut:, cut:]]
    down, up = low_rank_factors(error, moments, 1e-9, 4)

    def left(factors: np.ndarray) -> float:
        rest = error - factors
        return float(np.einsum("ok,kj,oj->", rest, hessian, rest))

    # Eckart-Young in the whitened space is the bound.
    root = np.linalg.cholesky(hessian)
    values = np.linalg.svd(error @ root, compute_uv=False)
    found = left(up.astype(np.float64) @ down.astype(np.float64))
    assert found == pytest.approx(float(np.sum(values[4:] ** 2)), rel=1e-3)
    u, s, vt = np.linalg.svd(error, full_matrices=False)
    assert found < left((u[:, :4] * s[:4]) @ vt[:4])
