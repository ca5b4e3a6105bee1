"""The branch ``omq``: channels of high kurtosis get one bit more, as many others one bit less.

MPQ-DM (arXiv 2412.11549): m channels get N + 1 bits and m channels N - 1, so the mean stays N. The
error of the layer's output decides m in {0, k, 2k, ...}, up to half the channels, k = O // 10.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mpq_deploy.formats.simulated import SharedBits

if TYPE_CHECKING:
    from mpq_deploy.models.spec import Array


@dataclass(frozen=True)
class Omq(SharedBits):
    """MPQ-DM's outlier-driven mixed quantization."""

    kind = "omq"
    meaning = "outlier channels with one bit more, as many others with one bit less"
    # Enough for three widths.
    form_bits = 2

    def steps(self, errors: Sequence[Array], kurtosis: Array | None) -> Array:
        assert kurtosis is not None, "outlier-driven bits need the list of outlier channels"
        return outlier_steps(kurtosis, *errors)


def outlier_steps(kurtosis: Array, fewer: Array, same: Array, more: Array) -> Array:
    """Return each channel's change in bits, -1, 0 or 1, int64 [O], by MPQ-DM's group search.

    ``fewer``, ``same``, ``more`` [O]: a channel's error with N - 1, N and N + 1 bits. The m
    channels of highest ``kurtosis`` [O] get a bit more and the m of lowest a bit less; m minimizes
    the sum of errors over {0, k, 2k, ...}, up to half the channels, k = O // 10.
    """
    channels = len(kurtosis)
    order = np.argsort(-kurtosis, kind="stable")
    group = channels // 10
    best, least = np.zeros(channels, np.int64), float(same.sum())
    for count in range(group, channels // 2 + 1, group) if group else ():
        steps = np.zeros(channels, np.int64)
        steps[order[:count]], steps[order[-count:]] = 1, -1
        total = float(np.where(steps == 0, same, np.where(steps > 0, more, fewer)).sum())
        if total < least:
            best, least = steps, total
    return best
