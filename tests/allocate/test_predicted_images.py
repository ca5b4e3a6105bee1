"""Predicted PSNR against images whose errors are known, seen through few probes."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import digamma, polygamma

from mpq_deploy.allocate.predicted_images import SHARES, _of_half, predicted_images


@pytest.mark.parametrize("probes", [1, 2, 3, 4, 7, 16])
def test_the_noise_of_probes_is_known(probes: int) -> None:
    mean, variance = _of_half(probes)
    assert mean == pytest.approx(digamma(probes / 2))
    assert variance == pytest.approx(polygamma(1, probes / 2))


@pytest.mark.parametrize("probes", [2, 4])
def test_mean_and_spread_are_those_of_the_images(probes: int) -> None:
    random = np.random.default_rng(5)
    true_db = random.normal(40, 6, 4000)
    error = 10 ** (-true_db / 10)
    seen = np.square(random.standard_normal((probes, 4000))).mean(0) * error
    found = predicted_images(seen / 0.25, probes, 0.25, 10 * seen / 0.25)
    assert found.images == 4000
    assert found.psnr_db == pytest.approx(true_db.mean(), abs=0.5)
    assert found.pooled_psnr_db == pytest.approx(-10 * np.log10(error.mean()), abs=1)
    np.testing.assert_allclose(found.quantiles, np.quantile(true_db, SHARES), atol=1.5)
    assert found.limit_db == pytest.approx(found.psnr_db - 10)
    assert found.below == pytest.approx((true_db < true_db.mean() - 10).mean(), abs=0.02)


def test_equal_images_have_no_spread_and_no_error_is_no_failure() -> None:
    random = np.random.default_rng(6)
    seen = np.square(random.standard_normal((4, 2000))).mean(0) * 1e-4
    found = predicted_images(seen, 4, 1.0)
    assert max(found.quantiles) - min(found.quantiles) < 3
    assert np.isfinite(predicted_images(np.zeros(3), 4, 1.0).psnr_db)
