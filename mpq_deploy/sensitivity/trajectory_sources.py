"""Float trajectories of the model: by our own sampling loop, or by the pipeline that calls it.

In: what is measured, which trajectories, and what computes the model. Out: their images as functions
of the model's outputs, and the model's calls on the way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from mpq_deploy.calls.loop import first_samples, guided
from mpq_deploy.calls.pipeline_runs import PipelineRuns, image_seed
from mpq_deploy.calls.pipeline_tape import PipelineTape
from mpq_deploy.calls.recorded import CallSet, InputCalls, RecordedCalls
from mpq_deploy.calls.sampler import make_sampler
from mpq_deploy.calls.sampler_tape import NoTrajectory, Tape, sampler_tape
from mpq_deploy.calls.trajectories import cycled_rows
from mpq_deploy.models.spec import Array, DenoiserSpec
from mpq_deploy.sensitivity.subject import Subject

# Calls of one timestep -> the float model's output, [M, ...].
Output = Callable[[RecordedCalls], Array]


@dataclass(frozen=True)
class Trajectories:
    """N trajectories: ``image`` [N, ...] and its ``tape``; ``calls`` gives the M rows of each call.

    Row r of a call is one of trajectory r % N.
    """

    image: Any
    tape: Tape
    calls: Callable[[int], RecordedCalls]


class TrajectorySource:
    """Makes the trajectories of ``subject``; loads the pipeline that makes them once.

    Raises NoTrajectory where the calls come from no sampler that is known here.
    """

    def __init__(self, subject: Subject) -> None:
        spec, sampling = subject.spec, subject.sampling
        if spec.timestep is None:
            raise NoTrajectory("the part is called once, and has no trajectory")
        if sampling is None or spec.recorded:
            raise NoTrajectory("the model's calls are not made by a sampler that is known here")
        if not sampling.alone:
            raise NoTrajectory("the parts of a pipeline are weighed by the errors of their outputs")
        if spec.pipeline is not None and sampling.pipeline is None:
            raise NoTrajectory("the pipeline that calls the model is not here")
        self._spec, self._seed, self._sampling = spec, subject.settings.seed, sampling
        self._count = subject.calls().count
        self._runs: PipelineRuns | None = None

    @property
    def by_pipeline(self) -> bool:
        """Whether a pipeline makes the trajectories, one at a time, and not our own loop."""
        return self._spec.pipeline is not None

    def made(self, part: slice, output: Output) -> Trajectories:
        """Return the trajectories ``part``. Raises NoTrajectory as tapes do."""
        return (self._by_pipeline if self.by_pipeline else self._by_sampler)(part, output)

    def _by_sampler(self, part: slice, output: Output) -> Trajectories:
        """Sample by our own loop; the images are those that evaluation compares."""
        spec, seed, sampling = self._spec, self._seed, self._sampling
        conditions = dict(sampling.conditions)
        rows = cycled_rows(spec, conditions, part.stop, seed)[part]
        noise = first_samples(spec, np.zeros(part.stop, np.int64), conditions, seed)[part]
        if guided(spec):
            rows = np.concatenate([np.full_like(rows, spec.uncond_row), rows])
        # Trajectories of different shards must get different noise from a stochastic sampler.
        sampler: Any = make_sampler(
            spec.scheduler, sampling.steps, seed + part.start, sampling.kind
        )
        samples: list[Array] = []

        def calls(step: int) -> RecordedCalls:
            """Return the model's calls at a step as if they had been recorded."""
            timestep = np.asarray(sampler.timesteps[step : step + 1], np.float32)
            made = CallSet.of_samples(spec, samples[step][None], timestep, rows, conditions)
            return RecordedCalls(made, spec)

        def model(step: int, given: Array) -> Array:
            samples.append(given)
            return output(calls(step))

        tape = sampler_tape(spec, sampler, noise, model)
        return Trajectories(to_image(tape.final, spec), tape, calls)

    def _by_pipeline(self, part: slice, output: Output) -> Trajectories:
        """Run the pipeline for one image, with what it is called with for it."""
        spec, sampling = self._spec, self._sampling
        assert spec.pipeline is not None and sampling.pipeline is not None
        if self._runs is None:
            self._runs = PipelineRuns(sampling.pipeline, spec)

        def calls_of(feeds: dict[str, Array]) -> RecordedCalls:
            index = np.arange(len(feeds[spec.sample.name]))
            inputs = {name: InputCalls(values, index[None]) for name, values in feeds.items()}
            return RecordedCalls(CallSet(np.zeros(1, np.float32), index, inputs), spec)

        place, known = part.start, len(spec.pipeline.calls)
        # Spread over the pipeline's calls, in turn where there are fewer.
        number = place * known // self._count if known > self._count else place
        seed = image_seed(self._seed, place)
        made = PipelineTape.of(
            self._runs, number, sampling.steps, seed, lambda feeds: output(calls_of(feeds))
        )
        return Trajectories(made.tape.final, made.tape, lambda call: calls_of(made.feeds[call]))


def to_image(final: Any, spec: DenoiserSpec) -> Any:
    """Return final samples (a tensor) as evaluation compares them.

    Pixels are clipped and mapped to [0, 1]; latents stay as they are.
    """
    if spec.pixel_range is None:
        return final
    low, high = spec.pixel_range
    return ((final - low) / (high - low)).clip(0, 1)
