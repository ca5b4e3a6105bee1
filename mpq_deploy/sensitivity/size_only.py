"""The control that knows only sizes: every layer has the importance 1.

Published OMPQ allocations can be reproduced like that.
"""

from __future__ import annotations

import numpy as np

from mpq_deploy.sensitivity.bit_losses import table_from_importance
from mpq_deploy.sensitivity.subject import Subject
from mpq_deploy.sensitivity.table import SensitivityTable


def measure_size_only(subject: Subject) -> SensitivityTable:
    """Give every layer the importance 1. No layer is run."""
    theta = np.ones((len(subject.calibration.timesteps), len(subject.layers)))
    return table_from_importance("size-only", subject, theta)
