"""Quantizers in torch with straight-through gradients: what they return is what is deployed, to the last bit.

A weight is a matrix [O, K] as in ``precision.quantizers``. Rounding passes the gradient on as if it were not there
(Bengio et al. 2013, the straight-through estimator); clipping stops it beyond the limits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from mpq_deploy.calibrate.scales import LARGEST_SCALE as LARGEST_ACTIVATION_SCALE
from mpq_deploy.calibrate.scales import QUANT_MAX, QUANT_MIN
from mpq_deploy.calibrate.scales import SMALLEST_SCALE as SMALLEST_ACTIVATION_SCALE
from mpq_deploy.denoisers.spec import Array
from mpq_deploy.precision.quantizers import LARGEST_SCALE, SMALLEST_SCALE

Tensor = Any  # torch.Tensor; torch is not followed by mypy here
LARGEST_HALF = 65504.0


class _StraightThrough(torch.autograd.Function):  # type: ignore[misc]
    """Gives ``value`` for ``x``, and hands the gradient of the one on as that of the other."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def rounded(x: Tensor) -> Tensor:
    """Round half to even, as QuantizeLinear does; the gradient passes."""
    return _StraightThrough.apply(x, torch.round(x.detach()))


def halved(x: Tensor) -> Tensor:
    """Round to FP16 (what is too large becomes the largest number, as when constants are written); gradient passes."""
    return _StraightThrough.apply(x, x.detach().clamp(-LARGEST_HALF, LARGEST_HALF).half().to(x.dtype))


def fake_quantize(x: Tensor, scale: Tensor, quant_min: int = QUANT_MIN, quant_max: int = QUANT_MAX) -> Tensor:
    """Return ``x`` through QuantizeLinear and DequantizeLinear with a positive ``scale``; both get gradients.

    The gradient of the scale is LSQ's (Esser et al. 2020): code - x / scale within the limits, the limit beyond.
    """
    return torch.clamp(rounded(x / scale), quant_min, quant_max) * scale


class LearnedScale(torch.nn.Module):  # type: ignore[misc]
    """Positive FP16 scales, any shape, learned as the logarithm of their ratio to where they started.

    At the start the scales are exactly those given: exp(0) is 1.
    """

    def __init__(self, scale: Array, smallest: float, largest: float) -> None:
        super().__init__()
        self.register_buffer("start", torch.from_numpy(np.array(scale, np.float32)))
        self.log_ratio = torch.nn.Parameter(torch.zeros(np.shape(scale)))
        self.limits = (smallest, largest)

    def forward(self) -> Tensor:
        """Return the scales as they would be stored, in float32."""
        return halved((self.start * torch.exp(self.log_ratio)).clamp(*self.limits))

    def stored(self) -> Array:
        """Return the scales as they are stored, float16."""
        with torch.no_grad():
            return np.asarray(self().cpu().numpy(), np.float16)


class Grid(torch.nn.Module):  # type: ignore[misc]
    """A weight matrix [O, K] of integers times scales: scale * clip(round(start + delta / first scale)).

    ``codes`` int [O, K] and ``scale`` float16 [O, B] are what training starts from: for a ``delta`` of zero the
    result is exactly theirs. ``multiples`` float [O, B], for 4-bit storage with INT8 compute: then ``scale`` is [O, 1]
    and each block's scale is that many of it. ``quant_min`` and ``quant_max``: numbers, or arrays [O, 1] for grids of
    different widths per channel.

    The latent weight starts where ``target`` float [O, K] (the float weight) lies, but within ``margin`` steps of the
    code's middle, so that rounding that compensated errors (GPTQ) is kept. Steps of the latent are measured by the
    first scale, so learning a scale moves no code (our choice: codes and scales learn apart).
    """

    def __init__(
        self,
        codes: Array,
        scale: Array,
        target: Array,
        quant_min: int | Array,
        quant_max: int | Array,
        margin: float,
        multiples: Array | None = None,
    ) -> None:
        super().__init__()
        blocks = scale.astype(np.float32) * (1 if multiples is None else multiples)
        step = np.repeat(blocks, codes.shape[1] // blocks.shape[1], axis=1)
        beyond = np.clip(target / step - codes, -margin, margin)
        self.register_buffer("start", torch.from_numpy((codes + beyond).astype(np.float32)))
        self.register_buffer("first", torch.from_numpy(np.asarray(blocks, np.float32)))
        self.register_buffer("low", torch.as_tensor(quant_min, dtype=torch.float32))
        self.register_buffer("high", torch.as_tensor(quant_max, dtype=torch.float32))
        self.register_buffer("multiples", None if multiples is None else torch.from_numpy(np.float32(multiples)))
        self.scale = LearnedScale(scale, SMALLEST_SCALE, LARGEST_SCALE)

    def codes(self, delta: Tensor) -> Tensor:
        """Return the integers [O, K] for a latent moved by ``delta`` [O, K], as floats with a gradient."""
        moved = self.start + (_blocked(delta, self.first) / self.first[:, :, None]).reshape(delta.shape)
        return torch.clamp(rounded(moved), self.low, self.high)

    def forward(self, delta: Tensor) -> Tensor:
        """Return the deployed weight [O, K]."""
        codes = _blocked(self.codes(delta), self.first)
        if self.multiples is None:
            return (codes * self.scale()[:, :, None]).reshape(delta.shape)
        # In this order the integers are exact, as they are when INT8 codes are made of them at run time.
        return (codes * self.multiples[:, :, None] * self.scale()[:, :, None]).reshape(delta.shape)


class ActivationScale(LearnedScale):
    """The scale of one activation tensor, rounded to integers within ``codes`` but for the channels ``kept``."""

    def __init__(self, scale: float, kept: Array, codes: tuple[int, int] = (QUANT_MIN, QUANT_MAX)) -> None:
        super().__init__(np.float32(scale), SMALLEST_ACTIVATION_SCALE, LARGEST_ACTIVATION_SCALE)
        self.kept, self.code_limits = kept, codes

    def quantize(self, x: Tensor, channel_axis: int) -> Tensor:
        """Return ``x`` fake-quantized, but for the kept channels."""
        quantized = fake_quantize(x, self(), *self.code_limits)
        if not len(self.kept):
            return quantized
        mask = torch.zeros(x.shape[channel_axis], dtype=torch.bool, device=x.device)
        mask[torch.from_numpy(self.kept.astype(np.int64))] = True
        shape = [1] * x.ndim
        shape[channel_axis] = -1
        return torch.where(mask.reshape(shape), x, quantized)


def _blocked(matrix: Tensor, blocks: Any) -> Tensor:
    """See [O, K] as [O, B, K / B]."""
    return matrix.reshape(len(matrix), blocks.shape[1], -1)
