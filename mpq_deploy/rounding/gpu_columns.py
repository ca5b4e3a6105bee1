"""The passes over columns that rounding makes, on torch's tensors: some columns at a time, rows side by side.

Each does what the loop of ``quantizers`` that it stands for does with NumPy's arrays, a column
after the other, and nothing in it waits for the GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# (wanted [R], what a column's levels are) -> codes and values [R].
Level = Callable[..., tuple[Tensor, Tensor]]


def integer_level(wanted: Tensor, step: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Round to a multiple of ``step`` between ``low`` and ``high``, all [R]."""
    code = torch.div(wanted, step).round_().clamp_(low, high)
    return code, code * step


class GpuColumns:
    """Rounds columns [K, R] by ``level``; ``parts``: its further arguments, [K, R] each, or [1, R] for all columns.

    ``codes`` [K, R] is filled.
    """

    def __init__(self, level: Level, parts: Sequence[Tensor], codes: Tensor) -> None:
        self._level, self._parts, self._codes = level, parts, codes

    def compensate(self, start: int, wanted: Tensor, errors: Tensor, corner: Tensor) -> None:
        """Round the columns ``wanted`` [n, R], which begin at ``start``, each making up for those before.

        ``errors`` [n, R]: the weights, then what is left of them, as is left of ``wanted``.
        ``corner`` [n, n]: the factor's part.
        """
        codes, parts = self._cut(start, len(wanted))
        self._run(_compensate, (wanted, errors, codes), (corner, *parts))

    def descend(
        self,
        start: int,
        values: Tensor,
        error: Tensor,
        slope: Tensor,
        target: Tensor,
        square: Tensor,
    ) -> None:
        """Set each column of ``values`` [n, R] to the best for the others; the others as in ``quantizers.descend``."""
        codes, parts = self._cut(start, len(values))
        self._run(_descend, (values, error, slope, codes), (target, square, *parts))

    def _cut(self, start: int, count: int) -> tuple[Tensor, list[Tensor]]:
        parts = [
            part[start : start + count] if len(part) > 1 else part.expand(count, *part.shape[1:])
            for part in self._parts
        ]
        return self._codes[start : start + count], parts

    def _run(self, work: Any, changed: tuple[Tensor, ...], read: tuple[Tensor, ...]) -> None:
        work(self._level, *changed, *read)


def _compensate(
    level: Level, wanted: Tensor, errors: Tensor, codes: Tensor, corner: Tensor, *parts: Tensor
) -> None:
    for i, own in enumerate(wanted):
        if i:
            own += corner[:i, i] @ errors[:i]
        codes[i], value = level(own, *(part[i] for part in parts))
        errors[i] -= value
        own -= value


def _descend(
    level: Level,
    values: Tensor,
    error: Tensor,
    slope: Tensor,
    codes: Tensor,
    target: Tensor,
    square: Tensor,
    *parts: Tensor,
) -> None:
    for i in range(len(values)):
        best = target[i] - error[i] + slope[i] / square[i, i]
        codes[i], found = level(best, *(part[i] for part in parts))
        moved = values[i] - found
        error[i] += moved
        values[i] = found
        slope[i + 1 :] += square[i + 1 :, i, None] * moved


def move_codes(
    wanted: Tensor,
    moved: Tensor,
    levels: Tensor,
    step: Tensor,
    square: Tensor,
    limits: tuple[int, int],
) -> None:
    """Turn the slopes ``wanted`` [n, R] into the best codes, and ``moved`` into how far values went.

    ``levels`` and ``step`` [n, R]: the codes before, and their steps; ``square`` [n, n].
    """
    for i, best in enumerate(wanted):
        if i:
            best -= square[i, :i] @ moved[:i]
        best /= square[i, i] * step[i]
        best += levels[i]
        best.round_().clamp_(*limits)
        torch.mul(best - levels[i], step[i], out=moved[i])
