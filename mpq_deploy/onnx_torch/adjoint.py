"""Gradients of the output at every layer, for several directions at once, in bounded memory.

The graph may be cut into parts: each is evaluated again from the values that it began with, and all
directions go back through it before the part before it is. That is gradient checkpointing (Chen et
al., arXiv 1604.06174), with one recomputation for all directions instead of one for each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mpq_deploy.graph.layers import LayerUse
from mpq_deploy.onnx_torch.pass_memory import PASS_COPIES, WHOLE_SHARE
from mpq_deploy.onnx_torch.torch_graph import Footprint, TorchGraph


def parts_within(footprint: Footprint, gradients: Sequence[int], most: int) -> tuple[slice, ...]:
    """Cut a graph whose values and ``gradients`` (bytes, by node) take several times ``most``."""
    taken = [PASS_COPIES * made + more for made, more in zip(footprint.made, gradients)]
    if sum(taken) <= WHOLE_SHARE * most:
        return (slice(0, len(taken)),)
    return footprint.parts(taken, most)


def gradient_bytes(
    footprint: Footprint, uses: Iterable[LayerUse], directions: int, through: Collection[int] = ()
) -> list[int]:
    """Return by node the bytes of what ``layer_gradients`` returns of the ``uses`` whose outputs it makes."""
    sizes = {name: size for outputs in footprint.outputs for name, size in outputs.items()}
    held = Counter[str]()
    for number, use in enumerate(uses):
        back = sizes.get(use.input, 0) if number in through else 0
        held[use.output] += directions * (sizes.get(use.output, 0) + back)
    return [sum(held[name] for name in outputs) for outputs in footprint.outputs]


@dataclass(frozen=True)
class UseGradients:
    """What came back to one use of a layer, ``number`` in the order asked for.

    ``x``: the layer's input, a vector as one row; ``rows``: the gradients of its output, float32,
    one per direction; ``through``: those of its input by this use alone, where they were asked for.
    """

    number: int
    x: Any
    rows: list[Any]
    through: list[Any]

    @classmethod
    def of(cls, number: int, x: Any, rows: list[Any], through: list[Any]) -> UseGradients:
        """Return them with a vector as one row."""
        if x.ndim > 1:
            return cls(number, x, rows, through)
        return cls(number, x[None], [row[None] for row in rows], [row[None] for row in through])


def layer_gradients(
    graph: TorchGraph,
    feeds: dict[str, Any],
    parts: Sequence[slice],
    uses: Sequence[LayerUse],
    directions: Mapping[str, Callable[[Any], list[Any]]],
    through: Collection[int] = (),
) -> Iterator[UseGradients]:
    """Yield the gradients of every use, the last part of the graph first.

    ``directions``: output of the graph -> what gets its value and returns tensors like it. Uses
    come in the order of ``uses`` within a part; those that no output depends on are left out.
    ``through``: the numbers of those whose input's gradient is wanted, too. Feeds that require a
    gradient come last, numbered -1, with it as ``rows``.
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
            if value.is_floating_point() and (name not in feeds or value.requires_grad)
        }
        numbers = [number for number, use in enumerate(uses) if use.output in made]
        targets = [uses[number].output for number in numbers]
        keep = [*targets, *(uses[number].input for number in numbers)]
        read = {uses[number].node: _Alias() for number in numbers if number in through}
        values = graph.run_part(part, {**known, **leaves}, keep, targets, read)
        if gradients is None:
            gradients = {name: make(values[name].detach()) for name, make in directions.items()}
        inputs = [values[uses[number].input].detach() for number in numbers]
        aliased = [number for number in numbers if number in through]
        wanted = [values[name] for name in targets]
        wanted += [read[uses[number].node].value for number in aliased]
        gradients, rows = _back(values, leaves, wanted, gradients)
        into = dict(zip(aliased, rows[len(numbers) :]))
        # The part's values go before its layers are looked at, and before the next part's come.
        del values, leaves, known, read, wanted
        for place, number in enumerate(numbers):
            own, rows[place] = rows[place], []
            if own:
                yield UseGradients.of(number, inputs[place], own, into.pop(number, []))
    for name, rows_of_feed in (gradients or {}).items():
        yield UseGradients(-1, feeds[name], rows_of_feed, [])


class _Alias:
    """Lets a node read its first input under a name of its own, ``value``, for its gradient."""

    value: Any = None

    def __call__(self, inputs: list[Any]) -> list[Any]:
        first = inputs[0]
        self.value = (
            first.view_as(first) if first.requires_grad else first.detach().requires_grad_()
        )
        return [self.value, *inputs[1:]]


def _back(
    found: dict[str, Any],
    leaves: dict[str, Any],
    wanted: list[Any],
    gradients: dict[str, list[Any]],
) -> tuple[dict[str, list[Any]], list[list[Any]]]:
    """Take ``gradients`` at what a part left back to what it began with and to ``wanted``.

    What nothing depends on is left out of the first, and is an empty list in the second.
    """
    ends = [name for name in gradients if found[name].requires_grad]
    into, by_wanted = dict[str, list[Any]](), [list[Any]() for _ in wanted]
    directions = len(gradients[ends[0]]) if ends else 0
    for direction in range(directions):
        rows = torch.autograd.grad(
            [found[name] for name in ends],
            [*leaves.values(), *wanted],
            [gradients[name][direction] for name in ends],
            retain_graph=direction + 1 < directions,
            allow_unused=True,
        )
        for name, row in zip(leaves, rows):
            if row is not None:
                into.setdefault(name, []).append(row)
        for held, row in zip(by_wanted, rows[len(leaves) :]):
            if row is not None:
                held.append(row.float())
    return into, by_wanted


__all__ = ["gradient_bytes", "layer_gradients", "parts_within"]
