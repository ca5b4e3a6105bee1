"""Gradients of the output at every layer, for several directions at once, in bounded memory.

The graph may be cut into parts: each is evaluated again from the values that it began with, and all
directions go back through it before the part before it is. That is gradient checkpointing (Chen et
al., arXiv 1604.06174), with one recomputation for all directions instead of one for each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from mpq_deploy.graph.layers import LayerUse
from mpq_deploy.onnx_torch.pass_memory import PASS_COPIES, WHOLE_SHARE
from mpq_deploy.onnx_torch.torch_graph import Footprint, TorchGraph


def parts_within(footprint: Footprint, gradients: int, most: int) -> tuple[slice, ...]:
    """Cut a graph whose values and ``gradients`` (bytes) take several times ``most``."""
    if PASS_COPIES * sum(footprint.made) + gradients <= WHOLE_SHARE * most:
        return (slice(0, len(footprint.made)),)
    return footprint.parts(most // PASS_COPIES)


def layer_gradients(
    graph: TorchGraph,
    feeds: dict[str, Any],
    parts: Sequence[slice],
    uses: Sequence[LayerUse],
    directions: Mapping[str, Callable[[Any], list[Any]]],
) -> Iterator[tuple[int, Any, list[Any]]]:
    """Yield (number of the use, the layer's input, output's float32 gradients by direction).

    ``directions``: output of the graph -> what gets its value and returns tensors like it. Uses
    come in the order of ``uses`` within a part, the last part first; those that no output depends
    on are left out.
    """
    before = [dict(feeds)]
    with torch.no_grad():
        for part in parts[:-1]:
            before.append(graph.run_part(part, before[-1]))
    gradients: dict[str, list[Any]] | None = None
    for part in reversed(parts):
        known, made = before.pop(), graph.made_by(part)
        leaves = {
            name: value.detach().requires_grad_()
            for name, value in known.items()
            if name not in feeds and value.is_floating_point()
        }
        numbers = [number for number, use in enumerate(uses) if use.output in made]
        targets = [uses[number].output for number in numbers]
        keep = [*targets, *(uses[number].input for number in numbers)]
        values = graph.run_part(part, {**known, **leaves}, keep, targets)
        if gradients is None:
            gradients = {name: make(values[name].detach()) for name, make in directions.items()}
        inputs = [values[uses[number].input].detach() for number in numbers]
        gradients, by_use = _back(values, leaves, targets, gradients)
        # The part's values go before its layers are looked at, and before the next part's come.
        del values, leaves, known
        for place, number in enumerate(numbers):
            rows, by_use[place] = by_use[place], []
            if rows:
                yield number, inputs[place], rows


def _back(
    found: dict[str, Any],
    leaves: dict[str, Any],
    targets: list[str],
    gradients: dict[str, list[Any]],
) -> tuple[dict[str, list[Any]], list[list[Any]]]:
    """Take ``gradients`` at what a part left back to what it began with and its ``targets``.

    What nothing depends on is left out of the first, and is an empty list in the second.
    """
    ends = [name for name in gradients if found[name].requires_grad]
    into, by_target = dict[str, list[Any]](), [list[Any]() for _ in targets]
    directions = len(gradients[ends[0]]) if ends else 0
    for direction in range(directions):
        rows = torch.autograd.grad(
            [found[name] for name in ends],
            [*leaves.values(), *(found[name] for name in targets)],
            [gradients[name][direction] for name in ends],
            retain_graph=direction + 1 < directions,
            allow_unused=True,
        )
        for name, row in zip(leaves, rows):
            if row is not None:
                into.setdefault(name, []).append(row)
        for held, row in zip(by_target, rows[len(leaves) :]):
            if row is not None:
                held.append(row.float())
    return into, by_target


__all__ = ["layer_gradients", "parts_within"]
