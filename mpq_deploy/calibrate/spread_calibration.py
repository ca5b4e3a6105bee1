"""Calibration spread over workers: trajectories by batch, observed activations by timestep.

Workers return the outputs of each batch. This process sums them, batch by batch in order, so that
the sums are bit for bit those of one process, for any number of workers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import onnxruntime as ort

from mpq_deploy.calibrate.activation_shapes import activation_shapes
from mpq_deploy.calibrate.kept_observation import KeptObservation
from mpq_deploy.calibrate.observers import Observation, ObservedGraph, Totals, draws_of
from mpq_deploy.calls.loop import GuidedDenoiser
from mpq_deploy.calls.recorded import CallSet, RecordedCalls, joined
from mpq_deploy.calls.sampler import Sampler, keeps_samples_apart, make_sampler
from mpq_deploy.calls.timesteps import kept_timesteps, sampled_steps
from mpq_deploy.calls.trajectories import record_trajectories
from mpq_deploy.evaluate.cache import model_files
from mpq_deploy.graph.layers import LayerGraph, layer_graph
from mpq_deploy.graph.load import load_model
from mpq_deploy.models.spec import Array, FloatModel
from mpq_deploy.recipe import CalibrateSettings, SamplerKind
from mpq_deploy.runtime.not_finite import CheckedDenoiser
from mpq_deploy.runtime.ort import OrtDenoiser
from mpq_deploy.system.parallel.job_files import Files
from mpq_deploy.system.parallel.work import Job, Pool, Result, Shard, Work, run_shards
from mpq_deploy.system.progress import Talk
from mpq_deploy.system.sessions import open_session


@dataclass(frozen=True)
class CalibrationSetup:
    """The float ONNX file (``source``), how to sample it, and what to record.

    In a worker the path of ``source`` is relative to the worker's root. ``watched``: activations
    that are observed beside the layers' inputs.
    """

    source: FloatModel
    settings: CalibrateSettings
    sampler: SamplerKind = "auto"
    watched: tuple[str, ...] = ()

    def calls(self, recorded: CallSet) -> RecordedCalls:
        """Return ``recorded`` as calls of the model."""
        return RecordedCalls(recorded, self.source.spec)

    def make_sampler(self) -> Sampler:
        """Return the sampler whose trajectories are recorded."""
        settings = self.settings
        return make_sampler(self.source.spec.scheduler, settings.steps, settings.seed, self.sampler)

    def denoiser(self, model: Path) -> GuidedDenoiser:
        """Return the float model in the file ``model``; its runs raise for NaN and Inf."""
        source = self.source
        denoiser = OrtDenoiser.in_lanes(model, source.spec)
        checked = CheckedDenoiser(model, denoiser)
        return GuidedDenoiser(checked, source.spec, source.conditions, lanes=denoiser.lanes)


@dataclass(frozen=True)
class _Record:
    """Record the trajectories ``start`` to ``stop``."""

    start: int
    stop: int


@dataclass(frozen=True)
class _Observe:
    """Observe ``recorded``: the ``calls`` int [N] at timestep index ``step`` alone."""

    step: int
    recorded: CallSet
    calls: Array


def calibration_job(setup: CalibrationSetup, scratch: Path | None) -> Job:
    """Return the job whose workers record and observe. ``scratch``: as for ``calibrate``."""
    model = setup.source.path
    files = Files.of([*model_files(model), *([scratch / "any"] if scratch else [])])
    below = scratch.resolve().relative_to(files.root) if scratch else None
    setup = replace(setup, source=replace(setup.source, path=files.below(model)))
    size = sum(file.stat().st_size for file in model_files(model))
    names = tuple(files.below(file).as_posix() for file in model_files(model))
    return Job("calibration", partial(_open, setup, below), files.root, names, 2 * size)


@dataclass(frozen=True)
class KeptCalls:
    """Earlier ``calls`` of the first ``samples`` trajectories: same seed, model, sampler, batches.

    ``observed``: the observation of some of these calls at the same timesteps; None: not valid.
    """

    calls: CallSet
    samples: int
    observed: KeptObservation | None = None


def with_kept_timesteps(setup: CalibrationSetup) -> CalibrationSetup:
    """Return ``setup`` with the number of timesteps to record (``kept_timesteps``).

    Raises UsageError for more timesteps than steps.
    """
    timestepped, steps = setup.source.spec.timestep is not None, len(setup.make_sampler().timesteps)
    wanted = setup.settings.timesteps
    # The check runs even where every call is kept and nothing is recorded.
    count = kept_timesteps(steps, len(sampled_steps(steps, wanted))) if timestepped else wanted
    return replace(setup, settings=setup.settings.replace(timesteps=count))


def recorded_after(
    kept: KeptCalls | None, setup: CalibrationSetup, record: Callable[[slice | None], CallSet]
) -> CallSet:
    """Return the calls of all trajectories: whole batches of ``kept``, the rest by ``record``."""
    first = kept_samples(kept, setup)
    if kept is None or not first:
        return record(None)
    each = kept.calls.count // kept.samples
    known = kept.calls.take(np.arange(first * each))
    count = setup.settings.samples
    return joined([known] if first == count else [known, record(slice(first, count))])


def kept_samples(kept: KeptCalls | None, setup: CalibrationSetup) -> int:
    """Return how many of the kept trajectories can be reused.

    Only whole batches are: kernels may round differently in a batch of another size.
    """
    size, count = setup.settings.batch_size, setup.settings.samples
    if kept is None:
        return 0
    if setup.source.spec.pipeline is not None:
        # A pipeline runs image by image, and images differ in their number of calls.
        return kept.samples if kept.samples <= count else 0
    if not keeps_samples_apart(setup.make_sampler()):
        return 0
    return count if kept.samples == count else min(kept.samples, count) // size * size


def kept_observed(kept: KeptCalls | None, setup: CalibrationSetup) -> KeptObservation | None:
    """Return the kept observation where all of its calls are reused; else None."""
    first = kept_samples(kept, setup)
    if kept is None or kept.observed is None or not first:
        return None
    each = kept.calls.count // kept.samples
    count = kept.calls.count if first == kept.samples else first * each
    return kept.observed if kept.observed.calls.max() < count else None


def record_in_shards(
    pool: Pool, setup: CalibrationSetup, talk: Talk, kept: KeptCalls | None = None
) -> CallSet:
    """Record as ``record_trajectories`` does; a shard per batch where samples are independent."""
    sampler = setup.make_sampler()
    if not keeps_samples_apart(sampler):
        return record_trajectories(setup.denoiser(setup.source.path), sampler, setup.settings, talk)
    size, count = setup.settings.batch_size, setup.settings.samples

    def record(part: slice | None) -> CallSet:
        starts = range(part.start if part else 0, count, size)
        tasks = [_Record(start, min(start + size, count)) for start in starts]
        shards = [
            Shard(f"trajectories {t.start} to {t.stop - 1}", t, len(sampler.timesteps))
            for t in tasks
        ]
        parts = run_shards(pool, "record trajectories", shards, talk)
        return joined([CallSet.of_arrays(part) for part in parts])

    return recorded_after(kept, setup, record)


@dataclass(frozen=True)
class ObservingInShards:
    """Observes calls as ``observe`` does, one shard per timestep."""

    pool: Pool
    graph: LayerGraph
    calls: RecordedCalls
    settings: CalibrateSettings
    talk: Talk
    scratch: Path | None

    @cached_property
    def _observed(self) -> ObservedGraph:
        shapes = activation_shapes(self.graph, self.calls, self.talk, self.scratch)
        return ObservedGraph.of(self.graph, shapes)

    def observe(self, which: Array) -> Observation:
        """Observe the calls ``which``. Raises as ``observe`` does."""
        recorded, size = self.calls.recorded, self.settings.batch_size
        total = Totals(self.graph, self._observed, len(recorded.timesteps), self.settings)
        shards = [
            Shard(
                f"timestep {timestep:g}",
                _Observe(step, recorded.take(which).at(np.array([step])).compact(), which),
                len(which),
            )
            for step, timestep in enumerate(recorded.timesteps)
        ]
        results = run_shards(self.pool, "observe activations", shards, self.talk)
        for step, result in enumerate(results):
            for number, batch in enumerate(self.calls.batches(size, range(step, step + 1), which)):
                outputs = [result[_name(number, n)] for n in range(len(self._observed.outputs))]
                total.add(batch, outputs, *draws_of(self.settings, batch))
        return total.finish()


def _name(batch: int, output: int) -> str:
    return f"{batch}.{output}"


def _open(setup: CalibrationSetup, scratch: Path | None, root: Path, talk: Talk) -> Work:
    worker = _Calibrating(setup, root, None if scratch is None else root / scratch)

    def work(task: _Record | _Observe, inner: Talk) -> Result:
        return (
            worker.record(task, inner) if isinstance(task, _Record) else worker.observe(task, inner)
        )

    return work


class _Calibrating:
    """A worker with the float model open: plain for recording, with observers for observing."""

    def __init__(self, setup: CalibrationSetup, root: Path, scratch: Path | None) -> None:
        self._setup, self._model, self._scratch = setup, root / setup.source.path, scratch
        self._denoiser: GuidedDenoiser | None = None
        self._observing: tuple[ObservedGraph, ort.InferenceSession] | None = None

    def record(self, task: _Record, talk: Talk) -> Result:
        """Return the recorded calls as arrays."""
        setup = self._setup
        if self._denoiser is None:
            self._denoiser = setup.denoiser(self._model)
        part = slice(task.start, task.stop)
        recorded = record_trajectories(
            self._denoiser, setup.make_sampler(), setup.settings, talk, part
        )
        return recorded.arrays()

    def observe(self, task: _Observe, talk: Talk) -> Result:
        """Return the observers' outputs for every batch of the timestep, as "batch.output"."""
        setup = self._setup
        self._denoiser = None
        observed, session = self._session(task.recorded, talk)
        outputs = {}
        parts = setup.calls(task.recorded).batches(setup.settings.batch_size)
        with talk.bar("observe", task.recorded.count) as advance:
            for number, batch in enumerate(parts):
                named = replace(batch, step=task.step, calls=task.calls[batch.calls])
                _, draws = draws_of(setup.settings, named)
                for place, array in enumerate(observed.run(session, batch.feed, draws)):
                    outputs[_name(number, place)] = array
                advance(len(batch.calls))
        return outputs

    def _session(self, recorded: CallSet, talk: Talk) -> tuple[ObservedGraph, ort.InferenceSession]:
        if self._observing is None:
            self._observing = self._opened(recorded, talk)
        return self._observing

    def _opened(self, recorded: CallSet, talk: Talk) -> tuple[ObservedGraph, ort.InferenceSession]:
        setup = self._setup
        graph = replace(layer_graph(load_model(self._model)), watched=setup.watched)
        if self._scratch is not None:
            self._scratch.mkdir(exist_ok=True)
        shapes = activation_shapes(graph, setup.calls(recorded), talk, self._scratch)
        observed = ObservedGraph.of(graph, shapes)
        with open_session(observed.model, talk, scratch=self._scratch) as session:
            return observed, session
