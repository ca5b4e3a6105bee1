"""What a scheme costs on disk and in the engine, to the byte, and the block size that a layer really gets."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from mpq_deploy.formats.scheme import FP16, INT8, W8A8, W8A16, Scheme, outlier_count
from mpq_deploy.graph.layers import Layer

FP16_BYTES = 2
INT64_BYTES = 8
INT32_BYTES = 4
# One FP16 scale per activation tensor that is quantized, shared by all its INT8 readers.
ACTIVATION_SCALE_BYTES = FP16_BYTES
# A zero point of a simulated scheme: of each output channel, and of the input of each layer that reads it (our choice).
ZERO_POINT_BYTES = 1
# What tells how the bits are shared out: which of three widths a channel has, and with residuals which of five forms.
FORM_BITS = {"omq": 2, "zres": 3}


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
    A simulated scheme's bytes are nominal: those that a packed form would take, if there were one.
    """
    if scheme.simulated:
        return _nominal_bytes(layer, scheme)
    if scheme.branch is not None and scheme.branch.kind != "scale":
        parts = branch_parts(layer, scheme)
        return sum(weight_bytes(part, form) for part, form in parts) + _joining_bytes(layer, scheme)
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


def _nominal_bytes(layer: Layer, scheme: Scheme) -> int:
    """Bits x weights, one FP16 scale and one zero point per output channel, and a zero point for the input.

    Channels that share out bits have ``scheme.bits`` on average and say which form they have; with residuals there is
    room for one FP16 residual size per channel: one of two orders takes the place of one with none.
    """
    channels = layer.out_channels
    total = _packed(scheme.bits[0] * layer.weights) + channels * (FP16_BYTES + ZERO_POINT_BYTES)
    if scheme.activation is not None:
        total += ZERO_POINT_BYTES * len(layer.inputs)
    if scheme.branch is not None:
        total += _packed(FORM_BITS[scheme.branch.kind] * channels)
        total += FP16_BYTES * channels * (scheme.branch.kind == "zres")
    return total


def _packed(bits: int) -> int:
    return (bits + 7) // 8


def promoted_rows(layer: Layer, scheme: Scheme) -> int:
    """How many output channels a ``rows`` branch promotes: so many times a tenth of them, rounded down (MPQ-DM)."""
    return scheme.branch.amount * (layer.out_channels // 10) if scheme.branch and scheme.branch.kind == "rows" else 0


def int4_shape(layer: Layer, scheme: Scheme) -> tuple[int, int]:
    """Rows and columns in which the file holds the INT4 body of ``layer``: without the channels that a branch promotes.

    Output channels come first for a Conv, else where the weight has them.
    """
    channels = layer.out_channels - promoted_rows(layer, scheme)
    return (channels, layer.reduction) if layer.out_axis == 0 else (layer.reduction, channels)


def input_channels(layer: Layer) -> int:
    """How many channels the layer's input has (of one group)."""
    return layer.weight_shape[1 - layer.out_axis]


def activation_bytes(layer: Layer, scheme: Scheme) -> int:
    """Bytes of the constants that quantize the input of ``layer``: layers that share the quantizer share them.

    The scale, and the channels' factors, where the scheme has any and the producer does not take them. A simulated
    quantizer's zero point counts with each layer that reads it.
    """
    if scheme.activation is None:
        return 0
    factors = input_channels(layer) if scheme.branch and scheme.branch.kind == "scale" else 0
    return ACTIVATION_SCALE_BYTES + FP16_BYTES * factors


def outlier_columns(layer: Layer, scheme: Scheme) -> int:
    """How many input channels a ``cols`` branch takes: so many thirty-seconds of them, at least one (our choice)."""
    if not scheme.branch or scheme.branch.kind != "cols":
        return 0
    return outlier_count(input_channels(layer), scheme.branch.amount)


def branch_parts(layer: Layer, scheme: Scheme) -> tuple[tuple[Layer, Scheme], ...]:
    """Return the body and the branch of ``layer`` under ``scheme`` as layers of their own, with what each becomes.

    Their names and nodes are those that the graph writer gives: the body keeps the layer's.
    """
    branch, body = scheme.branch, scheme.body
    if branch is None or branch.kind == "scale":
        return ((layer, body),)
    if branch.kind == "rows":
        promoted = promoted_rows(layer, scheme)
        rows = W8A8 if scheme.activation is INT8 else W8A16
        return (_part(layer, layer.out_channels - promoted, ""), body), (_part(layer, promoted, "promoted"), rows)
    if branch.kind == "cols":
        shape = list(layer.weight_shape)
        shape[1 - layer.out_axis] = outlier_columns(layer, scheme)
        return (layer, body), (replace(_part(layer, layer.out_channels, "outliers"), weight_shape=tuple(shape)), FP16)
    down = _part(layer, branch.amount, "lowrank_down")
    up = replace(_part(layer, layer.out_channels, "lowrank_up"), weight_shape=_factor_shape(layer, branch.amount))
    return (layer, body), (down, FP16), (up, FP16)


def _part(layer: Layer, out_channels: int, suffix: str) -> Layer:
    shape = list(layer.weight_shape)
    shape[layer.out_axis] = out_channels
    if not suffix:
        return replace(layer, weight_shape=tuple(shape))
    uses = tuple(replace(use, node=f"{use.node}/{suffix}") for use in layer.uses)
    return replace(
        layer, name=f"{layer.name}/{suffix}", weight=f"{layer.weight}//{suffix}", weight_shape=tuple(shape), uses=uses
    )


def _factor_shape(layer: Layer, rank: int) -> tuple[int, ...]:
    """Shape of the second factor: a 1x1 convolution, or a product as the layer is one."""
    if layer.op == "Conv":
        return (layer.out_channels, rank, *(1 for _ in layer.kernel))
    return (layer.out_channels, rank) if layer.out_axis == 0 else (rank, layer.out_channels)


def _joining_bytes(layer: Layer, scheme: Scheme) -> int:
    """Bytes of the constants that bring body and branch together: the channels to gather."""
    indices = {"rows": layer.out_channels, "cols": outlier_columns(layer, scheme)}
    return INT32_BYTES * indices.get(scheme.branch.kind, 0) if scheme.branch else 0
