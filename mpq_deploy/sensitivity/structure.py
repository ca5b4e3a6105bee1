"""MixDQ's measure of content: 1 - SSIM of the clean sample that the denoiser predicts, one layer and scheme at a time.

MixDQ (arXiv 2405.17873) quantizes one layer and compares the generated images, of a sampler of one step. Here
**[ours]** each calibration call is such a step: from its output follows the clean sample, latents where the model has
latents, each channel brought to [0, 1] by the float one's range. Only what a single call does is seen, as with all our
measures; no image is sampled or decoded.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import numpy as np

from mpq_deploy.calls.betas import alphas_cumprod
from mpq_deploy.errors import UsageError
from mpq_deploy.evaluate.images import ssim_each
from mpq_deploy.models.spec import Array, DenoiserSpec
from mpq_deploy.sensitivity.exhaustive import measure_singly
from mpq_deploy.sensitivity.subject import Subject

Losses = dict[str, dict[str, float]]


def measure_structure(subject: Subject, layers: Collection[str]) -> Losses:
    """Return 1 - SSIM by layer and scheme, mean over calls and timesteps: a forward pass (or less) for each."""
    calls, spec = subject.calls(), subject.spec
    if len(spec.sample.shape) != 3:
        raise UsageError(
            f"Samples of shape {list(spec.sample.shape)} are no images, so they have no SSIM.",
            "Set allocate.groups to none.",
        )
    clean = clean_sample(spec)

    def unlike(step_index: int, chunk: slice, reference: Array, output: Array) -> float:
        noisy = calls.feeds(step_index, chunk)[spec.sample.name]
        timestep = float(calls.timesteps[step_index])
        return float(np.sum(1 - ssim_each(*_scaled(clean(noisy, timestep, reference), clean(noisy, timestep, output)))))

    sums = measure_singly(subject, layers, unlike)
    return {
        layer: {scheme: max(float(np.mean(values)) / calls.count, 0.0) for scheme, values in row.items()}
        for layer, row in sums.items()
    }


def clean_sample(spec: DenoiserSpec) -> Callable[[Array, float, Array], Array]:
    """Return what makes of (noisy sample, timestep, output) the clean sample that the output predicts, float64.

    Of a learned variance only the mean counts. Raises UsageError for timesteps that the scheduler's betas do not have.
    """
    channels = spec.sample.shape[0]
    power = None if spec.prediction_type in ("sample", "flow_prediction") else alphas_cumprod(spec.scheduler)

    def clean(noisy: Array, timestep: float, output: Array) -> Array:
        x, out = np.asarray(noisy, np.float64), np.asarray(output, np.float64)[:, :channels]
        if spec.prediction_type == "sample":
            return out
        if power is None:
            return np.asarray(x - timestep / float(spec.scheduler.get("num_train_timesteps", 1000)) * out)
        if not 0 <= timestep <= len(power) - 1:
            raise UsageError(
                f"The scheduler's timestep {timestep:g} is none of the {len(power)} that its betas have.",
                "Set allocate.groups to none.",
            )
        signal2 = float(np.interp(timestep, np.arange(len(power)), power))
        signal, noise = np.sqrt(signal2), np.sqrt(1 - signal2)
        return np.asarray((x - noise * out) / signal if spec.prediction_type == "epsilon" else signal * x - noise * out)

    return clean


def _scaled(reference: Array, output: Array) -> tuple[Array, Array]:
    """Bring both to [0, 1] by the range of each channel of ``reference`` [N, C, H, W]."""
    low, high = (reduce(reference, axis=(2, 3), keepdims=True) for reduce in (np.min, np.max))
    width = np.where(high > low, high - low, 1.0)
    return (reference - low) / width, (output - low) / width
