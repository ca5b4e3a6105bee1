"""The quantizers alone: codes kept at the start, gradients, grids of any width per channel."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mpq_deploy.formats.interfaces import ActivationGrid
from mpq_deploy.formats.shifts import middle_of
from mpq_deploy.recover.torch_quantizers import (
    ActivationScale,
    Grid,
    Levels,
    fake_quantize,
    halved,
    rounded,
)
from mpq_deploy.rounding.quantizers import QuantizedMatrix
from mpq_deploy.rounding.row_grids import RowGrids, SimulatedMatrix

pytestmark = pytest.mark.torch


@pytest.mark.parametrize("margin", [0.0, 0.25, 0.499])
def test_codes_far_from_the_nearest_are_kept(margin: float) -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((6, 32)).astype(np.float32)
    scale = np.full((6, 4), 0.13, np.float16)
    codes = rng.integers(-8, 8, weight.shape)
    grid = Grid(QuantizedMatrix(codes, scale), weight, (-8, 7), margin)
    zero = torch.zeros(6, 32)
    np.testing.assert_array_equal(grid.codes(zero).detach().numpy(), codes)
    expected = codes * np.repeat(scale.astype(np.float32), 8, axis=1)
    np.testing.assert_array_equal(grid(zero).detach().numpy(), expected.astype(np.float32))


def test_channels_may_have_grids_of_their_own() -> None:
    """Two, three and four bits side by side, as mixed precision within a layer has them."""
    codes = np.zeros((3, 8), np.int8)
    low, high = np.array([[-2], [-4], [-8]]), np.array([[1], [3], [7]])
    start = QuantizedMatrix(codes, np.ones((3, 1), np.float16))
    grid = Grid(start, np.zeros((3, 8), np.float32), (low, high), 0.0)
    up, down = (grid.codes(torch.full((3, 8), far)).detach().numpy() for far in (100.0, -100.0))
    np.testing.assert_array_equal(up[:, :1], high)
    np.testing.assert_array_equal(down[:, :1], low)
    scale = ActivationScale(ActivationGrid(0.5, -8, 7), np.empty(0))
    np.testing.assert_array_equal(
        scale.quantize(torch.tensor([[-9.0, 0.6, 9.0]]), 1).detach(), [[-4.0, 0.5, 3.5]]
    )


@pytest.mark.parametrize("taps", [1, 3])
def test_blocks_along_positions_learn_as_they_are_stored(taps: int) -> None:
    rng = np.random.default_rng(5)
    codes = rng.integers(-8, 8, (4, 24)).astype(np.int8)
    scale = rng.uniform(0.1, 0.4, (4, 6)).astype(np.float16)
    matrix = QuantizedMatrix(codes, scale, None, taps)
    grid = Grid(matrix, matrix.dequantize(), (-8, 7), 0.0)
    zero = torch.zeros(4, 24)
    np.testing.assert_array_equal(grid(zero).detach(), matrix.dequantize())
    np.testing.assert_array_equal(grid.merged(zero).dequantize(), matrix.dequantize())
    # A move by one step of each column's own scale changes each code by one.
    step = matrix.effective_scale()[:, matrix.columns()]
    moved = grid.merged(torch.from_numpy(step)).codes
    np.testing.assert_array_equal(moved, np.clip(codes + 1, -8, 7))


def mixed_levels(rng: np.random.Generator) -> SimulatedMatrix:
    """Rows of four levels, of one sign, of a grid with one residual, and with two; codes and signs at random."""
    low, high = np.array([-1, 0, -3, -2], np.int16), np.array([2, 0, 4, 1], np.int16)
    residual = np.array([[0, 0.3, 0.21, 0.25], [0, 0, 0, 0.09]], np.float16)
    grids = RowGrids(low, high, np.array([0.2, 1, 0.5, 0.35], np.float16), residual)
    codes = np.stack([rng.integers(a, b + 1, 24) for a, b in zip(low, high)]).astype(np.int8)
    signs = rng.choice(np.array([-1, 1], np.int8), (2, 4, 24)) * (residual > 0)[:, :, None].astype(
        np.int8
    )
    return SimulatedMatrix(grids, codes, signs)


def test_levels_start_at_the_given_matrix_and_take_the_nearest_one() -> None:
    rng = np.random.default_rng(1)
    matrix = mixed_levels(rng)
    target = rng.standard_normal((4, 24)).astype(np.float32)
    for margin in (0.0, 0.3):
        levels = Levels(matrix, target, margin)
        zero = torch.zeros(4, 24)
        np.testing.assert_array_equal(levels(zero).detach(), matrix.dequantize())
        np.testing.assert_array_equal(levels.merged(zero).dequantize(), matrix.dequantize())
    delta = torch.from_numpy(rng.standard_normal((4, 24)).astype(np.float32)).requires_grad_()
    levels = Levels(matrix, target, 0.0)
    found = levels(delta)
    for row in range(4):
        sizes = matrix.grids.residual[:, row].astype(np.float64)
        values = [
            code * float(matrix.grids.scale[row]) + first * sizes[0] + second * sizes[1]
            for code in range(matrix.grids.low[row], matrix.grids.high[row] + 1)
            for first in ((-1, 1) if sizes[0] else (0,))
            for second in ((-1, 1) if sizes[1] else (0,))
        ]
        wanted = matrix.dequantize()[row] + delta.detach().numpy()[row]
        nearest = np.min(np.abs(np.array(values)[:, None] - wanted), axis=0)
        np.testing.assert_allclose(np.abs(found.detach().numpy()[row] - wanted), nearest, atol=1e-6)
        found[row].sum().backward(retain_graph=True)
        inside = (wanted >= min(values)) & (wanted <= max(values))
        np.testing.assert_array_equal(delta.grad[row] != 0, inside)
    merged = levels.merged(delta)
    np.testing.assert_array_equal(merged.dequantize(), found.detach().numpy())
    assert (merged.codes >= merged.grids.low[:, None]).all() and (
        merged.codes <= merged.grids.high[:, None]
    ).all()
    assert (np.abs(merged.signs) == (matrix.grids.residual > 0)[:, :, None]).all()


def test_learned_sizes_of_levels_move_the_weight_and_no_code() -> None:
    matrix = mixed_levels(np.random.default_rng(2))
    levels = Levels(matrix, np.zeros((4, 24), np.float32), 0.0)
    with torch.no_grad():
        levels.scale.log_ratio.fill_(np.log(1.5))
        levels.residual.log_ratio.fill_(np.log(0.5))
    merged = levels.merged(torch.zeros(4, 24))
    np.testing.assert_array_equal(merged.codes, matrix.codes)
    np.testing.assert_array_equal(merged.signs, matrix.signs)
    np.testing.assert_allclose(merged.grids.residual, 0.5 * matrix.grids.residual, rtol=2e-3)
    np.testing.assert_array_equal(merged.dequantize(), levels(torch.zeros(4, 24)).detach())


def test_a_learned_scale_moves_the_weight_and_no_code() -> None:
    grid = Grid(
        QuantizedMatrix(np.full((2, 4), 3), np.full((2, 1), 0.5, np.float16)),
        np.full((2, 4), 1.7, np.float32),
        (-8, 7),
        0.499,
    )
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


def test_a_shift_is_the_written_constant() -> None:
    """A middle of many codes does not fit FP16: codes beside a boundary follow what is written."""
    grid = ActivationGrid(float(np.float16(0.908)), zeros=(-101, 43, 117))
    x = np.linspace(-90, 90, 3 * 4001, dtype=np.float32).reshape(1, 3, -1)
    middle = middle_of(np.array(grid.zeros), grid.scale)[:, None]
    codes = np.clip(np.rint((x - middle) / np.float32(grid.scale)), -128, 127)
    found = ActivationScale(grid, np.zeros(0)).quantize(torch.from_numpy(x), 1).detach().numpy()
    assert np.abs(found - (codes * np.float32(grid.scale) + middle)).max() < 1e-4
