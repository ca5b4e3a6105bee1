"""Check an engine against the plan by the builder's own log: types, packing and bytes.

In: an ``EngineLog`` and the ``ExpectedLayers``. Out: ``Problem`` objects; none means that

1. every node of every layer is computed by a kernel that names it; 2. w8a8 and w4a8 multiply INT8
by INT8, and no other layer does; 3. the weights of w8* layers are stored in the engine as INT8,
those of w4* as INT4 (a kernel may unpack
   them at run time);
4. attention that is planned in FP8 reads FP8 in both products;
5. all constants together have the planned bytes, equal ones counted once or each time,
   within 2 % and a stated allowance for what the builder adds.

A layer that is right but slow (its whole weight is unpacked at each call although its form could be
fused) is a problem of severity ``slow``; all others are ``wrong``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import ceil
from typing import Literal

from mpq_deploy.engine.build_log import EngineLayer, EngineLog, EngineTensor
from mpq_deploy.engine.expected import ExpectedLayer, ExpectedLayers
from mpq_deploy.formats.fp8 import FP8_INPUT
from mpq_deploy.formats.scheme import SCHEMES

__all__ = ["ExpectedLayer", "ExpectedLayers", "Problem", "can_fuse", "verify", "weights_allowance"]

Severity = Literal["wrong", "slow"]

# How far the engine's weights may be from the plan's bytes.
WEIGHTS_TOLERANCE = 0.02
# The builder aligns each constant to 128 bytes, so half of that is lost on average for each of
# codes, scales, bias and channel scales.
ALIGNMENT_BYTES = 4 * 64
# It pads the channels of a convolution to 4, and those of odd products to 2.
CHANNEL_MULTIPLE = 4
# Literals, and the kernels' own tables, of an engine without any layer: measured 0.5 to 1.5 kB.
BASE_BYTES = 4096

# Types in which products multiply both operands, FP16's apart, narrow ones first: a kernel of FP4
# reads block scales in FP8 beside it.
OPERANDS = tuple(
    dict.fromkeys(
        activation.operand
        for activation in sorted(
            (s.activation for s in SCHEMES.values() if s.activation and not s.simulated),
            key=lambda one: one.bits,
        )
    )
)


@dataclass(frozen=True)
class Problem:
    """Something in the engine that is not as planned.

    ``layer`` is empty if it concerns the whole engine.
    """

    layer: str
    message: str
    severity: Severity = "wrong"

    def __str__(self) -> str:
        return f"{self.layer}: {self.message}" if self.layer else self.message


def verify(log: EngineLog, expected: ExpectedLayers) -> list[Problem]:
    """Return every way in which the engine differs from the plan; an empty list means that it is as planned."""
    behind = _constants_behind(log.layers)
    planned, rounded = _planned_by_node(expected.layers), _rounded(log.layers)
    problems: list[Problem] = []
    for layer in expected.layers:
        kernels = {
            node: [
                i for i, one in enumerate(log.layers) if node in one.nodes and _applies(one, node)
            ]
            for node in layer.nodes
        }
        # A weight that several nodes share may be unpacked for the first of them, which hands it to
        # the others.
        shared = (
            _union(behind[i] for found in kernels.values() for i in found)
            if len(layer.nodes) > 1
            else ()
        )
        for node, found in kernels.items():
            pairs = [(log.layers[i], _union([behind[i], shared])) for i in found]
            problems += _check_node(layer, node, pairs, planned, rounded)
    problems += [_not_in_fp8(n) for n in expected.fp8_attention if not _reads_fp8(log, n)]
    problems += _check_bytes(log, expected)
    return list(dict.fromkeys(problems))


def _reads_fp8(log: EngineLog, node: str) -> bool:
    """Whether a kernel that names ``node`` reads two activations in FP8: alone, or the whole attention's."""
    return any(
        node in one.nodes and sum(t.dtype == FP8_INPUT.operand for t in one.inputs) >= 2
        for one in log.layers
    )


def _not_in_fp8(node: str) -> Problem:
    return Problem(node, "planned in FP8, but no kernel of this attention reads FP8")


def weights_allowance(expected: ExpectedLayers) -> int:
    """Bytes that the engine may differ from the plan beyond the tolerance, for what the builder adds."""
    return BASE_BYTES + sum(_layer_allowance(layer) for layer in expected.layers)


