"""Sizes that all formats use: bytes of types and constants, block sizes, a weight as a matrix."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mpq_deploy.graph.layers import Layer, Window

FP16_BYTES = 2
INT64_BYTES = 8
INT32_BYTES = 4
# One FP16 scale per activation tensor that is quantized, shared by all its readers.
ACTIVATION_SCALE_BYTES = FP16_BYTES


@cache
def divisors(number: int) -> tuple[int, ...]:
    """Return the divisors of ``number``, ascending."""
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return tuple(sorted({*small, *(number // d for d in small)}))


def nearest_divisor(reduction: int, nominal: int) -> int | None:
    """Return the block size for ``reduction`` that is nearest to ``nominal``; None if none is near.

    TensorRT infers the block size from the scale's shape, so it must divide the reduction. The
    result is the divisor nearest in ratio, if within a factor of 1.5 (our choice). A reduction
    shorter than ``nominal`` is one block.
    """
    if reduction <= nominal:
        return reduction
    nearest = min(divisors(reduction), key=lambda d: (max(d / nominal, nominal / d), d))
    return nearest if max(nearest / nominal, nominal / nearest) <= 1.5 else None


def input_channels(layer: Layer) -> int:
    """Return the number of channels of the layer's input, per group."""
    return layer.weight_shape[1 - layer.out_axis]


def outlier_count(channels: int, share: int) -> int:
    """Return ``share`` / 32 of ``channels``, at least 1 if ``share`` is positive (our choice)."""
    return max(1, share * channels // 32) if share else 0


def matrix_shape(layer: Layer) -> tuple[int, int]:
    """Return the rows and columns of the weight as a matrix in the file.

    The output channels are on the axis that they have in the weight: the first for a Conv.
    """
    channels, reduction = layer.out_channels, layer.reduction
    return (channels, reduction) if layer.out_axis == 0 else (reduction, channels)


def cuts(window: Window, taps: int) -> bool:
    """Whether windows must be cut out: for a 1x1 kernel only if it has strides."""
    return taps > 1 or any(step != 1 for step in window.strides)


def window_bytes(window: Window, taps: int) -> int:
    """Return the bytes of the constants that cut out the windows of a Conv written as a product.

    The padding is INT64; axes, steps, and the start and end of each kernel position are INT32. A
    1-D Conv also has the axis that is added and removed. Layers do not share these constants.
    """
    rank, total = len(window.strides), 0
    if any(window.pads):
        total += 2 * (rank + 2) * INT64_BYTES
    if cuts(window, taps):
        total += rank * INT32_BYTES * 2 * (1 + taps)
    return total + (INT64_BYTES if rank == 1 else 0)


def part_of(layer: Layer, out_channels: int, suffix: str = "") -> Layer:
    """Return ``layer`` with ``out_channels``; ``suffix``: rename it as a part beside the body."""
    shape = list(layer.weight_shape)
    shape[layer.out_axis] = out_channels
    if not suffix:
        return replace(layer, weight_shape=tuple(shape))
    uses = tuple(replace(use, node=f"{use.node}/{suffix}") for use in layer.uses)
    return replace(
        layer,
        name=f"{layer.name}/{suffix}",
        weight=f"{layer.weight}//{suffix}",
        weight_shape=tuple(shape),
        uses=uses,
    )


def shift_bytes(layer: Layer) -> int:
    """Return the bytes of the constants that shift a Conv's input: one per channel, and pads."""
    pads = 2 * (2 + len(layer.kernel)) * INT64_BYTES if any(layer.pads) else 0
    return FP16_BYTES * input_channels(layer) + pads
