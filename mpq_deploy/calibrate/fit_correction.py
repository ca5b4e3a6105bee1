"""Fit PTQD's correction (arXiv 2305.10657) of the quantized model's output, by timestep.

In: both models and recorded calls. Out: a ``Correction``. Only sums per call, channel and timestep
are kept, so memory does not grow with the image size.

Paper: the error is regressed on the float output, with slope k_t, bias b_t and residual variance.
The authors' code: one regression over all channels with one intercept; b_t per channel is the mean
of the whole error; negative k_t become 0. Ours: k_t (of either sign) and the b_t of all channels
are fitted together by least squares. The fit of a timestep is applied only where it lowers the
error of held-out calls by more than one standard error. The same held-out errors are reported, so
the reported gain is slightly optimistic.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mpq_deploy.calls.recorded import RecordedCalls
from mpq_deploy.errors import ModelError, UsageError
from mpq_deploy.models.spec import Array
from mpq_deploy.runtime.correction import LEAST_GAIN, BiasPer, Correction, CorrectionStep
from mpq_deploy.runtime.ort import OrtDenoiser
from mpq_deploy.system.progress import Talk

# Folds of cross-validation over the calls. Our choice.
FOLDS = 8
# Held-out error must fall by this many standard errors of its mean over calls. Our choice.
STANDARD_ERRORS = 1.0
SUMS = ("m", "d", "mm", "md", "dd")


@dataclass(frozen=True)
class CallMoments:
    """Sums over positions (pixels) of the float output m, the error d and their products.

    ``m``, ``d``, ``mm``, ``md``, ``dd``: float64 [K, N, C] for K timesteps, N calls, C channels.
    ``timesteps`` float64 [K]; ``positions``: how many values a sum has.
    """

    timesteps: Array
    positions: int
    m: Array
    d: Array
    mm: Array
    md: Array
    dd: Array

    @classmethod
    def of(cls, timesteps: Array, reference: Array, output: Array) -> CallMoments:
        """Sum over positions of the float and the quantized outputs, both [K, N, C, ...]."""
        m = np.asarray(reference, np.float64).reshape(*reference.shape[:3], -1)
        d = np.asarray(output, np.float64).reshape(m.shape) - m
        sums = (values.sum(axis=-1) for values in (m, d, m * m, m * d, d * d))
        return cls(np.asarray(timesteps, np.float64), m.shape[-1], *sums)

    def at(self, index: int) -> CallMoments:
        """Return the moments of one timestep, float64 [N, C]."""
        return CallMoments(
            self.timesteps[index], self.positions, *(getattr(self, name)[index] for name in SUMS)
        )

    def fit(self, calls: Array, bias_per: BiasPer) -> tuple[float, Array]:
        """Return the least-squares k and b [C or 1] of d = k m + b over ``calls``, a mask [N]."""
        sums = [getattr(self, name)[calls].sum(axis=0) for name in ("m", "d", "mm", "md")]
        count = float(self.positions * np.count_nonzero(calls))
        if bias_per == "scalar":
            count *= len(sums[0])
            sums = [values.sum(keepdims=True) for values in sums]
        m, d, mm, md = sums
        spread = float(np.sum(mm - m * m / count))
        slope = float(np.sum(md - m * d / count)) / spread if spread > 0 else 0.0
        return slope, (d - slope * m) / count

    def errors(self, slope: float, bias: Array) -> Array:
        """Return the squared error of each corrected call [N]: sum of (d - k m - b)^2 / (1+k)^2."""
        squares = self.dd - 2 * slope * self.md + slope**2 * self.mm
        crosses = 2 * bias * (slope * self.m - self.d) + self.positions * bias**2
        return np.asarray(np.maximum((squares + crosses).sum(axis=1), 0.0) / (1 + slope) ** 2)


def call_moments(
    float_model: Path,
    quantized: Path,
    calls: RecordedCalls,
    batch_size: int,
    talk: Talk,
) -> CallMoments:
    """Run both models on the recorded calls; return the sums, without learned-variance channels.

    Raises ModelError, with the timestep, for an output that is not finite.
    """
    recorded, spec = calls.recorded, calls.spec
    models = (OrtDenoiser(float_model, spec), OrtDenoiser(quantized, spec, fake_quant_only=True))
    channels = spec.sample.shape[0]
    parts: list[list[CallMoments]] = [[] for _ in recorded.timesteps]
    with talk.bar("float and quantized outputs of the calibration calls", len(parts)) as advance:
        done = 0
        for batch in calls.batches(batch_size):
            feed = batch.feed
            outputs = [_finite(model, feed, batch.timestep)[:, :channels] for model in models]
            parts[batch.step].append(
                CallMoments.of(np.array([batch.timestep]), outputs[0][None], outputs[1][None])
            )
            advance(batch.step - done)
            done = batch.step
        advance(len(parts) - done)
    return _joined(recorded.timesteps, parts)


def _finite(model: OrtDenoiser, feed: dict[str, Array], timestep: float) -> Array:
    output = model.run(feed)
    if not np.isfinite(output).all():
        raise ModelError(
            f"An output on the calibration calls is not finite at timestep {timestep:g}."
        )
    return output


def _joined(timesteps: Array, parts: list[list[CallMoments]]) -> CallMoments:
    sums = {
        name: np.concatenate(
            [np.concatenate([getattr(part, name) for part in step], axis=1) for step in parts]
        )
        for name in SUMS
    }
    return CallMoments(np.asarray(timesteps, np.float64), parts[0][0].positions, **sums)


def fit_correction(
    moments: CallMoments,
    models: Mapping[str, str],
    prediction_type: str,
    bias_per: BiasPer = "channel",
    unseen_by_rounding: bool = True,
) -> Correction:
    """Fit and check every timestep. ``models``: digests of the quantized files, by name.

    Raises UsageError for fewer than two calls, of which none can be held out.
    """
    calls, channels = moments.m.shape[1:]
    if calls < 2:
        raise UsageError(
            f"PTQD's correction cannot be fitted on only {calls} call.",
            "Calibrate on more samples (calibrate.samples).",
        )
    folds = min(FOLDS, calls)
    order = np.argsort(moments.timesteps)
    steps = tuple(_fit_step(moments.at(int(index)), bias_per, folds) for index in order)
    return Correction(
        models=dict(models),
        prediction_type=prediction_type,
        channels=channels,
        bias_per=bias_per,
        steps=steps,
        calls=calls,
        folds=folds,
        unseen_by_rounding=unseen_by_rounding,
    )


def _fit_step(step: CallMoments, bias_per: BiasPer, folds: int) -> CorrectionStep:
    before = step.dd.sum(axis=1)
    fold = np.arange(len(before)) % folds
    after = np.empty_like(before)
    slopes = []
    for number in range(folds):
        slope, bias = step.fit(fold != number, bias_per)
        slopes.append(slope)
        after[fold == number] = step.errors(slope, bias)[fold == number]
    slope, bias = step.fit(np.ones(len(before), bool), bias_per)
    note = _refusal(before - after, [*slopes, slope])
    energy = float(step.mm.sum())
    elements = step.positions * step.m.size
    # Held-out errors: the residual of a fit to the same calls would be too small.
    residual = float(before.sum() if note else after.sum() * (1 + slope) ** 2) / elements
    return CorrectionStep(
        timestep=float(step.timesteps),
        slope=0.0 if note else slope,
        bias=(0.0,) * len(bias) if note else tuple(float(value) for value in bias),
        residual_variance=residual,
        applied=not note,
        heldout_nmse_before=_ratio(float(before.sum()), energy),
        heldout_nmse_fitted=_ratio(float(after.sum()), energy),
        note=note,
    )


def _refusal(gains: Array, slopes: list[float]) -> str:
    """Return why a fit is not applied, or "". ``gains`` [N]: decrease of each held-out error."""
    if min(slopes) <= LEAST_GAIN - 1:
        return f"not applied: a slope of {min(slopes):.2f} is not a small error"
    needed = STANDARD_ERRORS * float(np.std(gains, ddof=1)) / len(gains) ** 0.5
    if float(gains.mean()) <= needed:
        return (
            "not applied: the error of held-out calls does not fall by more than its standard error"
        )
    return ""


def _ratio(error: float, energy: float) -> float:
    if energy <= 0:
        raise ModelError(
            "The float model's output is zero everywhere, so it has no relative error."
        )
    return error / energy
