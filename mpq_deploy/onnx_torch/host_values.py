"""Which nodes stay on the CPU while the graph runs on a GPU: sizes, axes and indices in the making.

Operators read them as Python numbers, and a number that lies on a GPU can only be read once all
work before it is done. ONNX Runtime keeps the same values on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

# What reads nothing but the sizes of its input.
SIZES = ("Shape", "Size")
# Inputs that an operator reads as Python numbers, by place; reductions read their axes.
HOST_INPUTS: dict[str, tuple[int, ...]] = {
    "ConstantOfShape": (0,),
    "CumSum": (1,),
    "Expand": (1,),
    "OneHot": (1,),
    "Pad": (1, 2, 3),
    "Range": (0, 1, 2),
    "Reshape": (1,),
    "Resize": (1, 2, 3),
    "Slice": (1, 2, 3, 4),
    "Split": (1,),
    "Squeeze": (1,),
    "Tile": (1,),
    "TopK": (1,),
    "Trilu": (1,),
    "Unsqueeze": (1,),
}


class Node(Protocol):
    """A node: its operator, and the names of what it reads and makes."""

    @property
    def op(self) -> str: ...  # noqa: D102

    @property
    def inputs(self) -> tuple[str | None, ...]: ...  # noqa: D102

    @property
    def outputs(self) -> tuple[str, ...]: ...  # noqa: D102


def host_inputs(op: str) -> tuple[int, ...]:
    """Return the places of the inputs that ``op`` reads as Python numbers."""
    return (1,) if op.startswith("Reduce") else HOST_INPUTS.get(op, ())


def host_nodes(nodes: Sequence[Node], inputs: Sequence[str]) -> tuple[set[int], set[str]]:
    """Return which ``nodes`` (in order) run on the CPU, and the names of all that is read there.

    Those that make sizes, and those whose outputs are read as numbers unless they depend on the
    graph's ``inputs``: then the number is read from the GPU, not the whole graph run on the CPU.
    """
    data = set(inputs)
    for node in nodes:
        if node.op not in SIZES and not data.isdisjoint(node.inputs):
            data.update(node.outputs)
    chosen, read = set(), set[str]()
    for number, node in reversed(list(enumerate(nodes))):
        wanted = not read.isdisjoint(node.outputs) and data.isdisjoint(node.outputs)
        if node.op in SIZES or wanted:
            chosen.add(number)
        own = range(len(node.inputs)) if wanted and node.op not in SIZES else host_inputs(node.op)
        read.update(
            name for place in own if place < len(node.inputs) and (name := node.inputs[place])
        )
    return chosen, read
