"""PTQD's correction of a quantized denoiser's output (arXiv 2305.10657): a value and its file.

The quantized output of a timestep t is written as m_q = (1 + k_t) m + b_t + r with the float output
m and a residual r that is uncorrelated with m. The corrected output is (m_q - b_t) / (1 + k_t); its
error is r / (1 + k_t), whose variance a sampler that adds noise takes out of its own
(``corrected_scheduler.py``).

In: ``correction.json``, which belongs to one quantized model and names its digest. Out: a
``Correction``. Between the calibrated timesteps k, b and the residual's variance are interpolated
linearly in the timestep; outside their range the nearest calibrated timestep's hold (both our
choice: the paper calibrates the very steps that it samples).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mpq_deploy.errors import ModelError, UsageError
from mpq_deploy.models.spec import Array
from mpq_deploy.system.inputs import read_json

# Raised with every change of what the file holds.
FORMAT: Literal[1] = 1
FILE = "correction.json"
# Less than half of the float output's amplitude is not a float output with some noise. Our choice.
LEAST_GAIN = 0.5
BiasPer = Literal["channel", "scalar"]


class CorrectionStep(BaseModel):
    """One calibrated timestep. ``slope`` is k, ``bias`` b (one number, or one per channel),
    ``residual_variance`` that of r, before the division by 1 + k.

    ``heldout_nmse_before`` and ``heldout_nmse_fitted`` are the output's error without and with the
    fit on calls that it was not fitted on. Where the fit does not help, ``applied`` is false: k and
    b are 0, the residual is the whole error, and ``note`` says so.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    timestep: float
    slope: float = Field(gt=LEAST_GAIN - 1)
    bias: tuple[float, ...] = Field(min_length=1)
    residual_variance: float = Field(ge=0)
    applied: bool
    heldout_nmse_before: float = Field(ge=0)
    heldout_nmse_fitted: float = Field(ge=0)
    note: str = ""

    @property
    def heldout_nmse_after(self) -> float:
        """The held-out error of what is applied: the fit's, or the uncorrected one's."""
        return self.heldout_nmse_fitted if self.applied else self.heldout_nmse_before


@dataclass(frozen=True)
class StepCorrection:
    """The correction at one timestep: k, b float64 [1 or channels], the residual's variance."""

    slope: float
    bias: Array
    residual_variance: float

    @property
    def changes_output(self) -> bool:
        """Whether the corrected output differs from the quantized one."""
        return self.slope != 0 or bool(self.bias.any())

    @property
    def error_variance(self) -> float:
        """Variance of the corrected output's error, residual_variance / (1 + k)^2 (PTQD)."""
        return self.residual_variance / (1 + self.slope) ** 2


