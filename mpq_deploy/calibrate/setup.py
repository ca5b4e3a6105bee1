"""What calibration is told: the model, how to call it, and how much is recorded and observed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mpq_deploy.calibrate.stats import CalibrationSet
from mpq_deploy.calls.feeds import RecordedCalls
from mpq_deploy.errors import UsageError
from mpq_deploy.models.spec import Array, DenoiserSpec
from mpq_deploy.recipe import SamplerKind

SCALE_METHODS = ("mse", "percentile", "absmax")


@dataclass(frozen=True)
class CalibrationOptions:
    """How many calls are recorded, and how activations are summarised.

    ``timesteps`` of the sampler's ``steps`` are recorded for ``samples`` trajectories, ``batch_size`` at a time;
    activations are observed on ``observed`` of the calls (None: all).
    ``scale_method``: mse, percentile (of the absolute values, ``percentile`` in per cent) or absmax.
    ``reservoir``: values kept of each activation. ``threads``: of ONNX Runtime; 0 leaves the choice to it.
    ``sampler``: auto, ddim or folder, as ``make_sampler`` takes it.
    """

    timesteps: int = 10
    samples: int = 16
    observed: int | None = None
    steps: int = 20
    batch_size: int = 8
    seed: int = 0
    scale_method: str = "mse"
    percentile: float = 99.99
    reservoir: int = 4096
    threads: int = 0
    sampler: SamplerKind = "auto"

    def __post_init__(self) -> None:
        for name in ("timesteps", "samples", "steps", "batch_size", "reservoir"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}.", f"Choose a {name} of at least 1.")
        if self.scale_method not in SCALE_METHODS:
            raise UsageError(
                f"The scale method is '{self.scale_method}'.", f"Choose one of {', '.join(SCALE_METHODS)}."
            )
        if not 50 < self.percentile <= 100:
            raise UsageError(f"The percentile is {self.percentile}.", "Choose one above 50, up to 100.")


@dataclass(frozen=True)
class CalibrationSetup:
    """The float ONNX file, how to call it, and what is recorded. Workers have its path below their root."""

    model: Path
    spec: DenoiserSpec
    conditions: dict[str, Array]
    options: CalibrationOptions

    def calls(self, recorded: CalibrationSet) -> RecordedCalls:
        """Return ``recorded`` with what the model is fed beside it."""
        return RecordedCalls(recorded, self.conditions, self.spec)
