"""Bytes that all formats count in, and a layer's weight seen as a matrix."""

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
    """Return the block size for a ``reduction`` near the ``nominal`` one; None without any.

    TensorRT infers the block size from the scale's shape, so it must divide the reduction: the
    divisor nearest to the nominal size in ratio is taken if it lies within a factor of 1.5 (our
    choice); a reduction shorter than the nominal block is one block.
    """
    if reduction <= nominal:
        return reduction
    nearest = min(divisors(reduction), key=lambda d: (max(d / nominal, nominal / d), d))
    return nearest if max(nearest / nominal, nominal / nearest) <= 1.5 else None


def input_channels(layer: Layer) -> int:
    """How many channels the layer's input has (of one group)."""
    return layer.weight_shape[1 - layer.out_axis]


def outlier_count(channels: int, share: int) -> int:
    """How many of ``channels`` are ``share`` thirty-seconds: at least one, if any (our choice)."""
    return max(1, share * channels // 32) if share else 0


def matrix_shape(layer: Layer) -> tuple[int, int]:
    """Rows and columns in which the file holds the weight as a matrix.

    Output channels come first for a Conv, else where the weight has them.
    """
    channels, reduction = layer.out_channels, layer.reduction
    return (channels, reduction) if layer.out_axis == 0 else (reduction, channels)


def cuts(window: Window, taps: int) -> bool:
    """Whether windows are cut out at all: of a 1x1 kernel only where it has strides."""
    return taps > 1 or any(step != 1 for step in window.strides)


def window_bytes(window: Window, taps: int) -> int:
    """Bytes of the constants that cut out the windows of a Conv that is written as a product.

    Its padding as INT64; the axes, the steps, and each position's first and last places as INT32;
    of a 1-D one also the axis that is added and taken away. Each layer has its own.
    """
    rank, total = len(window.strides), 0
    if any(window.pads):
        total += 2 * (rank + 2) * INT64_BYTES
    if cuts(window, taps):
        total += rank * INT32_BYTES * 2 * (1 + taps)
    return total + (INT64_BYTES if rank == 1 else 0)


def part_of(layer: Layer, out_channels: int, suffix: str = "") -> Layer:
    """Return ``layer`` with other output channels; a ``suffix`` names it as a part beside the body."""
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
    """Bytes of the constants that shift the channels of a Conv's input: one per channel, and the pads."""
    pads = 2 * (2 + len(layer.kernel)) * INT64_BYTES if any(layer.pads) else 0
    return FP16_BYTES * input_channels(layer) + pads
