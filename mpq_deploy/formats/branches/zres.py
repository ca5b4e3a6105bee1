"""The branch ``zres``: a channel has a smaller grid plus binary residuals where that is better.

MPQ-DMv2 (arXiv 2507.04290; only its abstract is public, everything here is our reading): a grid of
N - 1 bits with z in {0, 1, 2} binary residuals replaces N - 1, N and N + 1 bits. The grid's clip is
searched jointly with the residuals' sizes. A plain grid of the same bits is a candidate for each
channel, too, so residuals are used only where they are better. The bits of the channels minimize
the error of the layer's output.
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
    """MPQ-DMv2's binary residuals, in our reading."""

    kind = "zres"
    meaning = "each channel with binary residuals over a grid of one bit less, or a plain grid, whichever is better"
    # Enough for five forms. Residuals: at most one per channel on average, because each channel
    # with two is balanced by a channel with none.
    form_bits = 3
    residuals = 1

    def row_forms(self, bits: int) -> tuple[list[RowForm], list[RowForm], list[RowForm]]:
        fewer, same, more = super().row_forms(bits)
        return fewer, [*same, with_residuals(bits, 1)], [*more, with_residuals(bits, 2)]

    def steps(self, errors: Sequence[Array], kurtosis: Array | None) -> Array:
        return balanced_steps(*errors)


def with_residuals(bits: int, orders: int) -> RowForm:
    """Return the form with a grid of ``bits`` - 1 and ``orders`` more residuals."""
    base = plain(bits - 1)
    return RowForm(base.bits, base.orders + orders)


def balanced_steps(fewer: Array, same: Array, more: Array) -> Array:
    """Return each channel's change in bits, -1, 0 or 1 with sum 0, int64 [O], of minimum error.

    ``fewer``, ``same``, ``more`` [O]: a channel's error with N - 1, N and N + 1 bits. Exact, by
    dynamic programming over the channels and the sum of changes. Our choice.
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
