"""From an observation to the statistics that later stages read."""

from __future__ import annotations

import numpy as np

from mpq_deploy.calibrate.observers import Observation
from mpq_deploy.calibrate.options import CalibrationOptions
from mpq_deploy.calibrate.scales import activation_scale
from mpq_deploy.calibrate.stats import ActivationStats, CalibrationStats


def summarise(seen: Observation, options: CalibrationOptions) -> CalibrationStats:
    """Turn sums into moments and choose each tensor's INT8 scale, from all timesteps and samples together."""
    activations = {}
    for number, name in enumerate(seen.names):
        place = slice(seen.offsets[number], seen.offsets[number + 1])
        amax, count = seen.amax[place], seen.counts[number]
        values = seen.values[number]
        scale = activation_scale(options.scale_method, values, float(amax.max()), count * len(amax), options.percentile)
        activations[name] = ActivationStats(
            amax,
            seen.square_sum[place] / count,
            seen.fourth_sum[place] / count,
            np.asarray(values, np.float32),
            seen.amax_by_timestep[:, number],
            scale,
        )
    return CalibrationStats(activations)
