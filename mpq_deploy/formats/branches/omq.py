"""The branch ``omq``: the channels of highest kurtosis get one bit more, as many others one bit less.

MPQ-DM (arXiv 2412.11549): m channels get N + 1 bits and m get N - 1, so the mean stays N; m in {0,
k, 2k, ...} up to half the channels, k = O // 10, by the error of the layer's output.
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
    """Outlier-driven mixed quantization."""

    kind = "omq"
    meaning = "outlier channels with one bit more, as many others with one bit less"
    # Which of three widths a channel has.
    form_bits = 2

    def steps(self, errors: Sequence[Array], kurtosis: Array | None) -> Array:
        assert kurtosis is not None, "outlier-driven bits need the list of outlier channels"
        return outlier_steps(kurtosis, *errors)


def outlier_steps(kurtosis: Array, fewer: Array, same: Array, more: Array) -> Array:
    """Return which channels get a bit more (1) and less (-1), int64 [O], by MPQ-DM's group search.

    ``fewer``, ``same``, ``more`` [O]: a channel's error with N - 1, N and N + 1 bits. The m
    channels of highest kurtosis are promoted and the m of lowest demoted, m in {0, k, 2k, ...} up
    to half of them, k = O // 10, by the sum of all errors.
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
