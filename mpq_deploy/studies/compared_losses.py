"""The losses that are compared: every metric's, and the truth's, on the same calls.

Each metric is a stage of its own in the run folder, and the truth several small ones, so that an
audit that was stopped goes on where it was.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mpq_deploy.calls.recorded import CallSet, dealt
from mpq_deploy.calls.timesteps import sampled_steps
from mpq_deploy.errors import UsageError
from mpq_deploy.formats.candidates import LayerCandidates
from mpq_deploy.formats.scheme import SCHEMES
from mpq_deploy.models.spec import Array
from mpq_deploy.rounding.candidate_store import candidates_of
from mpq_deploy.run.folder import RECIPE
from mpq_deploy.run.stage import version_of
from mpq_deploy.run.view import Run
from mpq_deploy.sensitivity.exhaustive import evaluates_in_torch, measure_exhaustive
from mpq_deploy.sensitivity.layer_weights import float_matrix
from mpq_deploy.sensitivity.measure import measure
from mpq_deploy.sensitivity.methods import METHODS
from mpq_deploy.sensitivity.subject import Spread, Subject
from mpq_deploy.sensitivity.table import SensitivityTable
from mpq_deploy.stages.measure import sampling_of
from mpq_deploy.system.files import Fields
from mpq_deploy.system.memory import metered
from mpq_deploy.system.parallel.work import Alone, Job, Result, Shard, Within, Work, run_shards
from mpq_deploy.system.progress import Talk

TRUTH = "exhaustive"
# Pairs of the truth that are measured between two writes: what a kill may lose.
SHARD = 48
Pair = tuple[str, str]
# What workers read.
FILES = (RECIPE, "export", "calibrate", "candidates")


@dataclass(frozen=True)
class Truth:
    """The exhaustive losses of ``pairs``, ``of`` so many; ``seconds`` of processor time."""

    table: SensitivityTable
    pairs: tuple[Pair, ...]
    of: int
    seconds: float

    @property
    def complete(self) -> bool:
        """Whether every pair was measured, so that the truth can choose plans itself."""
        return len(self.pairs) == self.of


class Losses:
    """Measures metrics and the truth on ``samples`` held-out calls at each timestep.

    The calls are the same at every timestep, and the same for all metrics and the truth; only gain
    injects its noise into fewer of them. Conditions are as evenly represented as the count allows.
    Raises UsageError when there are not so many calls.
    """

    def __init__(self, run: Run, samples: int) -> None:
        section = run.recipe.measure
        self._run, self.samples = run, samples
        self.exported = run.exported
        self.graph = self.exported.graph
        self.candidates: Mapping[str, LayerCandidates] = candidates_of(run, self.graph)
        inputs, self._stats = run.calibration.inputs, run.calibration.stats
        _, held_out = inputs.split(section.samples)
        self.unseen = held_out is not inputs
        if samples > held_out.count:
            raise UsageError(
                f"The audit needs {samples} calls per timestep, but there are {held_out.count}.",
                f"Choose --samples {held_out.count} or fewer, or raise measure.samples and calibrate.samples.",
            )
        order = dealt(held_out.rows, np.arange(held_out.count))
        steps = sampled_steps(len(inputs.timesteps), min(section.timesteps, len(inputs.timesteps)))
        self.calls: CallSet = held_out.take(np.sort(order[:samples])).at(steps)

    def metric(self, method: str) -> SensitivityTable:
        """Return the table of ``method``, one of ``METHODS``."""
        section = self._run.recipe.measure
        fields: Fields = {}
        if METHODS[method].probes:
            fields["recipe.measure.probes"] = section.replace(method=method).directions
        if METHODS[method].weighs_bits:
            fields.update(
                {
                    f"recipe.measure.orm.{key}": value
                    for key, value in section.orm.model_dump().items()
                }
            )

        def make() -> SensitivityTable:
            return measure(method, self.subject(method))

        return self._stored(f"audit-{method}", {**self._fields(), "method": method, **fields}, make)

    def seconds(self, method: str) -> float:
        """Return the processor time in seconds, of all threads, that measuring ``method`` took."""
        return float(self._run.folder.timings().get(f"audit-{method}", {}).get("seconds", 0.0))

    def truth(self, count: int) -> Truth:
        """Measure ``count`` pairs exhaustively, or all where there are no more."""
        everything = bodies(self.candidates.values())
        still = [pair for pair in everything if not self._changes(pair)]
        chosen = sampled_pairs(
            [p for p in everything if p not in set(still)], count, self._run.recipe.measure.seed
        )
        starts = range(0, len(chosen), SHARD)
        names = [f"{TRUTH}-{number:03d}" for number in range(len(starts))]
        parts = {name: tuple(chosen[start : start + SHARD]) for name, start in zip(names, starts)}
        self._spread_out(parts)
        tables = [self._shard(name, pairs) for name, pairs in parts.items()]
        losses: dict[str, dict[str, float]] = {}
        by_timestep: dict[str, dict[str, Any]] = {}
        zeros = np.zeros(len(self.calls.timesteps), np.float32)
        # What changes nothing needs no measuring: FP16 weights of a file that holds FP16.
        for layer, scheme in still:
            losses.setdefault(layer, {})[scheme] = 0.0
            by_timestep.setdefault(layer, {})[scheme] = zeros
        for table in tables:
            for layer, row in table.losses.items():
                losses.setdefault(layer, {}).update(row)
                by_timestep.setdefault(layer, {}).update(table.losses_by_timestep[layer])
        notes = tuple(dict.fromkeys(note for table in tables for note in table.notes))
        whole = SensitivityTable(TRUTH, self.calls.timesteps, losses, by_timestep, notes=notes)
        seconds = sum(self.seconds(name) for name in names)
        return Truth(whole, tuple(chosen), len(everything) - len(still), seconds)

    def _shard(self, name: str, pairs: Sequence[Pair]) -> SensitivityTable:
        def make() -> SensitivityTable:
            return measure_exhaustive(self.subject(), pairs=set(pairs))

        return self._stored(f"audit-{name}", self._truth_fields(pairs), make)

    def _truth_fields(self, pairs: Sequence[Pair]) -> Fields:
        return {**self._fields(), "method": TRUTH, "pairs": [list(pair) for pair in pairs]}

    def _spread_out(self, parts: dict[str, tuple[Pair, ...]]) -> None:
        """Have workers, where there are any, measure and store what is missing of ``parts``."""
        run, crew = self._run.folder, self._run.crew
        missing = [
            n
            for n, pairs in parts.items()
            if run.changed_fields(f"audit-{n}", self._truth_fields(pairs)) != []
        ]
        # Sessions of ONNX Runtime link the weights while they are open, which other readers of them
        # refuse.
        if isinstance(crew, Alone) or len(missing) < 2 or not evaluates_in_torch(self.graph):
            return
        subject = self.subject()
        place = self._run.for_workers(partial(_open_truth, self.samples), *FILES)
        job = Job("exhaustive", *place, subject.memory_bytes())
        shards = [Shard(name, parts[name], len(parts[name])) for name in missing]
        with crew.open(job, self._run.talk) as pool:
            results = run_shards(pool, "single layers", shards, self._run.talk)
            for name, result in zip(missing, results, strict=True):
                table = _table_of(result, self.calls.timesteps)
                make = partial(lambda made: made, table)
                self._stored(
                    f"audit-{name}", self._truth_fields(parts[name]), make, float(result["seconds"])
                )

    def _changes(self, pair: Pair) -> bool:
        scheme = SCHEMES[pair[1]]
        if scheme.quantized:
            return True
        candidate = self.candidates[pair[0]]
        return not np.array_equal(
            candidate.weight_matrix(scheme.weight_form), float_matrix(self.graph, candidate.layer)
        )

    def subject(self, method: str = TRUTH) -> Subject:
        """Return what all metrics and the truth are measured on, with the settings of ``method``."""
        section = self._run.recipe.measure
        settings = section.replace(calls=self.samples, method=method)
        exported = self.exported
        calls = (self.calls, exported.spec, settings, self._run.talk)
        own = partial(_open_subject, self.samples)
        opener, root, files = self._run.for_workers(own, *FILES)
        spread = Spread(self._run.crew, root, files, opener)
        subject = Subject(self.graph, self.candidates, self._stats, *calls, spread)
        return replace(subject, sampling=sampling_of(self._run, trajectories=False))

    def _fields(self) -> Fields:
        section = self._run.recipe.measure
        return {
            **{name: self._run.digest(name) for name in ("export", "calibrate", "candidates")},
            "audit.samples": self.samples,
            "recipe.measure.samples": section.samples,
            "recipe.measure.timesteps": section.timesteps,
            "recipe.measure.batch_size": section.batch_size,
            "recipe.measure.seed": section.seed,
            **version_of("torch", "onnxruntime", "numpy", "highspy"),
        }

    def _stored(
        self,
        name: str,
        fields: Fields,
        make: Callable[[], SensitivityTable],
        elsewhere: float = 0.0,
    ) -> SensitivityTable:
        """Return the table of a stage folder, made by ``make`` where it is not current.

        ``elsewhere``: processor seconds that a worker spent on it.
        """
        run = self._run.folder
        if run.changed_fields(name, fields) != []:
            started = time.process_time()
            with metered() as reading, run.writing(name, fields) as folder:
                make().save(folder)
            spent = time.process_time() - started + elsewhere
            run.save_timing(name, spent, reading.peak_rss_bytes)
            self._run.talk.line(f"  {name:<22} {spent:6.1f} s of processor time")
        return SensitivityTable.load(run.stage(name))


def _open_subject(samples: int, root: Path, talk: Talk) -> Subject:
    """Return the subject of ``Losses`` in a worker."""
    return Losses(Run.opened(root, talk), samples).subject()


def _open_truth(samples: int, root: Path, talk: Talk) -> Work:
    """Return what measures pairs exhaustively; ``seconds``: of processor time."""
    losses = Losses(Run.opened(root, talk), samples)

    def work(pairs: tuple[Pair, ...], inner: Talk) -> Result:
        started = time.process_time()
        table = measure_exhaustive(
            replace(losses.subject(), talk=Within.silent(inner)), pairs=set(pairs)
        )
        measured = [(layer, scheme) for layer, row in table.losses.items() for scheme in row]
        return {
            "pairs": np.array(measured, np.str_),
            "losses": np.array([table.losses[layer][scheme] for layer, scheme in measured]),
            "by_timestep": np.array(
                [table.losses_by_timestep[layer][scheme] for layer, scheme in measured]
            ),
            "notes": np.array(table.notes, np.str_),
            "seconds": np.array(time.process_time() - started),
        }

    return work


def _table_of(result: Result, timesteps: Array) -> SensitivityTable:
    losses: dict[str, dict[str, float]] = {}
    by_timestep: dict[str, dict[str, Array]] = {}
    for (layer, scheme), loss, row in zip(
        result["pairs"], result["losses"], result["by_timestep"], strict=True
    ):
        losses.setdefault(str(layer), {})[str(scheme)] = float(loss)
        by_timestep.setdefault(str(layer), {})[str(scheme)] = row
    notes = tuple(str(note) for note in result["notes"])
    return SensitivityTable(
        TRUTH, np.asarray(timesteps, np.float32), losses, by_timestep, notes=notes
    )


def bodies(candidates: Collection[LayerCandidates]) -> list[Pair]:
    """Return every (layer, scheme) without a branch: those would multiply the work."""
    return [
        (c.layer.name, scheme.name) for c in candidates for scheme in c.schemes if not scheme.branch
    ]


def sampled_pairs(pairs: Sequence[Pair], count: int, seed: int) -> list[Pair]:
    """Choose ``count`` of ``pairs`` (or all), stratified by scheme and by layer.

    Each scheme gets its share of the count (largest remainder). A scheme takes the layers taken
    least often so far, drawn by ``seed`` among equals; schemes of few layers choose first.
    """
    if count >= len(pairs):
        return list(pairs)
    by_scheme: dict[str, list[str]] = {}
    for layer, scheme in pairs:
        by_scheme.setdefault(scheme, []).append(layer)
    exact = {scheme: count * len(layers) / len(pairs) for scheme, layers in by_scheme.items()}
    quota = {scheme: int(share) for scheme, share in exact.items()}
    for scheme in sorted(exact, key=lambda s: quota[s] - exact[s])[: count - sum(quota.values())]:
        quota[scheme] += 1
    names = list(dict.fromkeys(layer for layer, _ in pairs))
    random = np.random.default_rng(seed)
    taken = dict.fromkeys(names, 0)
    chosen: set[Pair] = set()
    for scheme in sorted(by_scheme, key=lambda s: len(by_scheme[s])):
        lots = dict(zip(names, random.permutation(len(names)).tolist()))
        for layer in sorted(by_scheme[scheme], key=lambda n: (taken[n], lots[n]))[: quota[scheme]]:
            taken[layer] += 1
            chosen.add((layer, scheme))
    return [pair for pair in pairs if pair in chosen]
