"""Estimate what is not a layer: products of two activations, norms, moves. Always FP16.

In: the graph, the shapes of activations, the target's figures. Out: seconds per call. Pointwise
operators count nothing: TensorRT fuses them into their neighbours. Our choice, and a rough one: it
is the same for every plan.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod

import onnx_ir as ir

from mpq_deploy.formats.sizes import FP16_BYTES
from mpq_deploy.graph.layers import LayerGraph
from mpq_deploy.latency.roofline import Rates, fp16_seconds

NORMS = (
    "InstanceNormalization",
    "GroupNormalization",
    "LayerNormalization",
    "RMSNormalization",
    "BatchNormalization",
)
MOVES = ("Resize", "Concat", "ConvTranspose", "AveragePool", "MaxPool")


def weighed_nodes(graph: LayerGraph) -> list[ir.Node]:
    """Return the nodes that count: no layer, and of floats."""
    layers = {use.node for layer in graph.layers for use in layer.uses}
    return [
        node
        for node in graph.model.graph
        if node.name not in layers
        and node.op_type in ("MatMul", *NORMS, *MOVES)
        and node.outputs[0].dtype in (None, ir.DataType.FLOAT)
    ]


def activations_of(node: ir.Node) -> list[str]:
    """Return the names of the tensors that a node reads and writes, constants left out."""
    read = [
        v
        for v in node.inputs
        if v is not None and not v.is_initializer() and v.dtype in (None, ir.DataType.FLOAT)
    ]
    return [value.name or "" for value in (*read, *node.outputs)]


def others_seconds(graph: LayerGraph, shapes: Mapping[str, tuple[int, ...]], rates: Rates) -> float:
    """Estimate a call of all that is not a layer. ``shapes``: tensor -> shape with the batch."""
    return sum(node_seconds(node, shapes, rates) for node in weighed_nodes(graph))


def node_seconds(
    node: ir.Node, shapes: Mapping[str, tuple[int, ...]], rates: Rates, fp8: bool = False
) -> float:
    """Estimate one node, 0 where no shape is known; ``fp8``: a product of two activations in FP8.

    Of the three tensors of such a product, the largest counts no bytes: in fused attention it is
    never written.
    """
    names = [name for name in activations_of(node) if name in shapes]
    sizes = [prod(shapes[name]) for name in names]
    if not sizes:
        return 0.0
    if node.op_type != "MatMul" or len(sizes) != 3:
        return fp16_seconds(0.0, FP16_BYTES * sum(sizes), rates)
    operations = 2.0 * sizes[-1] * shapes[names[0]][-1]
    moved = FP16_BYTES * (sum(sizes) - max(sizes))
    if not fp8:
        return fp16_seconds(operations, moved, rates)
    assert rates.fp8 is not None, "a target that lists FP8 gives its rate"
    # Operands are read in one byte.
    moved -= sum(sizes[:2]) - (max(sizes) if max(sizes) != sizes[-1] else 0)
    return fp16_seconds(operations, moved, replace(rates, fp16=rates.fp8))
