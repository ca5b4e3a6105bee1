"""Propagation gain times local error: losses from forward passes in ONNX Runtime alone.

g_{l,t} is the relative squared change of the denoiser's output, divided by eps^2, when the layer's
output Y becomes Y + eps rms(Y) xi with xi ~ N(0, I). The loss of scheme s is the mean over
timesteps of g_{l,t} e_{l,s,t}, with the relative local error e (``local_error``). The metric
assumes that the local error propagates like white noise. INT8 activations of layers whose input is
shared or a time embedding violate that: their loss can be several times too low. The number of
forward passes per layer does not depend on the number of schemes.
"""

from __future__ import annotations

import numpy as np

from mpq_deploy.errors import ModelError
from mpq_deploy.graph.layers import Layer
from mpq_deploy.models.spec import Array
from mpq_deploy.sensitivity.local_error import LocalErrors, local_errors
from mpq_deploy.sensitivity.measured_calls import Calls
from mpq_deploy.sensitivity.ort_graph import noisy_graph
from mpq_deploy.sensitivity.subject import Subject
from mpq_deploy.sensitivity.table import SensitivityTable, table_from_losses

# Relative size of the noise.
NOISE = 0.05
# Calls per timestep. Few are enough: the noise averages over all elements of a layer's output.
GAIN_SAMPLES = 4


def measure_gain(subject: Subject) -> SensitivityTable:
    """Return the table of all schemes of all layers: propagation gain times local error."""
    calls = subject.calls()
    local = local_errors(subject, calls)
    samples = min(calls.count, max(GAIN_SAMPLES, calls.fixed_batch or 1))
    gains = propagation_gains(subject, local, subject.calls(samples))
    losses = {
        name: {scheme: gains[name] * error for scheme, error in row.items()}
        for name, row in local.relative.items()
    }
    return table_from_losses("gain", calls.timesteps, losses)


def propagation_gains(subject: Subject, local: LocalErrors, calls: Calls) -> dict[str, Array]:
    """Return layer -> gain g at each timestep, float64 [K].

    Raises ModelError when the float output holds NaN or Inf.
    """
    layers, seed, steps = subject.layers, subject.settings.seed, len(calls.timesteps)
    changed = {layer.name: np.zeros(steps) for layer in layers}
    power = np.zeros(steps)
    ranks = {name: len(shape) for name, shape in local.shapes.items()}
    with (
        noisy_graph(subject.graph, layers, calls.spec.output, ranks, subject.talk) as session,
        subject.talk.bar("gains", steps * calls.count) as advance,
    ):
        for step_index, chunk in calls.chunks(subject.batch_size(calls)):
            feeds = calls.feeds(step_index, chunk)
            reference = session.run(feeds)
            if not np.isfinite(reference).all():
                raise ModelError(
                    f"The float model's output holds NaN or Inf at timestep {calls.timesteps[step_index]:g}.",
                    "Check the model's weights and the calibration inputs.",
                )
            power[step_index] += float(np.sum(np.square(reference, dtype=np.float64)))
            batches = (chunk.stop - chunk.start) // (calls.fixed_batch or 1)
            for number, layer in enumerate(layers):
                random = np.random.default_rng((seed, step_index, chunk.start, number))
                noise = _noise(layer, local, step_index, batches, random)
                change = session.run(feeds, noise) - reference
                changed[layer.name][step_index] += float(
                    np.sum(np.square(change, dtype=np.float64))
                )
            advance(chunk.stop - chunk.start)
    safe = np.where(power > 0, power, 1.0)
    return {name: total / safe / NOISE**2 for name, total in changed.items()}


def _noise(
    layer: Layer, local: LocalErrors, step_index: int, batches: int, random: np.random.Generator
) -> dict[str, Array]:
    """Draw noise for every output of the layer, in its shape for ``batches`` calls."""
    noise = {}
    for use in layer.uses:
        rms = np.sqrt(local.mean_square[use.output][step_index])
        shape = local.shape(use.output, batches)
        noise[use.output] = random.standard_normal(shape, np.float32) * np.float32(NOISE * rms)
    return noise