class Correction(BaseModel):
    """The correction of one quantized model by timestep, which is what correction.json holds.

    ``models``: SHA-256 of the ONNX files (with their external data) that it belongs to. It was
    fitted on ``calls`` recorded calls in ``folds`` parts, each checked on the others;
    ``unseen_by_rounding``: the weights were not rounded on them. ``steps`` ascend in their
    timesteps.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    format: Literal[1] = FORMAT
    method: Literal["ptqd"] = "ptqd"
    models: dict[str, str] = Field(min_length=1)
    prediction_type: str
    channels: int = Field(ge=1)
    bias_per: BiasPer
    steps: tuple[CorrectionStep, ...] = Field(min_length=1)
    calls: int = Field(0, ge=0)
    folds: int = Field(0, ge=0)
    unseen_by_rounding: bool = True

    @model_validator(mode="after")
    def _consistent(self) -> Correction:
        width = self.channels if self.bias_per == "channel" else 1
        if any(len(step.bias) != width for step in self.steps):
            raise ValueError(f"a bias does not have {width} values")
        if any(b.timestep <= a.timestep for a, b in zip(self.steps, self.steps[1:])):
            raise ValueError("the timesteps are not ascending")
        return self

    def at(self, timestep: float) -> StepCorrection:
        """Return the correction at ``timestep`` (a scheduler value), interpolated."""
        known = [step.timestep for step in self.steps]
        biases = np.array([step.bias for step in self.steps], np.float64)
        return StepCorrection(
            float(np.interp(timestep, known, [step.slope for step in self.steps])),
            np.array([np.interp(timestep, known, column) for column in biases.T]),
            float(np.interp(timestep, known, [step.residual_variance for step in self.steps])),
        )

    def apply(self, output: Array, timestep: float) -> Array:
        """Return the corrected output, float32 [N, C, ...] in and out.

        Of an output with a learned variance (2 C channels) the second half stays as it is. With
        classifier-free guidance it makes no difference whether single calls or the guided output
        are corrected: guidance is a sum with weights 1 - w and w, which add up to 1, so that the
        guided output has the same k and b. Raises ModelError for another number of channels.
        """
        at = self.at(timestep)
        self.check_channels(output.shape[1])
        if not at.changes_output:
            return output
        mean, rest = output[:, : self.channels], output[:, self.channels :]
        bias = at.bias.astype(np.float32).reshape(-1, *[1] * (output.ndim - 2))
        corrected = (mean - bias) / np.float32(1 + at.slope)
        return np.asarray(np.concatenate([corrected, rest], axis=1), np.float32)

    def check_channels(self, found: int) -> None:
        """Raise ModelError unless an output of ``found`` channels can be corrected."""
        if found not in (self.channels, 2 * self.channels):
            raise ModelError(
                f"The output has {found} channels, but the correction was fitted for {self.channels}.",
                "Use the correction that was made with this model.",
            )

    def heldout_nmse(self) -> tuple[float, float]:
        """Return the mean held-out error over timesteps, before and after what is applied."""
        before = float(np.mean([step.heldout_nmse_before for step in self.steps]))
        return before, float(np.mean([step.heldout_nmse_after for step in self.steps]))

    def summary(self) -> str:
        """Say at how many timesteps it applies and what it does to the held-out error."""
        before, after = self.heldout_nmse()
        used = sum(step.applied for step in self.steps)
        return f"applied at {used} of {len(self.steps)} timesteps, held-out NMSE {before:.2e} -> {after:.2e}"

    def as_json(self) -> dict[str, Any]:
        """Return what the file holds."""
        return self.model_dump(mode="json")

    def save(self, path: Path) -> None:
        """Write the file: JSON with sorted keys, the same bytes for the same correction."""
        path.write_text(
            json.dumps(self.as_json(), indent=1, sort_keys=True, allow_nan=False) + "\n",
            encoding="utf-8",
        )

    def require_model(self, model: Path) -> Correction:
        """Return self. Raises ModelError unless it belongs to the ONNX file ``model``."""
        from mpq_deploy.evaluate.cache import model_digest

        own = model_digest(model)
        if own not in self.models.values():
            known = ", ".join(
                f"{name} {digest[:12]}" for name, digest in sorted(self.models.items())
            )
            raise ModelError(
                f"The correction belongs to another model: it was fitted for {known}; {model.name} is {own[:12]}.",
                "Use the correction of this model's run folder, or fit it again: evaluate.correction: ptqd.",
            )
        return self


def load_correction(path: Path | str, model: Path | str) -> Correction:
    """Read ``correction.json`` and check that it belongs to ``model``, the quantized ONNX file (of
    an engine: the one that it was built from).

    Raises UsageError for a missing file, ModelError for a damaged one or another model's.
    """
    return read_correction(Path(path)).require_model(Path(model))


def read_correction(path: Path) -> Correction:
    """Read ``correction.json`` without asking whose it is; raises as ``load_correction``."""
    if not path.exists():
        raise UsageError(
            f"There is no correction {path}.", "Set evaluate.correction: ptqd, and build."
        )
    values = read_json(path, error=ModelError, hint="Create it again.")
    version = values.get("format") if isinstance(values, dict) else None
    if version != FORMAT:
        raise ModelError(
            f"{path} is of format {version!r}; this version reads {FORMAT}.",
            "Create it again with this version, or use the version that made it.",
        )
    try:
        return Correction.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ModelError(
            f"{path} is damaged: {where}: {first['msg']}.".replace(": :", ":"), "Create it again."
        ) from error
