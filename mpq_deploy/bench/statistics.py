"""Statistics of timed calls: percentiles, throughput, the ratio of two subjects with its interval."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# Our choices, as in evaluate.interval: draws of the bootstrap, its seed, the level of the interval.
DRAWS, SEED, LEVEL = 2000, 0, 0.95
PERCENTILES = (50, 90, 99)
# Fewer rounds than this have no interval: resampling them says nothing.
MIN_ROUNDS = 5


def call_times(milliseconds: Sequence[float]) -> dict[str, float]:
    """Return mean and percentiles in milliseconds, and the number of calls."""
    times = np.asarray(milliseconds, np.float64)
    percentiles = {
        f"p{percent}_ms": float(np.percentile(times, percent)) for percent in PERCENTILES
    }
    return {"mean_ms": float(times.mean()), "calls": len(times), **percentiles}


def summary(milliseconds: Sequence[float], batch: int) -> dict[str, float]:
    """Return ``call_times`` and the samples per second."""
    times = call_times(milliseconds)
    return {**times, "samples_per_second": 1e3 * batch / times["mean_ms"]}


def ratio(
    ours: Sequence[Sequence[float]], other: Sequence[Sequence[float]]
) -> dict[str, float | int | None]:
    """Return median(ours) / median(other) over all calls, with its bootstrap interval over rounds.

    Both are [rounds, calls]; round i of both ran side by side and is drawn as one. Percentile
    bootstrap (Efron 1979), seeded; no interval below ``MIN_ROUNDS`` rounds.
    """
    a, b = np.asarray(ours, np.float64), np.asarray(other, np.float64)
    ratio: dict[str, float | int | None] = {
        "value": float(np.median(a) / np.median(b)),
        "rounds": len(a),
    }
    if len(a) < MIN_ROUNDS:
        return {**ratio, "low": None, "high": None}
    rows = np.random.default_rng(SEED).integers(0, len(a), (DRAWS, len(a)))
    medians = (np.median(times[rows].reshape(DRAWS, -1), axis=1) for times in (a, b))
    drawn = np.divide(*medians)
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(drawn, [tail, 100 - tail])
    return {**ratio, "low": float(low), "high": float(high)}
