"""Which of the sampler's steps are recorded."""

from __future__ import annotations

import numpy as np

from mpq_deploy.errors import UsageError
from mpq_deploy.models.spec import Array

# So many timesteps of each trajectory are recorded at least, of which fewer may be used: more of them
# later need no other trajectories (our choice, the default of calibrate.timesteps).
KEPT_TIMESTEPS = 20


def kept_timesteps(steps: int, wanted: int) -> int:
    """Return how many of ``steps`` timesteps to record if ``wanted`` are used."""
    return max(wanted, min(KEPT_TIMESTEPS, steps))


def sampled_steps(steps: int, count: int) -> Array:
    """Return ``count`` ascending step indices, int64: midpoints of equal strides of ``steps``.

    Our choice: MPQ-Diff (arXiv 2412.00144) samples timesteps uniformly and does not say where in a
    stride. Raises UsageError when there are fewer steps than timesteps.
    """
    if count < 1:
        raise UsageError(f"Invalid number of timesteps: {count}.", "Choose at least 1.")
    if count > steps:
        raise UsageError(
            f"{count} timesteps cannot be sampled from a sampler of {steps} steps.",
            f"Choose at most {steps} timesteps, or at least {count} steps.",
        )
    return np.asarray((2 * np.arange(count) + 1) * steps // (2 * count), np.int64)


def adaptive_steps(curve: Array, coarse: Array, steps: int, count: int) -> Array:
    """Return ``count`` of ``steps`` positions, int64, ascending: more where ``curve`` changes fast.

    Our choice: equal arc length. ``curve`` [C, L] is a vector (the layers' importances) at the C
    positions ``coarse`` of a first pass, ascending. Its length between two neighbours is the
    Euclidean distance; it grows evenly between them, and beyond the first and last as fast as
    beside them. The midpoints of ``count`` equal parts of the whole length, each at the position
    where the curve has it, are the answer; what falls on a position already taken moves to the next
    free one. A curve that does not change gives ``sampled_steps``. Raises UsageError when there are
    fewer positions than timesteps.
    """
    uniform = sampled_steps(steps, count)
    lengths = np.linalg.norm(np.diff(np.asarray(curve, np.float64), axis=0), axis=1)
    if not lengths.sum() > 0:
        return uniform
    # Positions are cells [i, i + 1): the middle of cell i is where the coarse pass looked.
    places = np.asarray(coarse, np.float64) + 0.5
    speed = lengths / np.diff(places)
    places = np.concatenate([[0.0], places, [float(steps)]])
    covered = np.cumsum([0.0, speed[0] * places[1], *lengths, speed[-1] * (steps - places[-2])])
    targets = (np.arange(count) + 0.5) / count * covered[-1]
    chosen = np.clip(np.interp(targets, covered, places), 0, steps - 1).astype(np.int64)
    for number in range(1, count):
        chosen[number] = max(chosen[number], chosen[number - 1] + 1)
    for number in range(count - 1, -1, -1):
        chosen[number] = min(chosen[number], steps - count + number)
    return np.asarray(chosen, np.int64)


def stride_shares(chosen: Array, steps: int) -> Array:
    """Return the share of the trajectory that each of the ``chosen`` positions stands for, float64.

    A boundary lies halfway between two neighbours; the first and last reach to the ends.
    """
    places = np.asarray(chosen, np.float64) + 0.5
    bounds = np.concatenate([[0.0], (places[1:] + places[:-1]) / 2, [float(steps)]])
    return np.diff(bounds) / steps
