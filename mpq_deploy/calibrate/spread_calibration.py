"""Calibration spread over workers: trajectories by batch, observed activations by timestep.

Workers return what a batch gave, not sums of it; the sums are taken here, batch by batch in order.
So they are those of one process to the bit, whatever number of workers there is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime as ort

from mpq_deploy.calibrate.activation_shapes import activation_shapes
from mpq_deploy.calibrate.observers import Observation, ObservedGraph, Totals, draws_of
from mpq_deploy.calls.loop import GuidedDenoiser
from mpq_deploy.calls.recorded import CallSet, RecordedCalls, joined
from mpq_deploy.calls.sampler import Sampler, keeps_samples_apart, make_sampler
from mpq_deploy.calls.trajectories import record_trajectories
from mpq_deploy.evaluate.cache import model_files
from mpq_deploy.graph.layers import LayerGraph, layer_graph
from mpq_deploy.graph.load import load_model
from mpq_deploy.models.spec import FloatModel
from mpq_deploy.recipe import CalibrateSettings, SamplerKind
from mpq_deploy.runtime.not_finite import CheckedDenoiser
from mpq_deploy.runtime.ort import OrtDenoiser
from mpq_deploy.system.parallel.job_files import Files
from mpq_deploy.system.parallel.work import Job, Pool, Result, Shard, Work, run_shards
from mpq_deploy.system.progress import Talk
from mpq_deploy.system.sessions import open_session


@dataclass(frozen=True)
class CalibrationSetup:
    """The float ONNX file, how to call it, and what is recorded of it.

    Workers have the path below their root. ``watched``: activations that are observed beside those
    of layers.
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
        """Return the float model in the file ``model``; it refuses outputs that are not finite."""
        source = self.source
        denoiser = OrtDenoiser.in_lanes(model, source.spec)
        checked = CheckedDenoiser(model, denoiser)
        return GuidedDenoiser(checked, source.spec, source.conditions, lanes=denoiser.lanes)


@dataclass(frozen=True)
class _Record:
    """Samples ``start`` to ``stop`` of the trajectories."""

    start: int
    stop: int


@dataclass(frozen=True)
class _Observe:
    """Position ``step`` of the recorded timesteps; ``recorded`` holds it alone."""

    step: int
    recorded: CallSet


def calibration_job(setup: CalibrationSetup, scratch: Path | None) -> Job:
    """Return the job of both parts. ``scratch``: as for ``calibrate``."""
    model = setup.source.path
    files = Files.of([*model_files(model), *([scratch / "any"] if scratch else [])])
    below = scratch.resolve().relative_to(files.root) if scratch else None
    setup = replace(setup, source=replace(setup.source, path=files.below(model)))
    size = sum(file.stat().st_size for file in model_files(model))
    names = tuple(files.below(file).as_posix() for file in model_files(model))
    return Job("calibration", partial(_open, setup, below), files.root, names, 2 * size)


def record_in_shards(pool: Pool, setup: CalibrationSetup, talk: Talk) -> CallSet:
    """Record like ``record_trajectories``, batch by batch where samples are independent."""
    sampler = setup.make_sampler()
    if not keeps_samples_apart(sampler):
        return record_trajectories(setup.denoiser(setup.source.path), sampler, setup.settings, talk)
    size, count = setup.settings.batch_size, setup.settings.samples
    tasks = [_Record(start, min(start + size, count)) for start in range(0, count, size)]
    shards = [
        Shard(f"trajectories {t.start} to {t.stop - 1}", t, len(sampler.timesteps)) for t in tasks
    ]
    parts = run_shards(pool, "record trajectories", shards, talk)
    return joined([CallSet.of_arrays(part) for part in parts])


def observe_in_shards(
    pool: Pool,
    graph: LayerGraph,
    calls: RecordedCalls,
    settings: CalibrateSettings,
    talk: Talk,
    scratch: Path | None,
) -> Observation:
    """Observe as ``observe`` does. Raises as that does."""
    recorded = calls.recorded
    observed = ObservedGraph.of(graph, activation_shapes(graph, calls, talk, scratch))
    total = Totals(graph, observed, len(recorded.timesteps), settings)
    shards = [
        Shard(
            f"timestep {timestep:g}",
            _Observe(step, recorded.at(np.array([step])).compact()),
            recorded.count,
        )
        for step, timestep in enumerate(recorded.timesteps)
    ]
    for step, result in enumerate(run_shards(pool, "observe activations", shards, talk)):
        parts = calls.batches(settings.batch_size, range(step, step + 1))
        for number, batch in enumerate(parts):
            results = [result[_name(number, place)] for place in range(len(observed.outputs))]
            total.add(batch, results, *draws_of(settings, batch))
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
    """A worker's float model: plain to record, with observers to observe, never both."""

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
        """Return what every batch of the timestep gives."""
        setup = self._setup
        self._denoiser = None
        observed, session = self._session(task.recorded, talk)
        outputs = {}
        parts = setup.calls(task.recorded).batches(setup.settings.batch_size)
        with talk.bar("observe", task.recorded.count) as advance:
            for number, batch in enumerate(replace(part, step=task.step) for part in parts):
                for place, array in enumerate(observed.run(session, setup.settings, batch)):
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
