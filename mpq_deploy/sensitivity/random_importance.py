"""A control without information: every layer has a random importance."""

from __future__ import annotations

import numpy as np

from mpq_deploy.sensitivity.bit_losses import table_from_importance
from mpq_deploy.sensitivity.subject import Subject
from mpq_deploy.sensitivity.table import SensitivityTable


def measure_random_importance(subject: Subject) -> SensitivityTable:
    """Draw every layer's importance uniformly from (0, 1] with ``settings.seed``. Runs no layer."""
    theta = 1 - np.random.default_rng(subject.settings.seed).random(len(subject.layers))
    steps = len(subject.calibration.timesteps)
    return table_from_importance("random", subject, np.tile(theta, (steps, 1)))
