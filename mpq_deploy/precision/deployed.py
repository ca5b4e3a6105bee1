"""What a scheme costs on disk and in the engine, to the byte, and the block size that a layer really gets."""

from __future__ import annotations

from functools import cache

from mpq_deploy.graph.layers import Layer
from mpq_deploy.precision.scheme import INT8, Scheme

FP16_BYTES = 2
INT64_BYTES = 8
# One FP16 scale per activation tensor that is quantized, shared by all its INT8 readers.
ACTIVATION_SCALE_BYTES = FP16_BYTES


@cache
def divisors(number: int) -> tuple[int, ...]:
    """Return the divisors of ``number``, rising."""
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return tuple(sorted({*small, *(number // d for d in small)}))


def block_size(layer: Layer, scheme: Scheme) -> int | None:
    """Return how many elements of ``layer``'s reduction share a scale under ``scheme``; None when none fits.

    TensorRT infers the block size from the scale's shape, so it must divide the reduction: the divisor nearest to
    the nominal size in ratio is taken, if it lies within a factor of 1.5 (our choice); a reduction shorter than
    the nominal block is one block.
    """
    reduction = layer.reduction
    nominal = scheme.block_size
    if nominal is None:
        return reduction
    if reduction <= nominal:
        return reduction
    nearest = min(divisors(reduction), key=lambda d: (max(d / nominal, nominal / d), d))
    return nearest if max(nearest / nominal, nominal / nearest) <= 1.5 else None


def weight_bytes(layer: Layer, scheme: Scheme) -> int:
    """Bytes of all constants that ``scheme`` writes for ``layer``: codes, scales and shape constants.

    The activation's scale is not among them: layers that share an input share it (``ACTIVATION_SCALE_BYTES``).
    """
    if scheme.weight is None:
        return FP16_BYTES * layer.weights
    if scheme.weight is INT8:
        return layer.weights + FP16_BYTES * layer.out_channels
    block = block_size(layer, scheme)
    if block is None:
        raise ValueError(f"{scheme.name} has no block size for {layer.name}")
    scales = layer.out_channels * (layer.reduction // block)
    total = (layer.weights + 1) // 2 + FP16_BYTES * scales
    if scheme.requantized:
        total += FP16_BYTES * layer.out_channels
    if layer.op == "Conv":
        total += INT64_BYTES * len(layer.weight_shape)  # the shape to which the [O, K] matrix is brought back
    return total
