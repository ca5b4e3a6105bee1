"""Estimate a layer's time by the target's peak rates: the larger of compute and traffic.

In: a layer, its scheme, how many values it reads and writes per call, the target's figures. Out:
seconds, of which all are estimates: no peak rate is ever reached, and how TensorRT fuses is known
only for the forms of docs/engine-forms.md. Williams, Waterman and Patterson (2009), "Roofline";
what moves is from the kernels that TensorRT-RTX 1.7 builds.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from mpq_deploy.engine.target import Figure, Target
from mpq_deploy.formats.interfaces import Scheme
from mpq_deploy.formats.sizes import FP16_BYTES
from mpq_deploy.graph.layers import Layer

# What starting one kernel costs: between a launch inside a CUDA graph (1 to 2 us) and one on a
# stream (5 us and more). Our choice, the same for all targets.
LAUNCH_SECONDS = 3e-6


@dataclass(frozen=True)
class Rates:
    """A target's peak figures: bytes and operations per second. ``device``: whose they are;
    ``unconfirmed``: which of them nobody looked up.
    """

    device: str
    bandwidth: float
    fp16: float
    int8: float
    unconfirmed: tuple[str, ...] = ()
    # None where the target takes no such products.
    fp8: float | None = None
    fp4: float | None = None

    @classmethod
    def of(cls, target: Target) -> Rates | None:
        """Return the figures of ``target``; None where it does not have all three."""
        figures: dict[str, Figure | None] = {
            "bandwidth": target.bandwidth_bytes_per_s,
            "FP16 rate": target.fp16_ops_per_s,
            "INT8 rate": target.int8_ops_per_s,
        }
        known = {name: figure for name, figure in figures.items() if figure is not None}
        if len(known) < len(figures):
            return None
        bandwidth, fp16, int8 = (figure.value for figure in known.values())
        newer = {"FP8 rate": target.fp8_ops_per_s, "FP4 rate": target.fp4_ops_per_s}
        known |= {name: figure for name, figure in newer.items() if figure is not None}
        unconfirmed = tuple(name for name, figure in known.items() if not figure.confirmed)
        fp8, fp4 = (None if figure is None else figure.value for figure in newer.values())
        device = target.figures_of or target.title
        return cls(device, bandwidth, fp16, int8, unconfirmed, fp8, fp4)


@dataclass(frozen=True)
class Traffic:
    """How many values one use of a layer reads and writes per call, all samples of the batch together."""

    inputs: int
    outputs: int


def layer_seconds(layer: Layer, scheme: Scheme, traffic: Traffic, rates: Rates) -> float:
    """Estimate one use of ``layer`` under ``scheme``, without its input's quantizer.

    The body and each part of a branch are products of their own; what unpacks a weight and what
    joins a branch only moves bytes. Raises ValueError for a simulated scheme, which no engine
    holds.
    """
    if scheme.simulated:
        raise ValueError(f"{scheme.name} is simulated: it has no latency")
    branch = scheme.branch
    total = branch.joining_traffic(layer, traffic) / rates.bandwidth
    for (part, form), moved in zip(
        scheme.parts(layer), branch.traffic(layer, traffic), strict=True
    ):
        total += _product_seconds(part, form, moved, rates)
    return total + LAUNCH_SECONDS * (1 + branch.kernels - branch.input_kernels)


def column_count(layer: Layer, traffic: Traffic) -> int:
    """How many values the windows of one use of ``layer`` hold: a column of K for each place."""
    return traffic.outputs // layer.out_channels * layer.reduction


def quantizer_seconds(values: int, scheme: Scheme, rates: Rates, product: bool = False) -> float:
    """Estimate quantizing ``values`` activations under ``scheme``, by one kernel and its range's.

    TensorRT often fuses it into the producer; then it is cheaper than this. Readers of one tensor
    share it; ``product``: they are not convolutions.
    """
    if scheme.activation is None:
        return 0.0
    kernels = 1 + scheme.branch.input_kernels + scheme.range.quantizer_kernels(product)
    moved = values * (FP16_BYTES + scheme.operand_bytes)
    moved += values * FP16_BYTES * scheme.range.moves_input(product)
    return moved / rates.bandwidth + LAUNCH_SECONDS * kernels


def bytes_moved(layer: Layer, scheme: Scheme, traffic: Traffic) -> int:
    """Bytes that a product without a branch moves per call: weight, activations in and out.

    A weight that is unpacked as a whole is read packed, written, and read again. The windows of a
    convolution that is a product are written by one kernel, and its output is brought back into the
    order of channels by another.
    """
    product = scheme.multiplies(layer)
    values = column_count(layer, traffic) if product else traffic.inputs
    moved = (
        scheme.weight_bytes(layer)
        + ceil(scheme.operand_bytes * values)
        + FP16_BYTES * traffic.outputs
    )
    if product:
        moved += _rearranged_bytes(layer, traffic)
    return moved + 2 * scheme.unpacked_bytes(layer)


def _product_seconds(layer: Layer, scheme: Scheme, traffic: Traffic, rates: Rates) -> float:
    """The product of one part, its own launch apart: unpacking first, then computing and moving side by side."""
    rate = scheme.activation.operations_per_s(rates) if scheme.activation else rates.fp16
    operations = 2.0 * traffic.outputs / layer.out_channels * layer.weights
    unpacked = scheme.unpacked_bytes(layer)
    read = bytes_moved(layer, scheme, traffic)
    if scheme.multiplies(layer):
        rearranged = _rearranged_bytes(layer, traffic)
        alone = max(operations / rate, (read - rearranged) / rates.bandwidth)
        return alone + rearranged / rates.bandwidth + 2 * LAUNCH_SECONDS
    if not unpacked:
        return max(operations / rate, read / rates.bandwidth)
    packed = scheme.weight_bytes(layer)
    unpacking = (packed + unpacked) / rates.bandwidth + LAUNCH_SECONDS
    return unpacking + max(operations / rate, (read - packed - unpacked) / rates.bandwidth)


def _rearranged_bytes(layer: Layer, traffic: Traffic) -> int:
    """What the two kernels around a convolution's product move: the windows, and the output."""
    return FP16_BYTES * (traffic.inputs + column_count(layer, traffic) + 2 * traffic.outputs)


def fp16_seconds(operations: float, moved: int, rates: Rates) -> float:
    """Estimate a kernel of FP16 arithmetic that is not a layer."""
    return max(operations / rates.fp16, moved / rates.bandwidth) + LAUNCH_SECONDS
