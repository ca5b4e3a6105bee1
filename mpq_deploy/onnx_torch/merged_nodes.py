"""Nodes that torch evaluates as one operation with fewer values: SiLU, and attention."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from mpq_deploy.graph.attention import plain_attention, sole_source
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
        made = sole_source(factor, "Sigmoid")
        if made is not None and other is not None and made.inputs[0] is other:
            return Merged("silu", (other,), (made,))
    return None


def _attention(node: ir.Node) -> Merged | None:
    """Find the MatMul and Softmax that the MatMul ``node`` reads: the three are one attention."""
    found = plain_attention(node)
    if found is None or found.scale != 1.0:
        return None
    return Merged("attention", (found.queries, found.keys, found.values), found.dropped)


__all__ = ["Merged", "merged_nodes"]
