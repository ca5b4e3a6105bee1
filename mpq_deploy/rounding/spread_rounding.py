"""The stage candidates over workers, which run the calls for the Hessians and round the layers.

Layers come in the groups whose Hessians fit the memory cap together, as in one process. For each
group workers first gather the rows of the layers' inputs, one shard per timestep. This process
multiplies the rows in the order of the timesteps, so that floating-point sums do not depend on the
workers. Then workers round the layers, one shard per layer. Workers that see this machine's files
read the Hessian from the run's scratch folder; others receive it with the shard.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from mpq_deploy.models.spec import Array
from mpq_deploy.rounding.arrays import fetched
from mpq_deploy.rounding.earlier_forms import EarlierForms
from mpq_deploy.rounding.hessian import Gathering, Hessian, HessianPlan
from mpq_deploy.rounding.rounder import Rounder, rounding_calls
from mpq_deploy.run.folder import RECIPE
from mpq_deploy.run.stage_memory import rounding_worker_bytes
from mpq_deploy.run.view import Run
from mpq_deploy.system.array_file import read_array
from mpq_deploy.system.files import disk_error
from mpq_deploy.system.parallel.work import Job, Pool, Result, Shard, Within, Work, run_shards
from mpq_deploy.system.progress import Talk

FILES = (RECIPE, "export", "calibrate")


@dataclass(frozen=True)
class _Layer:
    """Round layer ``number`` with its Hessian of column ``widths``.

    The Hessian is in the file ``place`` below the root, or in ``blocks``. With neither the layer
    takes the diagonal from calibration.
    """

    number: int
    widths: tuple[int, ...] = ()
    place: Path | None = None
    blocks: Array | None = None


@dataclass(frozen=True)
class _Gather:
    """Gather the rows for the Hessians of ``group`` from the calls at timestep index ``step``."""

    group: int
    step: int


def round_over_workers(run: Run, folder: Path, earlier: EarlierForms) -> None:
    """Write the candidates of every layer into ``folder``, a folder below the run's."""
    crew = run.crew
    opener = partial(_Rounding.open, folder.relative_to(run.path), crew.shares_files, earlier)
    opened, root, files = run.for_workers(opener, *FILES)
    files = (*files, *(name for name, _ in earlier.folders))
    job = Job("rounding", opened, root, files, rounding_worker_bytes(run))
    rounder = Rounder.of(run, earlier)
    # Before the workers start: the plan links the weights for a session, and other readers refuse
    # linked weights.
    plan = _plan(run, rounder, run.talk) if run.recipe.quantize.rounding != "nearest" else None
    known = set(run.exported.graph.layers) - set(rounder.unknown() if plan else ())
    with crew.open(job, run.talk) as pool:
        dealing = _Dealing(run, pool, folder)
        if known:
            numbers = sorted(rounder.numbers[layer.name] for layer in known)
            dealing.round([dealing.layer(_Layer(number)) for number in numbers])
        if plan is None:
            return
        for number in range(len(plan)):
            which = f" {number + 1} of {len(plan)}"
            with tempfile.TemporaryDirectory(prefix="hessians-", dir=run.scratch()) as scratch:
                gathered = dealing.gathered(plan, number, f"Hessians{which}")
                shards = list(dealing.with_hessians(plan.hessians(number, gathered), Path(scratch)))
                dealing.round(shards, which if len(plan) > 1 else "")


def _plan(run: Run, rounder: Rounder, talk: Talk) -> HessianPlan | None:
    """Return the plan of the Hessians; None where no layer needs one."""
    graph = replace(run.exported.graph, layers=rounder.unknown())
    if not graph.layers:
        return None
    calls, settings = rounding_calls(run), run.recipe.quantize
    return HessianPlan.of(graph, calls, settings, talk, scratch=run.scratch())


