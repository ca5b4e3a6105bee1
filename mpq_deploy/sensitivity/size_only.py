"""A control in which every layer has the importance 1, so that only layer sizes matter.

Published OMPQ allocations can be reproduced with it.
"""

from __future__ import annotations

import numpy as np

from mpq_deploy.sensitivity.bit_losses import table_from_importance
from mpq_deploy.sensitivity.subject import Subject
from mpq_deploy.sensitivity.table import SensitivityTable


def measure_size_only(subject: Subject) -> SensitivityTable:
    """Return the table in which every layer has the importance 1. Runs no layer."""
    theta = np.ones((len(subject.calibration.timesteps), len(subject.layers)))
    return table_from_importance("size-only", subject, theta)