def can_fuse(layer: ExpectedLayer) -> bool:
    """Whether TensorRT-RTX can multiply by the packed INT4 weight as it lies (measured: docs/engine-forms.md)."""
    return layer.form.activation is None and layer.form.weight.fuses(layer)


def _applies(kernel: EngineLayer, node: str) -> bool:
    """Whether ``kernel`` may be the product of ``node``: epilogues and unpacking name it too.

    A tiny product may be a generated kernel; then it reads an activation and no other kernel
    computes.
    """
    return kernel.compute or bool(kernel.inputs)


def _constants_behind(layers: tuple[EngineLayer, ...]) -> list[tuple[EngineTensor, ...]]:
    """For each kernel, its constants and those from which its non-activation inputs are made at run time."""
    static: dict[str, tuple[EngineTensor, ...]] = {}
    behind = []
    for layer in layers:
        made = [static[tensor.name] for tensor in layer.inputs if tensor.name in static]
        reached = tuple(dict.fromkeys((*layer.constants, *(c for group in made for c in group))))
        behind.append(reached)
        constant = len(made) == len(layer.inputs) and bool(reached)
        for tensor in layer.outputs:
            if constant:
                static[tensor.name] = (*static.get(tensor.name, ()), *reached)
            else:
                static.pop(tensor.name, None)
    return behind


def _planned_by_node(layers: Iterable[ExpectedLayer]) -> dict[str, ExpectedLayer]:
    return {node: layer for layer in layers for node in layer.nodes}


def _check_node(
    layer: ExpectedLayer,
    node: str,
    candidates: list[tuple[EngineLayer, tuple[EngineTensor, ...]]],
    planned: dict[str, ExpectedLayer],
    rounded: frozenset[str],
) -> list[Problem]:
    if not candidates:
        return [Problem(layer.name, f"no kernel of the engine names its node '{node}'")]
    computing = [pair for pair in candidates if pair[0].compute] or [_together(node, candidates)]
    problems = []
    for kernel, _ in computing:
        operand = next((operand for operand in OPERANDS if _multiplies(kernel, operand)), "")
        if operand != (layer.form.activation.operand if layer.form.activation else ""):
            types = operand or "/".join(dict.fromkeys(tensor.dtype for tensor in kernel.inputs))
            message = f"planned {layer.scheme}, but it computes in {types} ({kernel.name})"
            severity: Severity = "slow" if _of_one_row(layer, kernel, rounded) else "wrong"
            problems.append(Problem(layer.name, message, severity))
    for kernel, constants in _whole(layer, computing):
        problems += _check_storage(layer, kernel, constants, planned)
    return problems


def _whole(
    layer: ExpectedLayer, computing: list[tuple[EngineLayer, tuple[EngineTensor, ...]]]
) -> list[tuple[EngineLayer, tuple[EngineTensor, ...]]]:
    """Kernels with the weights that each must hold: parts of one product count as one kernel.

    Where a model splits the output of a product (scale and shift of an adaptive norm), the builder
    makes one kernel per piece, each with its own columns of the weight: none of them holds all,
    every one holds some.
    """
    held = [_held(layer, constants) for _, constants in computing]
    if len(computing) < 2 or not all(0 < count < layer.weights for count in held):
        return computing
    nodes = tuple(dict.fromkeys(node for kernel, _ in computing for node in kernel.nodes))
    direct = _union(kernel.constants for kernel, _ in computing)
    whole = replace(computing[0][0], nodes=nodes, constants=direct)
    return [(whole, _union(constants for _, constants in computing))]


def _held(layer: ExpectedLayer, constants: Iterable[EngineTensor]) -> int:
    """Elements of ``constants`` of the type in which the weight of ``layer`` is stored."""
    stored = layer.form.weight.engine_types
    return sum(tensor.elements for tensor in constants if tensor.dtype in stored)


def _together(
    node: str, candidates: list[tuple[EngineLayer, tuple[EngineTensor, ...]]]
) -> tuple[EngineLayer, tuple[EngineTensor, ...]]:
    """Generated kernels among which the product of ``node`` is spread (one row does that), seen as one kernel."""
    direct = _union(kernel.constants for kernel, _ in candidates)
    one = replace(candidates[0][0], nodes=(node,), constants=direct)
    return one, _union(constants for _, constants in candidates)


