"""A model whose calls somebody's script recorded: its outputs on the calls kept for comparison."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mpq_deploy.calls.recorded import CallSet, RecordedCalls
from mpq_deploy.calls.script_calls import ScriptCalls
from mpq_deploy.errors import ModelError
from mpq_deploy.evaluate.images import as_maps
from mpq_deploy.evaluate.setup import Part, Setup, finite_output, in_turn
from mpq_deploy.models.spec import Array, FloatModel
from mpq_deploy.runtime.ort import OrtDenoiser


def kept_calls(model: FloatModel, timesteps: int | None, samples: int) -> CallSet:
    """Return the calls to compare on, at most ``samples`` at each of ``timesteps`` (None: all).

    Raises ModelError where the folder is not known.
    """
    if model.calls is None:
        raise ModelError(
            f"The recorded calls of {model.spec.name} are not here.", "Give their folder: --calls."
        )
    calls = ScriptCalls.open(model.calls).parts(timesteps)[1]
    return calls.take(np.arange(min(samples, calls.count)))


def recorded_reference(setup: Setup, denoiser: OrtDenoiser) -> dict[str, Array]:
    """Run the float model on the calls that are compared on."""
    settings = setup.settings
    model = setup.float_model(Path())
    calls = kept_calls(model, settings.timesteps, settings.samples)
    steps = range(len(calls.timesteps))
    outputs = np.stack([outputs_at(setup, denoiser, calls, step, "float") for step in steps])
    return {
        "images": as_maps(outputs[-1]),
        **in_turn(calls, outputs, settings.calls, np.arange(calls.count)),
        "sampler": np.array("recorded calls"),
    }


def recorded_images(setup: Setup, part: Part, denoiser: OrtDenoiser) -> Array:
    """Return a variant's outputs on the compared calls of the last timestep."""
    model = setup.float_model(Path())
    calls = kept_calls(model, setup.settings.timesteps, setup.settings.samples)
    return as_maps(outputs_at(setup, denoiser, calls, len(calls.timesteps) - 1, part.name))


def outputs_at(setup: Setup, denoiser: OrtDenoiser, calls: CallSet, step: int, name: str) -> Array:
    """Return the outputs of all calls of a timestep, float32 [N, ...]."""
    batches = RecordedCalls(calls, setup.spec).batches(
        setup.settings.batch_size, range(step, step + 1)
    )
    return np.concatenate(
        [finite_output(denoiser.run(batch.feed), name, batch.timestep) for batch in batches]
    )
