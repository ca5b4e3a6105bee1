"""The branch ``zres``: channels take binary residuals over a smaller grid where better.

MPQ-DMv2 (arXiv 2507.04290; only its abstract is public, everything here is our reading): a grid of
N - 1 bits and z in {0, 1, 2} binary residuals in place of N - 1, N and N + 1 bits. The grid's clip
is searched jointly with the residuals' sizes. At equal bits a plain grid is a candidate for each
channel too, so the residual is taken only where it is better; which channels get how many bits
minimizes the error of the layer's output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mpq_deploy.formats.simulated import SharedBits
from mpq_deploy.rounding.row_grids import RowForm, plain

if TYPE_CHECKING:
    from mpq_deploy.models.spec import Array


@dataclass(frozen=True)
class ZeroResidual(SharedBits):
    """Binary residuals."""

    kind = "zres"
    meaning = "each channel with binary residuals over a grid of one bit less, or a plain grid, whichever is better"
    # Which of five forms a channel has; one of two residuals takes the place of one with none.
    form_bits = 3
    residuals = 1

    def row_forms(self, bits: int) -> tuple[list[RowForm], list[RowForm], list[RowForm]]:
        fewer, same, more = super().row_forms(bits)
        return fewer, [*same, with_residuals(bits, 1)], [*more, with_residuals(bits, 2)]

    def steps(self, errors: Sequence[Array], kurtosis: Array | None) -> Array:
        return balanced_steps(*errors)


def with_residuals(bits: int, orders: int) -> RowForm:
    """Return the form of ``orders`` more residuals over the common base of a layer of ``bits`` on average."""
    base = plain(bits - 1)
    return RowForm(base.bits, base.orders + orders)


def balanced_steps(fewer: Array, same: Array, more: Array) -> Array:
    """Return the channels with one bit more (1) and less (-1), int64 [O], that minimize the error.

    Exact, by dynamic programming over the channels and the balance so far. Our choice.
    """
    channels = len(same)
    width = 2 * channels + 1
    total = np.full(width, np.inf)
    total[channels] = 0.0
    taken = np.zeros((channels, width), np.int8)
    for row in range(channels):
        up, down = np.full(width, np.inf), np.full(width, np.inf)
        up[1:], down[:-1] = total[:-1] + more[row], total[1:] + fewer[row]
        options = np.stack([total + same[row], down, up])
        which = np.argmin(options, axis=0)
        total = options[which, np.arange(width)]
        taken[row] = np.array([0, -1, 1], np.int8)[which]
    steps = np.zeros(channels, np.int64)
    balance = channels
    for row in range(channels - 1, -1, -1):
        steps[row] = taken[row, balance]
        balance -= steps[row]
    return steps
