"""The stage candidates over workers: who makes the Hessians, and which layers a worker rounds.

On one machine this process makes the Hessians, group by group and with all cores, and writes each into the run's
scratch folder; a shard is a layer, the largest first. On a cluster a shard is a whole group of layers, Hessians
included, so that the runs of the denoiser behind them are spread too; where all layers are one group, this process
makes its Hessians and sends each along with its layer. How layers are dealt out changes no bit: a group is the same
wherever it is made, and a layer is rounded alone.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mpq_deploy.artefacts import disk_error
from mpq_deploy.calibrate.hessian import Hessian, HessianPlan
from mpq_deploy.denoisers.spec import Array
from mpq_deploy.shards.files import alone_with
from mpq_deploy.shards.work import Job, Pool, Result, Shard, Within, Work, run_shards
from mpq_deploy.stages.candidates import Rounder, hessian_inputs
from mpq_deploy.stages.common import Exported
from mpq_deploy.stages.memory import rounding_worker_bytes
from mpq_deploy.stages.spread import RECIPE, opened_run
from mpq_deploy.talk import Talk

if TYPE_CHECKING:
    from mpq_deploy.pipeline import Pipeline

FILES = (RECIPE, "export", "calibrate")


@dataclass(frozen=True)
class _Layer:
    """Layer ``number`` and its Hessian, whose columns are cut into ``widths``: in the file ``place`` below the root, or
    itself (``blocks``). Neither: the layer is rounded to nearest, by what the calibration knows of its inputs."""

    number: int
    widths: tuple[int, ...] = ()
    place: Path | None = None
    blocks: Array | None = None


@dataclass(frozen=True)
class _Group:
    """Group ``number`` of the plan of Hessians."""

    number: int


def round_over_workers(pipeline: Pipeline, exported: Exported, folder: Path) -> None:
    """Write the candidates of every layer into ``folder``, a folder below the run's."""
    crew, root = pipeline.crew, pipeline.run.path
    opener = partial(_Rounding.open, folder.relative_to(root), crew.shares_files)
    job = Job("rounding", opener, root, FILES, rounding_worker_bytes(pipeline))
    with crew.open(job, pipeline.talk) as pool:
        dealing = _Dealing(pipeline, exported, pool, folder)
        if pipeline.recipe.quantize.rounding == "nearest":
            dealing.run([dealing.layer(_Layer(number)) for number in range(len(exported.graph.layers))], "")
            return
        plan = _plan(pipeline, exported, pipeline.talk)
        if not crew.shares_files and len(plan) > 1:
            sizes = [len(plan.layers(number)) for number in range(len(plan))]
            dealing.run([Shard(f"layers of group {n + 1}", _Group(n), size) for n, size in enumerate(sizes)], "")
            return
        for number in range(len(plan)):
            which = f" {number + 1} of {len(plan)}" if len(plan) > 1 else ""
            with tempfile.TemporaryDirectory(prefix="hessians-", dir=pipeline.run.scratch()) as scratch:
                dealing.run(list(dealing.with_hessians(plan.hessians(number), Path(scratch))), which)


def _plan(pipeline: Pipeline, exported: Exported, talk: Talk, guard: Path | None = None) -> HessianPlan:
    calls, options = hessian_inputs(pipeline, exported)
    about = (exported.graph, calls, exported.conditions, exported.spec, options, talk)
    return HessianPlan.of(*about, scratch=pipeline.run.scratch(), guard=guard)


@dataclass(frozen=True)
class _Dealing:
    """Makes shards of layers and writes what comes back into ``folder``."""

    pipeline: Pipeline
    exported: Exported
    pool: Pool
    folder: Path

    def layer(self, task: _Layer) -> Shard:
        return Shard(f"layer {self.exported.graph.layers[task.number].name}", task)

    def with_hessians(self, hessians: Iterator[Hessian], scratch: Path) -> Iterator[Shard]:
        """Yield the shards of a group; each Hessian goes into ``scratch`` where workers can read it there."""
        numbers = {layer.name: number for number, layer in enumerate(self.exported.graph.layers)}
        for found in hessians:
            number = numbers[found.layer.name]
            if not self.pipeline.crew.shares_files:
                yield self.layer(_Layer(number, found.widths, blocks=found.blocks))
                continue
            path = scratch / f"{number:05d}.npy"
            np.save(path, found.blocks)
            yield self.layer(_Layer(number, found.widths, path.relative_to(self.pipeline.run.path)))

    def run(self, shards: Sequence[Shard], which: str) -> None:
        """Compute ``shards``, layers with the most weights first, so that none is left over at the end."""
        layers = self.exported.graph.layers
        ordered = sorted(shards, key=lambda s: -layers[s.task.number].weights if isinstance(s.task, _Layer) else 0)
        for result in run_shards(self.pool, f"round layers{which}", ordered, self.pipeline.talk):
            for name, content in result.items():
                (self.folder / name).write_bytes(content.tobytes())


class _Rounding:
    """A worker: the model opened once, and the plan of Hessians where it makes them itself."""

    def __init__(self, root: Path, out: Path, shares_files: bool, talk: Talk) -> None:
        self._root, self._out, self._shares = root, root / out, shares_files
        self._pipeline = opened_run(root, talk)
        # Another worker of this node may have linked the weights for a session, which readers refuse.
        with alone_with(root / RECIPE):
            self._exported = Exported(self._pipeline)
        self._rounder = Rounder.of(self._pipeline, self._exported)
        self._hessians: HessianPlan | None = None

    @classmethod
    def open(cls, out: Path, shares_files: bool, root: Path, talk: Talk) -> Work:
        """Return what rounds a ``_Layer`` or a ``_Group`` into files of ``root / out``, or returns these files."""
        return cls(root, out, shares_files, talk)._work

    def _work(self, task: _Layer | _Group, talk: Talk) -> Result:
        if isinstance(task, _Layer):
            return self._rounded(self._moments(task))
        if self._hessians is None:
            self._hessians = _plan(self._pipeline, self._exported, Within.silent(talk), self._root / RECIPE)
        found: Result = {}
        with talk.bar("round layers", len(self._hessians.layers(task.number))) as advance:
            for moments in self._hessians.hessians(task.number):
                found |= self._rounded(moments)
                advance(1)
        return found

    def _moments(self, task: _Layer) -> Hessian:
        layer = self._exported.graph.layers[task.number]
        if task.place is None and task.blocks is None:
            return self._rounder.diagonal(layer)
        # Memory of this process, as where Hessians are made: what lies elsewhere is aligned otherwise.
        blocks = np.load(self._root / task.place) if task.place else np.array(task.blocks)
        return Hessian(layer, blocks, task.widths, 0)

    def _rounded(self, moments: Hessian) -> Result:
        """Round a layer; return its file where only this node has it."""
        try:
            self._out.mkdir(exist_ok=True)
            path = self._rounder.into(self._out, moments)
            if self._shares:
                return {}
            content = np.frombuffer(path.read_bytes(), np.uint8)
            path.unlink()
        except OSError as error:
            raise disk_error(error, self._out) from error
        return {path.name: content}
