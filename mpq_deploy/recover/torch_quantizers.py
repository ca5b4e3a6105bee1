"""Quantizers in torch with straight-through gradients; their values are exactly the deployed ones.

A weight is a matrix [O, K] as in ``rounding.quantizers``. Rounding has the gradient of the identity
(the straight-through estimator, Bengio et al. 2013); clipping has gradient 0 beyond the limits.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from mpq_deploy.calibrate.scales import LARGEST_SCALE as LARGEST_ACTIVATION_SCALE
from mpq_deploy.calibrate.scales import QUANT_MAX, QUANT_MIN
from mpq_deploy.calibrate.scales import SMALLEST_SCALE as SMALLEST_ACTIVATION_SCALE
from mpq_deploy.formats.interfaces import ActivationGrid
from mpq_deploy.formats.ranges import STATIC, ActivationRange
from mpq_deploy.models.spec import Array
from mpq_deploy.rounding.float_levels import LevelMatrix
from mpq_deploy.rounding.quantizers import (
    LARGEST_SCALE,
    SMALLEST_SCALE,
    QuantizedMatrix,
    channel_first,
)
from mpq_deploy.rounding.row_grids import RowGrids, SimulatedMatrix

Tensor = Any  # torch.Tensor; torch is not followed by mypy here
LARGEST_HALF = 65504.0


class _StraightThrough(torch.autograd.Function):  # type: ignore[misc]
    """Returns ``value`` in place of ``x``; ``x`` gets the gradient of the result."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def rounded(x: Tensor) -> Tensor:
    """Round half to even, as QuantizeLinear does; straight-through gradient."""
    return _StraightThrough.apply(x, torch.round(x.detach()))


def halved(x: Tensor) -> Tensor:
    """Round to FP16, saturating as when constants are written; straight-through gradient."""
    return _StraightThrough.apply(
        x, x.detach().clamp(-LARGEST_HALF, LARGEST_HALF).half().to(x.dtype)
    )


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    quant_min: int = QUANT_MIN,
    quant_max: int = QUANT_MAX,
    shift: Tensor | float = 0.0,
) -> Tensor:
    """Return ``x`` through QuantizeLinear and DequantizeLinear; ``x`` and ``scale`` get gradients.

    The gradient of the scale is LSQ's (Esser et al. 2020): code - x / scale within the limits, the
    limit beyond. ``shift``: what is taken off the channels before, and added again behind.
    """
    return torch.clamp(rounded((x - shift) / scale), quant_min, quant_max) * scale + shift


def fake_quantize_levels(x: Tensor, scale: Tensor, grid: ActivationGrid) -> Tensor:
    """Do as ``fake_quantize`` does, for a ``grid`` whose levels are not uniform."""
    value = torch.clamp(x / scale, grid.quant_min, grid.quant_max)
    return (
        _StraightThrough.apply(value, grid.levels(value.detach().float(), torch).to(value.dtype))
        * scale
    )


class LearnedScale(torch.nn.Module):  # type: ignore[misc]
    """Positive FP16 scales, learned as the logarithm of their ratio to the initial ``scale``.

    Before training they are exactly the initial scales, as exp(0) is 1.
    """

    def __init__(self, scale: Array, smallest: float, largest: float) -> None:
        super().__init__()
        self.register_buffer("start", torch.from_numpy(np.array(scale, np.float32)))
        self.log_ratio = torch.nn.Parameter(torch.zeros(np.shape(scale)))
        self.limits = (smallest, largest)

    def forward(self) -> Tensor:
        """Return the scales rounded to FP16, as float32."""
        return halved((self.start * torch.exp(self.log_ratio)).clamp(*self.limits))

    def stored(self) -> Array:
        """Return the scales to store, float16."""
        with torch.no_grad():
            return np.asarray(self().cpu().numpy(), np.float16)


