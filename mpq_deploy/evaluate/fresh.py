"""The float model on fresh trajectories, and a quantized graph's error there, per image.

In: the float ONNX file with its description and conditions. Out: the squared error of a graph's
output relative to the float model's, for every image: their mean is the measured NMSE, their spread
its standard error.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from mpq_deploy.calls.loop import GuidedDenoiser
from mpq_deploy.calls.recorded import CallSet, RecordedCalls
from mpq_deploy.calls.sampler import make_sampler
from mpq_deploy.calls.trajectories import record_trajectories
from mpq_deploy.evaluate.cache import SampleCache
from mpq_deploy.evaluate.evaluate import reference_key
from mpq_deploy.evaluate.recorded_outputs import kept_calls
from mpq_deploy.evaluate.setup import Setup, spread_rows
from mpq_deploy.models.spec import Array, FloatModel
from mpq_deploy.recipe import CalibrateSettings, EvaluateSettings
from mpq_deploy.runtime.ort import OrtDenoiser
from mpq_deploy.system.lanes import in_lanes
from mpq_deploy.system.progress import Talk


class FreshCalls:
    """The float model's calls at every step of fresh trajectories, and its outputs."""

    def __init__(
        self,
        model: FloatModel,
        settings: EvaluateSettings,
        talk: Talk,
        cache: Path | None = None,
    ) -> None:
        """``cache``: a folder in which the calls are kept by what they depend on. Of several sizes the first."""
        model = model.at_size(0)
        self._spec, self._batch_size = model.spec, settings.batch_size
        key = {**reference_key(Setup.of(model, settings, talk), model.path), "part": "fresh"}
        kept = SampleCache(cache, talk).get(key, lambda: self._made(model, settings, talk))
        self.inputs = CallSet.of_arrays(kept)
        self._outputs = kept["float"]
        self._power = np.array([np.square(output).sum() / len(output) for output in self._outputs])

    def _made(self, model: FloatModel, settings: EvaluateSettings, talk: Talk) -> dict[str, Array]:
        """Return the calls, and the outputs of all of them as ``float`` [K, N, ...]."""
        spec = model.spec
        denoiser = OrtDenoiser.in_lanes(model.path, spec)
        inputs = (
            kept_calls(model, None, settings.samples)
            if spec.recorded
            else _of_sampler(model, denoiser, settings, talk)
            if spec.pipeline is None
            else _of_pipeline(model, denoiser, settings, talk)
        )
        outputs = [self._run(denoiser, inputs, step) for step in range(len(inputs.timesteps))]
        return {**inputs.arrays(), "float": np.stack(outputs)}

    def errors(self, model: Path) -> Array:
        """Return each call's squared error over the timestep's mean output, averaged, float64 [N].

        ``model`` is a quantized graph of FP32 arithmetic. The mean of the result is the NMSE.
        """
        denoiser = OrtDenoiser.in_lanes(model, self._spec, fake_quant_only=True)
        squares = []
        for step, expected in enumerate(self._outputs):
            error = np.square(
                (self._run(denoiser, self.inputs, step) - expected).astype(np.float64)
            )
            squares.append(error.reshape(len(error), -1).sum(axis=1) / self._power[step])
        return np.asarray(np.mean(squares, axis=0))

    def _run(self, denoiser: OrtDenoiser, inputs: CallSet, step: int) -> Array:
        calls = RecordedCalls(inputs, self._spec)
        batches = calls.batches(self._batch_size, range(step, step + 1))
        feeds = (batch.feed for batch in batches)
        return np.concatenate(list(in_lanes(denoiser.run, feeds, denoiser.lanes)))


def _of_sampler(
    model: FloatModel, denoiser: OrtDenoiser, settings: EvaluateSettings, talk: Talk
) -> CallSet:
    """Return the calls of our own sampler at every step."""
    spec = model.spec
    sampler = make_sampler(spec.scheduler, settings.steps, settings.seed, settings.sampler)
    recorded = CalibrateSettings(
        timesteps=len(sampler.timesteps),
        steps=settings.steps,
        samples=settings.samples,
        batch_size=settings.batch_size,
        seed=settings.seed,
    )
    guided = GuidedDenoiser(denoiser, spec, model.conditions, lanes=denoiser.lanes)
    return record_trajectories(guided, sampler, recorded, talk)


def _of_pipeline(
    model: FloatModel, denoiser: OrtDenoiser, settings: EvaluateSettings, talk: Talk
) -> CallSet:
    """Return the calls of the model's own pipeline at every step."""
    from mpq_deploy.calls.record_pipeline import Runs, record_pipeline

    assert model.spec.pipeline is not None
    numbers = spread_rows(len(model.spec.pipeline.calls), settings.samples)
    runs = Runs([int(one) for one in numbers], settings.steps, settings.seed)
    with tempfile.TemporaryDirectory() as folder:
        made = record_pipeline(
            model, runs, None, Path(folder), talk, denoiser.run, lanes=denoiser.lanes
        )
        return made.calls.compact()


def standard_error(values: Array) -> float:
    """Return the standard error of the mean of ``values`` [N]; 0 for a single one."""
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0
