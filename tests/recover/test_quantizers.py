"""The quantizers alone: codes kept at the start, gradients, grids of any width per channel."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mpq_deploy.recover.quantizers import ActivationScale, Grid, fake_quantize, halved, rounded

pytestmark = pytest.mark.torch


@pytest.mark.parametrize("margin", [0.0, 0.25, 0.499])
def test_codes_far_from_the_nearest_are_kept(margin: float) -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((6, 32)).astype(np.float32)
    scale = np.full((6, 4), 0.13, np.float16)
    codes = rng.integers(-8, 8, weight.shape)
    grid = Grid(codes, scale, weight, -8, 7, margin)
    zero = torch.zeros(6, 32)
    np.testing.assert_array_equal(grid.codes(zero).detach().numpy(), codes)
    expected = codes * np.repeat(scale.astype(np.float32), 8, axis=1)
    np.testing.assert_array_equal(grid(zero).detach().numpy(), expected.astype(np.float32))


def test_channels_may_have_grids_of_their_own() -> None:
    """Two, three and four bits side by side, as mixed precision within a layer has them."""
    codes = np.zeros((3, 8), np.int8)
    low, high = np.array([[-2], [-4], [-8]]), np.array([[1], [3], [7]])
    grid = Grid(codes, np.ones((3, 1), np.float16), np.zeros((3, 8), np.float32), low, high, 0.0)
    up, down = (grid.codes(torch.full((3, 8), far)).detach().numpy() for far in (100.0, -100.0))
    np.testing.assert_array_equal(up[:, :1], high)
    np.testing.assert_array_equal(down[:, :1], low)
    scale = ActivationScale(0.5, np.empty(0), (-8, 7))
    np.testing.assert_array_equal(scale.quantize(torch.tensor([[-9.0, 0.6, 9.0]]), 1).detach(), [[-4.0, 0.5, 3.5]])


def test_a_learned_scale_moves_the_weight_and_no_code() -> None:
    grid = Grid(np.full((2, 4), 3), np.full((2, 1), 0.5, np.float16), np.full((2, 4), 1.7, np.float32), -8, 7, 0.499)
    with torch.no_grad():
        grid.scale.log_ratio.fill_(np.log(1.5))
    assert bool((grid.codes(torch.zeros(2, 4)) == 3).all())
    np.testing.assert_array_equal(grid(torch.zeros(2, 4)).detach(), np.full((2, 4), 2.25))


def test_gradients_pass_rounding_and_stop_at_the_limits() -> None:
    x = torch.tensor([-300.0, 0.3, 0.6, 300.0], requires_grad=True)
    scale = torch.tensor(1.0, requires_grad=True)
    fake_quantize(x, scale).sum().backward()
    np.testing.assert_array_equal(x.grad, [0.0, 1.0, 1.0, 0.0])
    # LSQ: code - x within the limits, the limit beyond.
    assert float(scale.grad) == pytest.approx(-128 + (0 - 0.3) + (1 - 0.6) + 127)
    y = torch.tensor([0.5, 1.5, 1e6, -0.0], requires_grad=True)
    assert rounded(y).tolist() == [0.0, 2.0, 1e6, 0.0]
    stored = halved(y)
    assert stored.tolist() == [0.5, 1.5, 65504.0, 0.0] and bool(torch.signbit(stored[3]))
    stored.sum().backward()
    assert y.grad.tolist() == [1.0] * 4