class Grid(torch.nn.Module):  # type: ignore[misc]
    """A weight matrix [O, K]: scale * clip(round(start + delta / initial scale)).

    Training starts from ``matrix``: a ``delta`` of 0 gives exactly its weight. With channel scales
    (4-bit storage with INT8 compute) these are learned, and the block scales stay the same integer
    multiples of them; otherwise the block scales are learned. ``limits``: those of the codes,
    numbers or arrays [O, 1].

    The latent weight ``start`` is ``target`` float [O, K] (the float weight) in units of the scale,
    clipped to within ``margin`` of the code, so that GPTQ's codes are kept. The latent is measured
    in initial scales, so learning a scale changes no code (our choice).
    """

    def __init__(
        self,
        matrix: QuantizedMatrix,
        target: Array,
        limits: tuple[int | Array, int | Array],
        margin: float,
    ) -> None:
        super().__init__()
        codes, scale, multiples = matrix.codes, matrix.scale, None
        self.taps = taps = matrix.taps
        blocks = matrix.effective_scale()
        if matrix.channel_scale is not None:
            scale = matrix.channel_scale[:, None]
            multiples = np.rint(blocks / scale.astype(np.float32))
        step = channel_first(np.repeat(blocks, codes.shape[1] // blocks.shape[1], axis=1), taps)
        beyond = np.clip(target / step - codes, -margin, margin)
        self.register_buffer("start", torch.from_numpy((codes + beyond).astype(np.float32)))
        self.register_buffer("first", torch.from_numpy(np.asarray(blocks, np.float32)))
        self.register_buffer("low", torch.as_tensor(limits[0], dtype=torch.float32))
        self.register_buffer("high", torch.as_tensor(limits[1], dtype=torch.float32))
        self.register_buffer(
            "multiples", None if multiples is None else torch.from_numpy(np.float32(multiples))
        )
        self.scale = LearnedScale(scale, SMALLEST_SCALE, LARGEST_SCALE)

    def codes(self, delta: Tensor) -> Tensor:
        """Return the codes [O, K], as floats, of the latent plus ``delta`` [O, K]."""
        moved = self.start + self._flat(self._blocked(delta) / self.first[:, :, None], delta)
        return torch.clamp(rounded(moved), self.low, self.high)

    def forward(self, delta: Tensor) -> Tensor:
        """Return the dequantized weight [O, K]."""
        codes = self._blocked(self.codes(delta))
        if self.multiples is None:
            return self._flat(codes * self.scale()[:, :, None], delta)
        # Code times multiple first: an exact integer, the INT8 code at run time.
        return self._flat(codes * self.multiples[:, :, None] * self.scale()[:, :, None], delta)

    def _blocked(self, matrix: Tensor) -> Tensor:
        """Reshape [O, K] to [O, B, K / B]."""
        if self.taps > 1:
            matrix = matrix.reshape(len(matrix), -1, self.taps).transpose(1, 2)
        return matrix.reshape(len(matrix), self.first.shape[1], -1)

    def _flat(self, blocked: Tensor, like: Tensor) -> Tensor:
        """Undo ``_blocked`` for a matrix of the shape of ``like``."""
        if self.taps > 1:
            blocked = blocked.reshape(len(like), self.taps, -1).transpose(1, 2)
        return blocked.reshape(like.shape)

    @property
    def mean_step(self) -> float:
        """The mean of the initial scales."""
        return float(self.first.mean())

    def merged(self, delta: Tensor) -> QuantizedMatrix:
        """Return the codes and scales of the latent plus ``delta``, to store."""
        with torch.no_grad():
            codes = self.codes(delta).cpu().numpy().astype(np.int8)
        scale = self.scale.stored()
        if self.multiples is None:
            return QuantizedMatrix(codes, scale, None, self.taps)
        blocks = self.multiples.cpu().numpy() * scale.astype(np.float32)
        return QuantizedMatrix(codes, blocks.astype(np.float16), scale[:, 0], self.taps)


class FloatLevels(torch.nn.Module):  # type: ignore[misc]
    """A weight matrix [O, K] of small floats (``LevelMatrix``), whose scales are not learned.

    NumPy finds the nearest level of each latent, as in rounding. ``target`` and ``margin``: as for
    ``Levels``.
    """

    def __init__(self, matrix: LevelMatrix, target: Array, margin: float) -> None:
        super().__init__()
        self._matrix, held = matrix, matrix.dequantize()
        self.mean_step = matrix.mean_step
        reach = margin * self.mean_step
        moved = held + np.clip(target - held, -reach, reach).astype(np.float32)
        same = matrix.rounded(moved).codes == matrix.codes
        self.register_buffer("start", torch.from_numpy(np.where(same, moved, held)))

    def merged(self, delta: Tensor) -> LevelMatrix:
        """Return the codes and scales of the latent plus ``delta`` [O, K], to store."""
        latent = (self.start + delta).detach().float().cpu().numpy()
        return self._matrix.rounded(latent)

    def forward(self, delta: Tensor) -> Tensor:
        """Return the dequantized weight [O, K]."""
        held = torch.from_numpy(self.merged(delta).dequantize()).to(delta.device)
        return _StraightThrough.apply(self.start + delta, held)


class Levels(torch.nn.Module):  # type: ignore[misc]
    """A weight matrix [O, K] of a grid and binary residuals per row (``SimulatedMatrix``).

    A latent takes the nearest of its row's initial 2^bits levels, so learning a scale or residual
    changes no code (as with ``Grid``). A ``delta`` of 0 gives exactly the weight of ``matrix``.
    ``target`` and ``margin``: as for ``Grid``, in units of the row's mean distance between levels;
    a latent that would be nearer to another level starts at its own level instead.
    """

    def __init__(self, matrix: SimulatedMatrix, target: Array, margin: float) -> None:
        super().__init__()
        values, codes, signs = _levels(matrix)
        held = matrix.dequantize()
        # Rows with fewer levels are padded with infinity.
        counts = np.isfinite(values).sum(axis=1)
        last = np.take_along_axis(values, counts[:, None] - 1, axis=1)
        self.step = np.maximum(
            (last - values[:, :1]) / np.maximum(counts - 1, 1)[:, None], np.finfo(np.float32).tiny
        )
        middles = (values[:, 1:] + values[:, :-1]) / 2
        self.register_buffer("middles", torch.from_numpy(np.ascontiguousarray(middles)))
        self.register_buffer("lowest", torch.from_numpy(values[:, :1].copy()))
        self.register_buffer("highest", torch.from_numpy(last.copy()))
        self.register_buffer("code_of", torch.from_numpy(codes))
        self.register_buffer("sign_of", torch.from_numpy(signs))
        beyond = np.clip(target - held, -margin * self.step, margin * self.step)
        moved, start = (
            torch.from_numpy(np.asarray(held + beyond, np.float32)),
            torch.from_numpy(held),
        )
        same = torch.searchsorted(self.middles, moved) == torch.searchsorted(self.middles, start)
        self.register_buffer("start", torch.where(same, moved, start))
        self.scale = LearnedScale(matrix.grids.scale[:, None], SMALLEST_SCALE, LARGEST_SCALE)
        sizes = np.where(matrix.grids.residual > 0, matrix.grids.residual, SMALLEST_SCALE)
        some = bool(matrix.grids.residual.any())
        self.residual = (
            LearnedScale(sizes[:, :, None], SMALLEST_SCALE, LARGEST_SCALE) if some else None
        )
        self._limits = matrix.grids

    @property
    def mean_step(self) -> float:
        """The mean distance between levels."""
        return float(self.step.mean())

    def _places(self, delta: Tensor) -> Tensor:
        """Return the index of each weight's level, int64 [O, K], for the latent plus ``delta``."""
        return torch.searchsorted(self.middles, (self.start + delta).detach().contiguous())

    def forward(self, delta: Tensor) -> Tensor:
        """Return the dequantized weight [O, K]; straight-through gradient within the range."""
        places = self._places(delta)
        value = torch.gather(self.code_of, 1, places) * self.scale()
        for signs, size in zip(self.sign_of, () if self.residual is None else self.residual()):
            value = value + torch.gather(signs, 1, places) * size
        latent = torch.clamp(self.start + delta, self.lowest, self.highest)
        return value + (latent - latent.detach())

    def merged(self, delta: Tensor) -> SimulatedMatrix:
        """Return codes, signs and scales of the latent plus ``delta`` [O, K], to store."""
        with torch.no_grad():
            places = self._places(delta)
            codes = torch.gather(self.code_of, 1, places).cpu().numpy().astype(np.int8)
            signs = [
                torch.gather(table, 1, places).cpu().numpy().astype(np.int8)
                for table in self.sign_of
            ]
        old = self._limits
        sizes = old.residual if self.residual is None else self.residual.stored()[:, :, 0]
        sizes = np.where(old.residual > 0, sizes, 0).astype(np.float16)
        grids = RowGrids(old.low, old.high, self.scale.stored()[:, 0], sizes)
        return SimulatedMatrix(
            grids, codes, np.asarray(signs, np.int8).reshape(len(signs), *codes.shape)
        )


def _levels(matrix: SimulatedMatrix) -> tuple[Array, Array, Array]:
    """Return each row's levels, ascending, float32 [O, L], padded with infinity.

    Then their codes [O, L] and the signs of their residuals [Z, O, L], float32.
    """
    grids = matrix.grids
    rows, orders = len(grids.scale), len(grids.residual)
    low, high = int(grids.low.min()), int(grids.high.max())
    choices = [np.arange(low, high + 1), *[np.array([-1, 1])] * orders]
    combined = np.stack([axis.ravel() for axis in np.meshgrid(*choices, indexing="ij")]).astype(
        np.float32
    )
    codes = np.repeat(combined[:1], rows, axis=0)
    signs = np.repeat(combined[1:, None], rows, axis=1)
    sizes = grids.residual.astype(np.float32)[:, :, None]
    # Where a row lacks a residual, both its signs give the same level: keep one.
    there = (
        (codes >= grids.low[:, None])
        & (codes <= grids.high[:, None])
        & ((sizes > 0) | (signs > 0)).all(axis=0)
    )
    signs = signs * (sizes > 0)
    values = codes * grids.scale.astype(np.float32)[:, None]
    for sign, size in zip(signs, sizes):
        values = values + sign * size
    values = np.where(there, values, np.inf).astype(np.float32)
    order = np.argsort(values, axis=1, kind="stable")[:, : int(there.sum(axis=1).max())]
    return (
        np.take_along_axis(values, order, axis=1),
        np.take_along_axis(codes, order, axis=1).astype(np.float32),
        np.take_along_axis(signs, order[None], axis=2).astype(np.float32),
    )


class ActivationScale(LearnedScale):
    """The learned scale of an activation tensor, which ``grid`` quantizes except channels ``kept``.

    ``range``: the kind of activation range, whose table by timestep is not learned; ``convolved``:
    a Conv reads the tensor.
    """

    def __init__(
        self,
        grid: ActivationGrid,
        kept: Array,
        range: ActivationRange = STATIC,
        convolved: bool = True,
    ) -> None:
        super().__init__(
            np.float32(grid.scale), SMALLEST_ACTIVATION_SCALE, LARGEST_ACTIVATION_SCALE
        )
        self.register_buffer("places", torch.from_numpy(kept.astype(np.int64)))
        self.kept, self.code_limits = kept, (grid.quant_min, grid.quant_max)
        self._range, self._convolved, self._start_grid = range, convolved, grid
        self.register_buffer("zeros", torch.tensor(grid.zeros or (0,), dtype=torch.float32))

    def grid(self) -> ActivationGrid:
        """Return the quantizer to store."""
        return replace(self._start_grid, scale=float(self.stored()))

    def quantize(self, x: Tensor, channel_axis: int, timesteps: Tensor | None = None) -> Tensor:
        """Return ``x`` fake-quantized except the kept channels; ``timesteps`` [N]: its samples'."""
        if not self._start_grid.uniform:
            return fake_quantize_levels(x, self(), self._start_grid)
        scale, ratio, shift = self(), self._ratio(x, timesteps), 0.0
        if self._start_grid.zeros:
            # Rounded to FP16 as the written constants are, or codes near a middle would differ.
            shift = halved(self.zeros.reshape(-1, *(1,) * (x.ndim - 2)) * scale)
        if ratio is None:
            quantized = fake_quantize(x, scale, *self.code_limits, shift)
        else:
            quantized = fake_quantize(x / ratio, scale, *self.code_limits, shift) * ratio
        if not len(self.kept):
            return quantized
        mask = torch.zeros(x.shape[channel_axis], dtype=torch.bool, device=x.device)
        mask.index_fill_(0, self.places, True)
        shape = [1] * x.ndim
        shape[channel_axis] = -1
        return torch.where(mask.reshape(shape), x, quantized)

    def _ratio(self, x: Tensor, timesteps: Tensor | None) -> Tensor | None:
        """Return the ratio of each sample's range to the widest range; None for a static range.

        Samples of a batch may differ in timestep here; the deployed graph has one per call.
        """
        if not self._range.moves:
            return None
        # A table's ratios need no scale; ``self.grid()`` would have to fetch it from a GPU.
        ratios = self._range.ratios_at(self._start_grid, timesteps)
        if ratios is None:
            return self._range.ratio(x.detach(), self.grid(), self._convolved, _absmax)
        rows, left = divmod(x.shape[0], ratios.numel())
        if left or ratios.numel() == 1:
            return ratios.max()
        each = ratios.reshape(-1).repeat_interleave(rows)
        return each.reshape(-1, *(1,) * (x.ndim - 1))


def _absmax(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    return x.abs().amax(dim=axes, keepdim=True)
