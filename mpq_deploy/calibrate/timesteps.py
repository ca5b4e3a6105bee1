"""Which of the sampler's steps are recorded."""

from __future__ import annotations

import numpy as np

from mpq_deploy.denoisers.spec import Array
from mpq_deploy.errors import UsageError


def sampled_steps(steps: int, count: int) -> Array:
    """Return ``count`` step indices, int64, rising: the midpoints of equal strides of the sampler's ``steps``.

    Our choice: MPQ-Diff (arXiv 2412.00144) samples timesteps uniformly and does not say where in a stride.
    Raises UsageError when there are fewer steps than timesteps.
    """
    if count < 1:
        raise UsageError(f"{count} timesteps were asked for.", "Choose at least 1.")
    if count > steps:
        raise UsageError(
            f"{count} timesteps cannot be sampled from a sampler of {steps} steps.",
            f"Choose at most {steps} timesteps, or at least {count} steps.",
        )
    return np.asarray((2 * np.arange(count) + 1) * steps // (2 * count), np.int64)
