"""Record the calls of a pipeline's denoiser, image by image, and what the pipeline returns.

In: the float model with the folder of its pipeline. Out: a set of calls, the float outputs on them,
and the images. Calls go to disk as they come.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mpq_deploy.calls.pipeline_lanes import Image, images_in_lanes
from mpq_deploy.calls.pipeline_runs import PipelineRuns, image_seed
from mpq_deploy.calls.recorded import CallSet
from mpq_deploy.calls.recorder import CallRecorder, recorded_grid
from mpq_deploy.calls.stand_in import Compute
from mpq_deploy.errors import ModelError
from mpq_deploy.models.spec import Array, DenoiserSpec, FloatModel, fill_to
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
    lanes: int = 1,
) -> PipelineRecord:
    """Make the images of ``runs`` with ``compute`` as the denoiser; record its calls in ``folder``.

    ``timesteps``: so many of each image's steps; all where there are fewer, and for None. ``lanes``: images
    at once; their calls are recorded in the order of the images; those of several sizes are not
    returned. Raises ModelError for images of
    different sizes and outputs that are not finite.
    """
    pipeline, recorder = PipelineRuns(pipeline_folder(model), model.spec), CallRecorder(folder)
    into: list[CallRecorder | _Kept] = [recorder if lanes < 2 else _Kept() for _ in runs.numbers]
    images = []
    made = images_in_lanes(
        pipeline,
        (
            Image(number, image_seed(runs.seed, place), watch, watch.step)
            for place, (number, kept_in) in enumerate(zip(runs.numbers, into), runs.first)
            for watch in [_Watch(place, kept_in, model.spec, compute, outputs)]
        ),
        runs.steps,
        lanes,
    )
    with talk.bar(f"run {pipeline.short_name}", len(runs.numbers)) as advance:
        for calls_of, image in zip(into, made, strict=True):
            if isinstance(calls_of, _Kept):
                calls_of.move_to(recorder)
            images.append(image)
            advance(1)
    recorder.close()
    conditions = [item.name for item in model.spec.conditions]
    calls = recorded_grid(folder, timesteps, conditions)
    kept = np.empty(0, np.float32)
    if outputs:
        kept = np.stack(
            [calls.values(OUTPUT, step, slice(None)) for step in range(len(calls.timesteps))]
        )
        inputs = {name: given for name, given in calls.inputs.items() if name != OUTPUT}
        calls = replace(calls, inputs=inputs)
    made_of = np.empty(0, np.float32) if model.spec.sizes else joined_images(images)
    return PipelineRecord(calls, kept, made_of, pipeline.name)


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


class _Kept:
    """An image's calls, until those of the images before it are recorded."""

    def __init__(self) -> None:
        self._calls: list[tuple[int, int, float, dict[str, Array], Array, int | None]] = []
        self._known: dict[str, Array] = {}

    def add(
        self,
        run: int,
        step: int,
        timestep: float,
        feeds: dict[str, Array],
        output: Array,
        size: int | None = None,
    ) -> None:
        """Keep a call; what an input was given the call before is kept once."""
        for name, value in feeds.items():
            if name not in self._known or not np.array_equal(self._known[name], value):
                self._known[name] = np.array(value)
        self._calls.append((run, step, timestep, {n: self._known[n] for n in feeds}, output, size))

    def set_timestep(self, run: int, step: int, timestep: float) -> None:
        """Say the timestep of the calls at ``step``."""
        self._calls = [
            (run, at, timestep if at == step else former, feeds, output, size)
            for _, at, former, feeds, output, size in self._calls
        ]

    def move_to(self, recorder: CallRecorder) -> None:
        """Record the calls."""
        for call in self._calls:
            recorder.add(*call)
        self._calls.clear()


class _Watch:
    """Computes the denoiser for one image, and records what it is given between the scheduler's steps."""

    def __init__(
        self,
        run: int,
        recorder: CallRecorder | _Kept,
        spec: DenoiserSpec,
        compute: Compute,
        outputs: bool,
    ) -> None:
        self.recorder = recorder
        self._spec, self._compute, self._outputs = spec, compute, outputs
        self._run, self._step = run, 0
        self._steps_told = False
        self._last: float | None = None

    def step(self, timestep: float) -> None:
        """Take the calls so far as those of one step of the sampler."""
        self.recorder.set_timestep(self._run, self._step, timestep)
        self._step, self._steps_told = self._step + 1, True

    def __call__(self, feeds: dict[str, Array]) -> Array:
        """Return the denoiser's output. Raises ModelError when it is not finite."""
        output: Array = self._compute(feeds)
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
        given, size = {**feeds, **kept}, None
        if self._spec.sizes:
            size = self._spec.size_of(feeds[self._spec.sample.name])
            for item in self._spec.inputs:
                if item.sizes:
                    given[item.name] = fill_to(feeds[item.name], item.shape)
        self.recorder.add(self._run, self._step, timestep, given, output, size)
        return output

    def _timestep(self, feeds: dict[str, Array]) -> float:
        name = self._spec.timestep_name
        return float(np.ravel(feeds[name])[0]) if name else 0.0
