"""The error of the denoiser's output against the float model's, timestep by timestep.

In: outputs of the float model and of a variant for the same inputs. Out: the normalised mean
squared error (NMSE), the measure that the allocation predicts.
"""

from __future__ import annotations

import math

import numpy as np

from mpq_deploy.errors import ModelError
from mpq_deploy.models.spec import Array


def nmse(reference: Array, output: Array) -> float:
    """Return sum((output - reference)^2) / sum(reference^2) over all samples, in float64.

    Raises ModelError when the reference is zero everywhere: then no relative error exists.
    """
    if reference.shape != output.shape:
        raise ModelError(
            f"An output of shape {list(output.shape)} cannot be compared with float's {list(reference.shape)}.",
            "Both graphs must be made from the same model.",
        )
    expected = np.asarray(reference, np.float64)
    energy = float(np.sum(np.square(expected)))
    if energy == 0.0:
        raise ModelError(
            "The float model's output is zero everywhere, so it has no relative error.",
            "Check that the model is trained: diffusers initialises some output layers to zero.",
        )
    return float(np.sum(np.square(np.asarray(output, np.float64) - expected)) / energy)


def nmse_each(reference: Array, output: Array) -> Array:
    """Return each sample's part of ``nmse``, whose mean that is, float64 [N]."""
    expected = np.asarray(reference, np.float64).reshape(len(reference), -1)
    errors = np.square(np.asarray(output, np.float64).reshape(expected.shape) - expected)
    return np.asarray(errors.sum(axis=1) * (len(expected) / np.sum(np.square(expected))))


def sqnr_db(error: float) -> float:
    """Return the signal-to-quantization-noise ratio of an NMSE, in dB; ``inf`` for no error."""
    return math.inf if error == 0.0 else -10.0 * math.log10(error)


def taken_turns(available: int, timesteps: int, calls: int | None) -> Array:
    """Return the ``available`` calls compared at each timestep, int64 [timesteps, M], ascending.

    ``calls`` of them, evenly spread, and at each timestep the next ones, so that all have about
    equally many turns; more where that would leave some out, and all for None. A call's error at
    one timestep says much about its error at the next, so that the choice of trajectories leaves
    far more doubt than the turns (our choice, as in measuring).
    """
    count = available if calls is None else min(available, max(calls, -(-available // timesteps)))
    first = np.arange(count) * available // count
    return np.sort((first + np.arange(timesteps)[:, None]) % available, axis=1).astype(np.int64)


def stride_midpoints(steps: int, count: int) -> Array:
    """Return the midpoints of ``count`` equal strides of ``steps`` steps, int64, ascending.

    All steps when ``count`` is not below ``steps``.
    """
    if count >= steps:
        return np.arange(steps)
    return np.asarray(np.floor((np.arange(count) + 0.5) * steps / count)).astype(np.int64)