@dataclass(frozen=True)
class _Dealing:
    """Makes the shards and writes the workers' files into ``folder``."""

    run: Run
    pool: Pool
    folder: Path

    def layer(self, task: _Layer) -> Shard:
        return Shard(f"layer {self.run.exported.graph.layers[task.number].name}", task)

    def with_hessians(self, hessians: Iterator[Hessian], scratch: Path) -> Iterator[Shard]:
        """Yield the shards of a group; Hessians are saved in ``scratch`` if workers can read it."""
        numbers = {
            layer.name: number for number, layer in enumerate(self.run.exported.graph.layers)
        }
        last: tuple[Array, Path] | None = None
        for found in hessians:
            number = numbers[found.layer.name]
            if not self.run.crew.shares_files:
                yield self.layer(_Layer(number, found.widths, blocks=found.blocks))
                continue
            # Consecutive layers often share an input, as in attention: one file for all of them.
            if last is None or last[0] is not found.blocks:
                last = (found.blocks, scratch / f"{number:05d}.npy")
                np.save(last[1], found.blocks)
            yield self.layer(_Layer(number, found.widths, last[1].relative_to(self.run.path)))

    def gathered(self, plan: HessianPlan, group: int, title: str) -> Iterator[list[Array]]:
        """Yield the rows of every batch of all timesteps, in order."""
        steps = range(plan.timesteps)
        shards = [
            Shard(f"{title}, timestep {s + 1}", _Gather(group, s), plan.calls(s)) for s in steps
        ]
        for result in run_shards(self.pool, title, shards, self.run.talk):
            batches, jobs = (
                1 + max(int(name.split(".")[place]) for name in result) for place in (0, 1)
            )
            for batch in range(batches):
                yield [result.pop(f"{batch}.{job}") for job in range(jobs)]

    def round(self, shards: Sequence[Shard], which: str = "") -> None:
        """Round the layers of ``shards``; the largest first, so that workers end together."""
        layers = self.run.exported.graph.layers
        ordered = sorted(shards, key=lambda shard: -layers[shard.task.number].weights)
        for result in run_shards(self.pool, f"round layers{which}", ordered, self.run.talk):
            for name, content in result.items():
                (self.folder / name).write_bytes(content.tobytes())


class _Rounding:
    """A worker: the run opened once, and the plan of the Hessians once it gathers rows."""

    def __init__(
        self, root: Path, out: Path, shares_files: bool, earlier: EarlierForms, talk: Talk
    ) -> None:
        self._root, self._out, self._shares = root, root / out, shares_files
        self._run = Run.opened(root, talk)
        self._layers = self._run.exported.graph.layers
        self._rounder = Rounder.of(self._run, earlier)
        self._plan: HessianPlan | None = None
        self._open: tuple[int, Gathering] | None = None

    @classmethod
    def open(
        cls, out: Path, shares_files: bool, earlier: EarlierForms, root: Path, talk: Talk
    ) -> Work:
        """Return the worker's function, which does a ``_Gather`` or rounds a ``_Layer``.

        A layer's file stays in ``root / out`` if files are shared; else its bytes are the result.
        """
        worker = cls(root, out, shares_files, earlier, talk)

        def work(task: _Layer | _Gather, inner: Talk) -> Result:
            return worker.gather(task, inner) if isinstance(task, _Gather) else worker.round(task)

        return work

    def gather(self, task: _Gather, talk: Talk) -> Result:
        """Return the rows as "batch.job" -> array, jobs in the order of the group's matrices."""
        if self._plan is None:
            self._plan = _plan(self._run, self._rounder, Within.silent(talk))
            assert self._plan is not None
        if self._open is None or self._open[0] != task.group:
            # Two sessions would hold two copies of the weights.
            self._open = None
            self._open = (task.group, self._plan.gathering(task.group))
        found: Result = {}
        with talk.bar("gather", self._plan.calls(task.step)) as advance:
            for batch, parts in enumerate(self._open[1].at(task.step, advance)):
                found |= {f"{batch}.{job}": fetched(rows) for job, rows in enumerate(parts)}
        return found

    def round(self, task: _Layer) -> Result:
        """Round a layer; return its file's bytes where workers do not share files."""
        self._open = None
        try:
            self._out.mkdir(exist_ok=True)
            path = self._rounder.into(self._out, self._moments(task))
            if self._shares:
                return {}
            content = np.frombuffer(path.read_bytes(), np.uint8)
            path.unlink()
        except OSError as error:
            raise disk_error(error, self._out) from error
        return {path.name: content}

    def _moments(self, task: _Layer) -> Hessian:
        layer = self._layers[task.number]
        if task.place is None and task.blocks is None:
            return self._rounder.diagonal(layer)
        # Copied into memory of this process: NumPy's results can depend on an array's alignment.
        blocks = read_array(self._root / task.place) if task.place else np.array(task.blocks)
        return Hessian(layer, blocks, task.widths, 0)
