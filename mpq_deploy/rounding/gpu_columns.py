"""The column loops of ``quantizers`` on torch tensors: some columns per pass, all rows at once.

Each pass computes what the NumPy loop computes, one column after the other. No pass waits for the
GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from mpq_deploy.system.compute import out_of_memory

# (wanted values [R], scales and limits of the column) -> codes and values [R].
Level = Callable[..., tuple[Tensor, Tensor]]
# (tensors that the pass changes, tensors that it only reads) -> None.
Work = Callable[[Sequence[Tensor], Sequence[Tensor]], None]
# Passes with the same shapes before one is recorded: recording takes about as long as a pass (our
# choice).
PLAIN_PASSES = 2


def integer_level(wanted: Tensor, step: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Round to a multiple of ``step`` between ``low`` and ``high``, all [R]."""
    code = torch.div(wanted, step).round_().clamp_(low, high)
    return code, code * step


class Replayed:
    """A pass that runs many times on tensors of the same shapes, recorded as a CUDA graph.

    A pass is thousands of small kernels, which Python launches more slowly than a GPU runs them.
    """

    def __init__(self, work: Work) -> None:
        self._work = work
        self._seen: dict[Any, int] = {}
        self.recorded: dict[Any, tuple[Any, list[Tensor]] | None] = {}

    def __call__(self, changed: Sequence[Tensor], read: Sequence[Tensor]) -> None:
        """Run the pass: it overwrites ``changed``."""
        given = (*changed, *read)
        shapes = tuple(tensor.shape for tensor in given)
        self._seen[shapes] = self._seen.get(shapes, 0) + 1
        if not _records(changed[0].device) or self._seen[shapes] <= PLAIN_PASSES:
            self._work(changed, read)
            return
        if shapes not in self.recorded:
            self.recorded[shapes] = self._record(given, len(changed))
        found = self.recorded[shapes]
        if found is None:
            self._work(changed, read)
            return
        graph, own = found
        for mine, tensor in zip(own, given, strict=True):
            mine.copy_(tensor)
        graph.replay()
        for tensor, mine in zip(changed, own):
            tensor.copy_(mine)

    def _record(self, given: Sequence[Tensor], changed: int) -> tuple[Any, list[Tensor]] | None:
        """Return the CUDA graph and its own tensors; None where the driver refuses to record."""
        device, own = given[0].device, [tensor.clone() for tensor in given]
        graph, side = torch.cuda.CUDAGraph(), _side_stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        try:
            with torch.cuda.stream(side):
                graph.capture_begin(capture_error_mode="thread_local")
                try:
                    self._work(own[:changed], own[changed:])
                finally:
                    graph.capture_end()
        except RuntimeError as error:
            if out_of_memory(error):
                raise
            return None
        torch.cuda.current_stream(device).wait_stream(side)
        return graph, own


def _records(device: torch.device) -> bool:
    return device.type == "cuda"


@cache
def _side_stream(device: torch.device) -> Any:
    """Return the stream for recording passes; cuBLAS is initialized there before any recording."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        square = torch.ones((2, 2), device=device)
        torch.mv(square, square[0])
        torch.mm(square, square)
    torch.cuda.current_stream(device).wait_stream(stream)
    return stream


class GpuColumns:
    """Rounds columns [K, R] by the function ``level`` and writes their ``codes`` [K, R].

    ``parts``: the further arguments of ``level``, [K, R] each, or [1, R] for all columns.
    """

    def __init__(self, level: Level, parts: Sequence[Tensor], codes: Tensor) -> None:
        self._parts, self._codes = parts, codes
        self._compensate = Replayed(partial(_compensate, level))
        self._descend = Replayed(partial(_descend, level))

    def compensate(self, start: int, wanted: Tensor, errors: Tensor, corner: Tensor) -> None:
        """Round n columns from ``start``, each compensating the errors of the columns before.

        ``wanted`` [n, R]: the values to round; ends as their differences to the rounded values.
        ``errors`` [n, R]: the weights; ends as the weights' errors. ``corner`` [n, n]: the diagonal
        part of GPTQ's factor.
        """
        codes, parts = self._cut(start, len(wanted))
        self._compensate((wanted, errors, codes), (corner, *parts))

    def descend(
        self, start: int, held: tuple[Tensor, Tensor, Tensor], target: Tensor, square: Tensor
    ) -> None:
        """Set each column of the values to its best level while the other columns are fixed.

        ``held``: values, errors and slopes, overwritten; these and ``target`` are [n, R].
        ``square`` [n, n]: the diagonal part of the Hessian.
        """
        codes, parts = self._cut(start, len(target))
        self._descend((*held, codes), (target, square, *parts))

    def _cut(self, start: int, count: int) -> tuple[Tensor, list[Tensor]]:
        parts = [
            part[start : start + count] if len(part) > 1 else part.expand(count, *part.shape[1:])
            for part in self._parts
        ]
        return self._codes[start : start + count], parts


def _compensate(level: Level, changed: Sequence[Tensor], read: Sequence[Tensor]) -> None:
    (wanted, errors, codes), (corner, *parts) = changed, read
    for i, own in enumerate(wanted):
        if i:
            own += corner[:i, i] @ errors[:i]
        codes[i], value = level(own, *(part[i] for part in parts))
        errors[i] -= value
        own -= value


def _descend(level: Level, changed: Sequence[Tensor], read: Sequence[Tensor]) -> None:
    (values, error, slope, codes), (target, square, *parts) = changed, read
    for i in range(len(values)):
        best = target[i] - error[i] + slope[i] / square[i, i]
        codes[i], found = level(best, *(part[i] for part in parts))
        moved = values[i] - found
        error[i] += moved
        values[i] = found
        slope[i + 1 :] += square[i + 1 :, i, None] * moved


def move_codes(limits: tuple[int, int], changed: Sequence[Tensor], read: Sequence[Tensor]) -> None:
    """Choose the best codes within ``limits``, column by column.

    ``changed`` [n, R] each: the slopes, which become the new codes, and the array for the changes
    of the values. ``read``: the old codes and their steps, [n, R] each, and the Hessian's diagonal
    part [n, n].
    """
    (wanted, moved), (levels, step, square) = changed, read
    for i, best in enumerate(wanted):
        if i:
            best -= square[i, :i] @ moved[:i]
        best /= square[i, i] * step[i]
        best += levels[i]
        best.round_().clamp_(*limits)
        torch.mul(best - levels[i], step[i], out=moved[i])
