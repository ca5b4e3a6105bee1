"""Work in independent shards, and their results in order.

In: a ``Job`` (what to open), a list of ``Shard`` (descriptions that can be pickled: no session, no
open file) and a ``Crew`` (who computes). Out: the arrays of each shard, in the order of the list,
whoever computed them and whenever.

A caller merges the results in that order, so the merged result does not depend on the crew. Two
more things make it equal to the bit: what a shard is (a timestep, a batch) does not depend on the
number of workers, and every worker computes with the threads of the process that started it
(``runtime.threads``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy.typing as npt

from mpq_deploy.errors import MpqError
from mpq_deploy.system.progress import Advance, Talk
from mpq_deploy.system.threads import Threads, threads_here

# What a worker process imports before its job: no more than this room, so that it starts fast.
if TYPE_CHECKING:
    from mpq_deploy.evaluate.cache import SampleCache

Result = dict[str, npt.NDArray[Any]]
# What computes a shard: its task -> arrays by name. Bars of the talk it is given move the shard's
# own bar.
Work = Callable[[Any, Talk], Result]
# What a worker does first, once: opens the model under a folder. A function of a module, or a
# partial of one.
Opener = Callable[[Path, Talk], Work]


# The attribute of an error in which a worker sends where it came from.
TRACEBACK = "traceback"


class RemoteError(Exception):
    """The traceback of another process, as text."""


class ShardError(MpqError):
    """A shard's worker was lost too often, or something failed in it that is not one of our errors."""


@dataclass(frozen=True)
class Job:
    """What workers open before their first shard.

    ``opener`` can be pickled; it is called as ``opener(root, talk)``, where ``root`` holds the
    ``files`` (files or folders, relative to it): the folder itself on this machine, a copy of it on
    another. ``memory_bytes``: estimate of what a worker holds.
    """

    name: str
    opener: Opener
    root: Path
    files: tuple[str, ...] = ()
    memory_bytes: int = 0


@dataclass(frozen=True)
class Shard:
    """One part: its ``name`` for people, its description, ``size`` steps of the bar, and the key it is kept by."""

    name: str
    task: Any
    size: int = 1
    key: Mapping[str, Any] | None = None


# Called with the index of a shard and how many of its steps are done in all.
Progress = Callable[[int, int], None]


class Pool(Protocol):
    """Workers with a job open."""

    def run(self, shards: Sequence[Shard], progress: Progress) -> Iterator[tuple[int, Result]]:
        """Yield (index, result) of every shard as it is finished.

        Raises the error of a shard that failed, naming it; ShardError where its workers were lost
        too often.
        """


class Crew(Protocol):
    """Who computes."""

    @property
    def threads(self) -> int | None:
        """The threads that were asked for, for every worker; None: those of this process."""

    @property
    def shares_files(self) -> bool:
        """Whether workers read and write a job's folder itself, not a copy of its files."""

    def threads_of_shard(self) -> Threads:
        """Return the threads that every shard is computed with, whatever the number of workers."""

    def open(self, job: Job, talk: Talk) -> AbstractContextManager[Pool]:
        """Open ``job`` for the time of the block; at its end, however it ends, no worker holds it or computes."""


class Alone:
    """The crew of one: this process, one shard after the other."""

    threads = None
    shares_files = True

    def threads_of_shard(self) -> Threads:
        """Return the threads of this process."""
        return threads_here()

    @contextmanager
    def open(self, job: Job, talk: Talk) -> Iterator[Pool]:
        """Open the job here."""
        yield _Here(job.opener(job.root, talk), talk)


@dataclass(frozen=True)
class _Here:
    work: Work
    talk: Talk

    def run(self, shards: Sequence[Shard], progress: Progress) -> Iterator[tuple[int, Result]]:
        for index, shard in enumerate(shards):
            with named(shard):
                result = self.work(
                    shard.task, Within(self.talk.line, self.talk.warn, stepper(progress, index))
                )
            yield index, result


def run_shards(
    pool: Pool, what: str, shards: Sequence[Shard], talk: Talk, store: SampleCache | None = None
) -> Iterator[Result]:
    """Yield the result of every shard in the order of ``shards``, with a bar called ``what``.

    Results are kept in ``store`` by the shards' keys, and those that are there already are not
    computed again. Raises as ``Pool.run`` does.
    """
    kept = {
        i: store.find(shard.key)
        for i, shard in enumerate(shards)
        if store is not None and shard.key is not None
    }
    ready = {index: result for index, result in kept.items() if result is not None}
    wanted = [index for index in range(len(shards)) if index not in ready]
    bar = talk.bar(what, sum(shard.size for shard in shards))
    with bar as advance:
        done = dict.fromkeys(range(len(shards)), 0)

        def progress(number: int, steps: int) -> None:
            index = wanted[number]
            # A shard that is repeated passes steps that the bar has passed already.
            further = max(min(steps, shards[index].size) - done[index], 0)
            done[index] += further
            advance(further)

        for index in ready:
            advance(shards[index].size)
        place = 0
        for number, result in pool.run([shards[index] for index in wanted], progress):
            progress(number, shards[wanted[number]].size)
            key = shards[wanted[number]].key
            ready[wanted[number]] = (
                result if store is None or key is None else store.keep(key, result)
            )
            while place in ready:
                yield ready.pop(place)
                place += 1
        while place in ready:
            yield ready.pop(place)
            place += 1


class Within(Talk):
    """The talk inside a shard: lines go out, and every bar moves the shard's own."""

    def __init__(
        self, line: Callable[[str], None], warn: Callable[[str], None], advance: Advance
    ) -> None:
        self._line, self._warn, self._advance = line, warn, advance

    def line(self, text: str) -> None:
        """Pass the line on."""
        self._line(text)

    def warn(self, text: str) -> None:
        """Pass the warning on."""
        self._warn(text)

    @classmethod
    def silent(cls, talk: Talk) -> Within:
        """Return ``talk`` without bars."""
        return cls(talk.line, talk.warn, lambda steps: None)

    @contextmanager
    def bar(self, what: str, total: int) -> Iterator[Advance]:
        """Move the shard's bar."""
        yield self._advance


def stepper(progress: Progress, index: int) -> Advance:
    """Return a function that adds up the steps of shard ``index`` and reports their sum."""
    done = 0

    def advance(steps: int) -> None:
        nonlocal done
        done += steps
        progress(index, done)

    return advance


@contextmanager
def named(shard: Shard) -> Iterator[None]:
    """Add the shard's name to an error of ours that leaves the block."""
    try:
        yield
    except MpqError as error:
        in_shard(error, shard)
        raise


def in_shard(error: MpqError, shard: Shard) -> MpqError:
    """Return ``error`` with the shard's name in its hint: what a message says may become part of a result."""
    error.hint = f"{error.hint} It came from the shard '{shard.name}'.".strip()
    if TRACEBACK in error.__dict__:
        error.__cause__ = RemoteError(error.__dict__[TRACEBACK])
    return error


def lost_too_often(shard: Shard, times: int, how: str, workers: int) -> ShardError:
    """Return the error of a shard of which no worker lived to the end."""
    fewer = f"fewer than {workers} workers, " if workers > 1 else ""
    return ShardError(
        f"The shard '{shard.name}' was lost {times} times, the last time because its worker {how}.",
        f"A killed worker has usually run out of memory: try {fewer}smaller batches or more memory. "
        "Finished shards are kept where the stage keeps them.",
    )
