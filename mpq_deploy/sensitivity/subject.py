"""The input of every metric: the model, its candidates, and the calls to measure on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpq_deploy.calibrate.stats import CalibrationStats
from mpq_deploy.calls.recorded import CallSet, RecordedCalls
from mpq_deploy.graph.attention import Operands
from mpq_deploy.graph.layers import Layer, LayerGraph
from mpq_deploy.models.spec import Array, DenoiserSpec
from mpq_deploy.recipe import MeasureSettings, SamplerKind
from mpq_deploy.sensitivity.layer_weights import CandidateWeights, measured_layers
from mpq_deploy.sensitivity.measured_calls import MEMORY_BYTES, STACK_BYTES, Calls
from mpq_deploy.system.compute import computing_on
from mpq_deploy.system.parallel.work import Alone, Crew, Job, Result, Shard, Work
from mpq_deploy.system.progress import Talk

if TYPE_CHECKING:
    from mpq_deploy.evaluate.cache import SampleCache


@dataclass(frozen=True)
class Spread:
    """The workers that measure (``crew``), and how each of them opens the same subject.

    ``open(root, talk)`` is picklable and reads ``files`` under ``root``. Finished shards are kept
    in ``store`` under ``key`` extended by the shard's own key.
    """

    crew: Crew
    root: Path
    files: tuple[str, ...]
    open: Callable[[Path, Talk], Subject]
    store: SampleCache | None = None
    key: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Sampling:
    """How the model is sampled: all rows of ``conditions``, steps, sampler kind of our own loop.

    ``pipeline``: the folder of the diffusers pipeline that calls the model instead. ``alone``: False
    for a part of a whole pipeline, whose output errors are weighed beside those of other parts.
    """

    conditions: Mapping[str, Array]
    steps: int
    kind: SamplerKind
    pipeline: Path | None = None
    alone: bool = True


@dataclass(frozen=True)
class Subject:
    """The model and the calls that every metric takes.

    ``candidates``: layer name -> the weights that the layer may be deployed with; ``stats``: of the
    activations; ``calibration``: the calls to measure on. ``spread``: the workers; None: this
    process. ``shares``: the part of the trajectory that each timestep stands for, of sum 1; None:
    equal shares. ``rotate``: measure the next ``settings.calls`` calls at each timestep, so that
    more calls are seen in the same time; else the same evenly spaced calls. ``attentions``: whose
    rounding to FP8 is measured beside the layers. ``sampling``: None where only recorded calls are
    known. ``later``: subjects that differ in candidates alone; the same passes fill their shards.
    """

    graph: LayerGraph
    candidates: Mapping[str, CandidateWeights]
    stats: CalibrationStats
    calibration: CallSet
    spec: DenoiserSpec
    settings: MeasureSettings
    talk: Talk
    spread: Spread | None = None
    shares: tuple[float, ...] | None = None
    rotate: bool = False
    attentions: tuple[Operands, ...] = ()
    sampling: Sampling | None = None
    later: tuple[Subject, ...] = ()

    def at_one_size(self) -> Subject:
        """Return the subject at its largest image size alone, for metrics that need one shape."""
        if not self.spec.sizes:
            return self
        size = self.calibration.largest(self.spec)
        alone = self.calibration.at_size(self.spec, size)
        return replace(self, calibration=alone, spec=self.spec.at_size(size))

    @property
    def crew(self) -> Crew:
        """The workers that measure."""
        return self.spread.crew if self.spread else Alone()

    @property
    def store(self) -> SampleCache | None:
        """Where finished shards are kept."""
        return self.spread.store if self.spread else None

    def job(self, name: str, work: Callable[[Subject], Work]) -> Job:
        """Return the job whose workers open this subject and do ``work`` (picklable) on it."""
        if self.spread is None or isinstance(self.spread.crew, Alone):
            return Job(name, partial(_work_on, work, self), Path())
        opener = partial(_opened, work, self.spread.open)
        return Job(name, opener, self.spread.root, self.spread.files, self.memory_bytes())

    def shard(self, name: str, task: Any, size: int, **key: Any) -> Shard:
        """Return a shard whose key in the store is ``key``, settings, device and thread counts."""
        if self.spread is None or self.spread.key is None:
            return Shard(name, task, size)
        threads = asdict(self.crew.threads_of_shard())
        if computing_on().torch is not None:  # a GPU sums in another order
            key["device"] = str(computing_on())
        settings = {
            **self.settings.model_dump(mode="json"),
            "rotate": self.rotate,
            "timesteps": [float(t) for t in self.calibration.timesteps],
        }
        return Shard(
            name, task, size, {**self.spread.key, **key, "settings": settings, "threads": threads}
        )

    def keep(self, shard: Shard, result: Result) -> None:
        """Store the result of a shard that another subject's work computed."""
        if self.store is not None and shard.key is not None:
            self.store.keep(shard.key, result)

    def memory_bytes(self) -> int:
        """Estimate the bytes of a worker: weights, stacked weight errors (limited), activations."""
        weights = 4 * sum(layer.weights for layer in self.layers)
        counts = (len({s.weight_form for s in c.schemes}) for c in self.candidates.values())
        forms = max(counts, default=0)
        return 2 * weights + min(forms * weights, STACK_BYTES) + MEMORY_BYTES

    @property
    def recorded(self) -> RecordedCalls:
        """The whole calibration set as calls of the model."""
        return RecordedCalls(self.calibration, self.spec)

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The layers that have candidates, in graph order."""
        return measured_layers(self.graph, self.candidates)

    def calls(self, samples: int | None = None) -> Calls:
        """Return the measured calls: ``samples`` at each timestep (None: as the settings say)."""
        count = self.settings.calls if samples is None else samples
        return Calls(self.graph, self.recorded, count, self.rotate)

    def batch_size(self, calls: Calls) -> int:
        """Return how many of ``calls`` run together, at most."""
        return calls.fixed_batch or self.settings.batch_size


def timestep_of(spec: DenoiserSpec, feeds: Mapping[str, Any]) -> float | None:
    """Return the largest value of the timestep input in ``feeds``; None for a model without one."""
    return float(feeds[spec.timestep_name].max()) if spec.timestep else None


def _work_on(work: Callable[[Subject], Work], subject: Subject, root: Path, talk: Talk) -> Work:
    return work(subject)


def _opened(
    work: Callable[[Subject], Work],
    open_subject: Callable[[Path, Talk], Subject],
    root: Path,
    talk: Talk,
) -> Work:
    return work(open_subject(root, talk))
