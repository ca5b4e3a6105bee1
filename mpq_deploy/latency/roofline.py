"""Estimate what a layer takes under a scheme from the target's peak rates: the larger of computing and moving bytes.

In: a layer, its scheme, how many values it reads and writes per call, the target's figures. Out: seconds, of which all
are estimates: no peak rate is ever reached, and how TensorRT fuses is known only for the forms of docs/engine-forms.md.
Williams, Waterman and Patterson (2009), "Roofline"; what moves is from the kernels that TensorRT-RTX 1.7 builds.
"""

from __future__ import annotations

from dataclasses import dataclass

from mpq_deploy.engine.target import Figure, Target
from mpq_deploy.formats.scheme import BRANCH_KERNELS, INT8, Scheme
from mpq_deploy.formats.sizes import (
    FP16_BYTES,
    branch_parts,
    input_channels,
    outlier_columns,
    weight_bytes,
)
from mpq_deploy.graph.layers import Layer

INT8_BYTES = 1
# What starting one kernel costs: between a launch inside a CUDA graph (1 to 2 us) and one on a stream (5 us and more).
# Our choice, the same for all targets.
LAUNCH_SECONDS = 3e-6


@dataclass(frozen=True)
class Rates:
    """A target's peak figures: bytes and operations per second. ``device``: whose they are; ``unconfirmed``: which of
    them nobody looked up.
    """

    device: str
    bandwidth: float
    fp16: float
    int8: float
    unconfirmed: tuple[str, ...] = ()

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
        unconfirmed = tuple(name for name, figure in known.items() if not figure.confirmed)
        bandwidth, fp16, int8 = (figure.value for figure in known.values())
        return cls(target.figures_of or target.title, bandwidth, fp16, int8, unconfirmed)


@dataclass(frozen=True)
class Traffic:
    """How many values one use of a layer reads and writes per call, all samples of the batch together."""

    inputs: int
    outputs: int


def layer_seconds(layer: Layer, scheme: Scheme, traffic: Traffic, rates: Rates) -> float:
    """Estimate one use of ``layer`` under ``scheme``, without the quantizer of its input (``quantizer_seconds``).

    The body and each part of a branch are products of their own; what unpacks a weight and what joins a branch only
    moves bytes. Raises ValueError for a simulated scheme, which no engine holds.
    """
    if scheme.simulated:
        raise ValueError(f"{scheme.name} is simulated: it has no latency")
    if scheme.branch is None or scheme.branch.kind == "scale":
        return _product_seconds(layer, scheme.body, traffic, rates) + LAUNCH_SECONDS
    total = _joining_bytes(layer, scheme, traffic) / rates.bandwidth
    for (part, form), moved in zip(branch_parts(layer, scheme), _part_traffic(layer, scheme, traffic), strict=True):
        total += _product_seconds(part, form, moved, rates)
    return total + LAUNCH_SECONDS * (1 + BRANCH_KERNELS[scheme.branch.kind])


def quantizer_seconds(values: int, scheme: Scheme, rates: Rates) -> float:
    """Estimate what quantizes ``values`` activations under ``scheme``: FP16 is read, INT8 written, by one kernel.

    TensorRT often fuses it into the producer; then it is cheaper than this. Factors of channels take another kernel,
    unless the producer takes them. Readers of one tensor share it.
    """
    if scheme.activation is None:
        return 0.0
    factors = BRANCH_KERNELS["scale"] if scheme.branch and scheme.branch.kind == "scale" else 0
    return values * (FP16_BYTES + INT8_BYTES) / rates.bandwidth + LAUNCH_SECONDS * (1 + factors)


def bytes_moved(layer: Layer, scheme: Scheme, traffic: Traffic) -> int:
    """Bytes that one product without a branch moves per call: its weight once, activations in and out.

    A weight that is unpacked as a whole is read packed, written, and read again.
    """
    read = INT8_BYTES if scheme.activation is INT8 else FP16_BYTES
    moved = weight_bytes(layer, scheme) + read * traffic.inputs + FP16_BYTES * traffic.outputs
    return moved + 2 * unpacked_bytes(layer, scheme)


def unpacked_bytes(layer: Layer, scheme: Scheme) -> int:
    """Bytes of the whole weight that a call unpacks into memory; 0 where unpacking is fused into the product.

    Of Conv, INT4 and INT8 weights alone become FP16 at every call; 4-bit storage with INT8 compute becomes INT8 at
    every call, whatever the operator. INT4 and INT8 weights alone of products are fused.
    """
    if scheme.requantized:
        return INT8_BYTES * layer.weights
    alone = scheme.weight is not None and scheme.activation is None
    return FP16_BYTES * layer.weights if alone and layer.op == "Conv" else 0


def _product_seconds(layer: Layer, scheme: Scheme, traffic: Traffic, rates: Rates) -> float:
    """The product of one part, its own launch apart: unpacking first, then computing and moving side by side."""
    rate = rates.int8 if scheme.activation is INT8 else rates.fp16
    operations = 2.0 * traffic.outputs / layer.out_channels * layer.weights
    unpacked = unpacked_bytes(layer, scheme)
    read = bytes_moved(layer, scheme, traffic)
    if not unpacked:
        return max(operations / rate, read / rates.bandwidth)
    packed = weight_bytes(layer, scheme)
    unpacking = (packed + unpacked) / rates.bandwidth + LAUNCH_SECONDS
    return unpacking + max(operations / rate, (read - packed - unpacked) / rates.bandwidth)


def _part_traffic(layer: Layer, scheme: Scheme, traffic: Traffic) -> tuple[Traffic, ...]:
    """What each of ``branch_parts`` reads and writes."""
    assert scheme.branch is not None
    positions = traffic.outputs // layer.out_channels
    if scheme.branch.kind == "rows":
        parts = branch_parts(layer, scheme)
        return tuple(Traffic(traffic.inputs, positions * part.out_channels) for part, _ in parts)
    if scheme.branch.kind == "cols":
        return traffic, Traffic(_gathered(layer, scheme, traffic), traffic.outputs)
    between = positions * scheme.branch.amount
    return traffic, Traffic(traffic.inputs, between), Traffic(between, traffic.outputs)


def _joining_bytes(layer: Layer, scheme: Scheme, traffic: Traffic) -> int:
    """Bytes that gathering channels and joining body and branch move (the sum is fused into a product)."""
    assert scheme.branch is not None
    if scheme.branch.kind == "rows":
        return 2 * FP16_BYTES * traffic.outputs
    added = FP16_BYTES * traffic.outputs
    return added + 2 * FP16_BYTES * _gathered(layer, scheme, traffic)


def _gathered(layer: Layer, scheme: Scheme, traffic: Traffic) -> int:
    return traffic.inputs * outlier_columns(layer, scheme) // (input_channels(layer) * layer.group)


def fp16_seconds(operations: float, moved: int, rates: Rates) -> float:
    """Estimate a kernel of FP16 arithmetic that is no layer."""
    return max(operations / rates.fp16, moved / rates.bandwidth) + LAUNCH_SECONDS
