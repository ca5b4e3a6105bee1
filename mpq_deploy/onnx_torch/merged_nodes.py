"""Nodes that torch evaluates as one operation with fewer values: SiLU, and attention."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from mpq_deploy.graph.layers import STANDARD_DOMAINS


@dataclass(frozen=True)
class Merged:
    """One operation of ``inputs`` in place of a node and of the otherwise unread ``dropped``."""

    kind: Literal["silu", "attention"]
    inputs: tuple[ir.Value, ...]
    dropped: tuple[ir.Node, ...]


def merged_nodes(graph: Iterable[ir.Node]) -> dict[int, Merged]:
    """Return what the last node of each operation stands for, by the node's id()."""
    return {
        id(node): found for node in graph if (found := _gate(node) or _attention(node)) is not None
    }


def _gate(node: ir.Node) -> Merged | None:
    """Find the Sigmoid of x that ``node`` multiplies x by: the two are one SiLU."""
    if node.op_type != "Mul" or node.domain not in STANDARD_DOMAINS:
        return None
    for factor, other in (node.inputs, reversed(node.inputs)):
        made = _sole_source(factor, "Sigmoid")
        if made is not None and other is not None and made.inputs[0] is other:
            return Merged("silu", (other,), (made,))
    return None


def _attention(node: ir.Node) -> Merged | None:
    """Find the MatMul and Softmax that the MatMul ``node`` reads: the three are one attention."""
    if node.op_type != "MatMul" or node.domain not in STANDARD_DOMAINS:
        return None
    softmax = _sole_source(node.inputs[0], "Softmax")
    scores = _sole_source(softmax.inputs[0], "MatMul") if softmax is not None else None
    if softmax is None or scores is None:
        return None
    axis = softmax.attributes.get("axis")
    inputs = (scores.inputs[0], scores.inputs[1], node.inputs[1])
    # Products with constants are layers, whose inputs and outputs are looked at.
    if (axis is not None and axis.as_int() != -1) or any(
        value is None or value.is_initializer() for value in inputs
    ):
        return None
    return Merged(
        "attention", tuple(value for value in inputs if value is not None), (scores, softmax)
    )


def _sole_source(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """Return the node of ``op_type`` that makes ``value``, where one node alone reads it."""
    made = None if value is None else value.producer()
    if (
        value is None
        or made is None
        or made.op_type != op_type
        or made.domain not in STANDARD_DOMAINS
    ):
        return None
    return made if len(list(value.uses())) == 1 and not value.is_graph_output() else None


__all__ = ["Merged", "merged_nodes"]
