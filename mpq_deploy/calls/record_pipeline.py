"""Record the calls of a pipeline's denoiser, image by image, and what the pipeline returns.

In: the float model with the folder of its pipeline. Out: a set of calls, the float outputs on them,
and the images. Calls go to disk as they come.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mpq_deploy.calls.pipeline_runs import PipelineRuns, image_seed
from mpq_deploy.calls.recorded import CallSet
from mpq_deploy.calls.recorder import CallRecorder, recorded_grid
from mpq_deploy.calls.stand_in import Compute
from mpq_deploy.errors import ModelError
from mpq_deploy.models.spec import Array, DenoiserSpec, FloatModel
from mpq_deploy.system.progress import Talk

# The denoiser's output beside its inputs, where it is kept.
OUTPUT = "recorded output"


@dataclass(frozen=True)
class Runs:
    """Which images a pipeline makes: ``numbers`` of its calls, ``steps`` each, noise by ``seed``.

    ``first``: the place of the first image among those of the seed.
    """

    numbers: Sequence[int]
    steps: int
    seed: int
    first: int = 0


@dataclass(frozen=True)
class PipelineRecord:
    """``calls`` of K timesteps by N, ``outputs`` float32 [K, N, ...] (empty unless asked for), images."""

    calls: CallSet
    outputs: Array
    images: Array
    name: str


def record_pipeline(
    model: FloatModel,
    runs: Runs,
    timesteps: int | None,
    folder: Path,
    talk: Talk,
    compute: Compute,
    outputs: bool = False,
) -> PipelineRecord:
    """Make the images of ``runs`` with ``compute`` as the denoiser; record its calls in ``folder``.

    ``timesteps``: so many of each image's steps; all where there are fewer, and for None. Raises ModelError
    for images of different sizes and outputs that are not finite.
    """
    pipeline = PipelineRuns(pipeline_folder(model), model.spec)
    watch = _Watch(CallRecorder(folder), model.spec, compute, outputs)
    pipeline.compute = watch
    images = []
    with talk.bar(f"run {pipeline.short_name}", len(runs.numbers)) as advance:
        for place, number in enumerate(runs.numbers, runs.first):
            watch.begin(place)
            images.append(
                pipeline.image(number, runs.steps, image_seed(runs.seed, place), watch.step)
            )
            advance(1)
    watch.recorder.close()
    conditions = [item.name for item in model.spec.conditions]
    calls = recorded_grid(folder, timesteps, conditions)
    kept = np.empty(0, np.float32)
    if outputs:
        kept = np.stack(
            [calls.values(OUTPUT, step, slice(None)) for step in range(len(calls.timesteps))]
        )
        inputs = {name: given for name, given in calls.inputs.items() if name != OUTPUT}
        calls = replace(calls, inputs=inputs)
    return PipelineRecord(calls, kept, joined_images(images), pipeline.name)


def pipeline_folder(model: FloatModel) -> Path:
    """Return the folder of the model's pipeline. Raises ModelError where it is not known."""
    if model.pipeline is None:
        raise ModelError(
            f"The pipeline of {model.spec.name} is not here.", "Open the run with its model."
        )
    return model.pipeline


def joined_images(images: Sequence[Array]) -> Array:
    """Return what the runs gave, one after the other. Raises ModelError for different sizes."""
    shapes = {image.shape[1:] for image in images}
    if len(shapes) > 1:
        raise ModelError(
            f"The pipeline returns images of different sizes: {sorted(map(str, shapes))}.",
            "Give calls of one size (--call FILE.yaml: height and width).",
        )
    return np.concatenate(list(images))


class _Watch:
    """Computes the denoiser, and records what it is given between the scheduler's steps."""

    def __init__(
        self, recorder: CallRecorder, spec: DenoiserSpec, compute: Compute, outputs: bool
    ) -> None:
        self.recorder = recorder
        self._spec, self._compute, self._outputs = spec, compute, outputs
        self._run = self._step = 0
        self._steps_told = False
        self._last: float | None = None

    def begin(self, run: int) -> None:
        """Begin another image."""
        self._run, self._step, self._last, self._steps_told = run, 0, None, False

    def step(self, timestep: float) -> None:
        """Take the calls so far as those of one step of the sampler."""
        self.recorder.set_timestep(self._run, self._step, timestep)
        self._step, self._steps_told = self._step + 1, True

    def __call__(self, feeds: dict[str, Array]) -> Array:
        """Return the denoiser's output. Raises ModelError when it is not finite."""
        output = self._compute(feeds)
        timestep = self._timestep(feeds)
        if not np.isfinite(output).all():
            raise ModelError(
                f"The denoiser's output is not finite at timestep {timestep:g} of image {self._run + 1}.",
                "Check the model's weights, and its values against the range of FP16.",
            )
        # Without a scheduler's steps a new timestep begins one.
        if not self._steps_told and self._last is not None and timestep != self._last:
            self._step += 1
        self._last = timestep
        kept = {OUTPUT: np.asarray(output, np.float32)} if self._outputs else {}
        self.recorder.add(self._run, self._step, timestep, {**feeds, **kept}, output)
        return output

    def _timestep(self, feeds: dict[str, Array]) -> float:
        name = self._spec.timestep_name
        return float(np.ravel(feeds[name])[0]) if name else 0.0
