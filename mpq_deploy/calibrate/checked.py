"""The float denoiser, whose first value that is not finite is named."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mpq_deploy.errors import ModelError
from mpq_deploy.models.spec import Array
from mpq_deploy.runtime.not_finite import first_not_finite
from mpq_deploy.runtime.ort import OrtDenoiser, model_feeds


class CheckedDenoiser:
    """The float denoiser; when its output is not finite, the error names the node where that begins."""

    def __init__(self, model: Path, denoiser: OrtDenoiser) -> None:
        self._model, self._denoiser = model, denoiser

    def __call__(self, sample: Array, timestep: float | Array, conditions: dict[str, Array]) -> Array:
        """Return the output; ModelError when it is not finite."""
        output = self._denoiser(sample, timestep, conditions)
        if not np.isfinite(output).all():
            feeds = model_feeds(self._denoiser.spec, sample, timestep, conditions)
            where = first_not_finite(self._model, feeds) or "its output"
            raise ModelError(
                f"The float model gives NaN or Inf at timestep {np.ravel(timestep)[0]:g}: first in {where}.",
                "Check the weights up to there, and that the scheduler is the one the model was trained with.",
            )
        return output