def _union(groups: Iterable[tuple[EngineTensor, ...]]) -> tuple[EngineTensor, ...]:
    return tuple(dict.fromkeys(tensor for group in groups for tensor in group))


def _of_one_row(layer: ExpectedLayer, kernel: EngineLayer, rounded: frozenset[str]) -> bool:
    """Whether the product has one row per sample, of ``rounded`` values, and reads the packed weight.

    The builder may dequantize such a row (the timestep's embedding) once for several of its
    readers: the same numbers and bytes, for next to no time.
    """
    rows = [tensor for tensor in kernel.inputs if tensor.elements == layer.reduction]
    whole = layer.op != "Conv" and _held(layer, kernel.constants) >= layer.weights
    return whole and any(tensor.name in rounded for tensor in rows)


def _rounded(layers: Iterable[EngineLayer]) -> frozenset[str]:
    """Return the names of what kernels make of rounded values of the same shape: dequantized ones."""
    return frozenset(
        made.name
        for one in layers
        for made in one.outputs
        if any(read.dtype in OPERANDS and read.shape == made.shape for read in one.inputs)
    )


def _multiplies(kernel: EngineLayer, operand: str) -> bool:
    """Both operands of this type: an input (the activation), and the weight, constant or unpacked by another kernel."""
    inputs = sum(tensor.dtype == operand for tensor in kernel.inputs)
    constants = sum(tensor.dtype == operand for tensor in kernel.constants)
    return kernel.compute and inputs >= 1 and inputs + constants >= 2


def _check_storage(
    layer: ExpectedLayer,
    kernel: EngineLayer,
    constants: tuple[EngineTensor, ...],
    planned: dict[str, ExpectedLayer],
) -> list[Problem]:
    """One kernel may compute several layers that share an input: it must then hold all their weights."""
    stored = layer.form.weight.engine_types
    together = {planned[node].name: planned[node] for node in kernel.nodes if node in planned}
    needed = sum(one.weights for one in together.values() if one.form.weight.engine_types == stored)
    if _held(layer, constants) < needed:
        kinds = (
            ", ".join(
                f"{t.dtype} {list(t.shape)}" for t in constants if t.elements >= layer.weights
            )
            or "none"
        )
        message = f"planned {layer.scheme}, but its weight is not stored in the engine as {stored[0]} (found: {kinds})"
        return [Problem(layer.name, message)]
    if can_fuse(layer) and _held(layer, kernel.constants) < needed:
        message = f"its {stored[0]} weight is unpacked in full at each call, though its form could be fused"
        return [Problem(layer.name, message, "slow")]
    return []


def _check_bytes(log: EngineLog, expected: ExpectedLayers) -> list[Problem]:
    if log.weights_bytes is None:
        return [Problem("", "the builder's log does not give the engine's weight bytes")]
    allowance = weights_allowance(expected)
    bound = WEIGHTS_TOLERANCE * expected.total_bytes + allowance
    # Equal constants may be stored once.
    least = expected.total_bytes - expected.repeated_bytes - bound
    most = expected.total_bytes + expected.widened_bytes + bound
    if least <= log.weights_bytes <= most:
        return []
    repeated = (
        f", {expected.repeated_bytes:,} of them equal to others" if expected.repeated_bytes else ""
    )
    if expected.widened_bytes:
        repeated += f", {expected.widened_bytes:,} more for FP16 constants stored in FP32"
    message = (
        f"the engine holds {log.weights_bytes:,} bytes of weights, the plan has {expected.total_bytes:,}{repeated} "
        f"(allowed: {WEIGHTS_TOLERANCE:.0%} and {allowance:,} bytes for padding, alignment and FP32 factors)"
    )
    return [Problem("", message)]


def _layer_allowance(layer: ExpectedLayer) -> int:
    multiple = CHANNEL_MULTIPLE if layer.op == "Conv" else 2
    area = 1
    for size in layer.kernel:
        area *= size
    channels = layer.reduction // area
    padded = (
        -channels % multiple * area * layer.out_channels
        + -layer.out_channels % multiple * layer.reduction
    )
    factors = layer.form.activation.engine_bytes(layer) if layer.form.activation else 0
    return ALIGNMENT_BYTES + factors + ceil(padded * layer.form.operand_bytes)
