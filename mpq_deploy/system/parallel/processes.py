"""Shards in several processes here; a killed process loses its shard to another.

Processes are started with ``python -m`` in a session of their own, not forked: threads of ONNX
Runtime and torch do not survive a fork, a user's script needs no guard around its main code, and
Ctrl-C reaches this process alone, which ends the others. Within ``kept_workers`` one job's workers
take the next job, too: starting them anew would import torch for each.
"""

from __future__ import annotations

import pickle
import subprocess
import threading
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any, ClassVar

from mpq_deploy.errors import UsageError
from mpq_deploy.system.children import (
    apart,
    child_command,
    child_environment,
    fate,
    read_frame,
    write_frame,
)
from mpq_deploy.system.memory import Room, memory_room
from mpq_deploy.system.parallel.work import (
    Job,
    Pool,
    Progress,
    Result,
    Shard,
    in_shard,
    lost_too_often,
)
from mpq_deploy.system.progress import Talk
from mpq_deploy.system.threads import (
    RUNTIME_THREADS,
    SLEEPING,
    Threads,
    runtime_threads,
    threads_here,
)

# How often a shard is given to a worker again after it lost one.
REPEATS = 2
# Seconds that a worker that has nothing to do may take to end by itself.
PATIENCE = 2.0
# What a worker with a tiny model holds at most (benchmarks/workers.py), mostly torch's code, here
# its CPU build.
PROCESS_BYTES = 400_000_000


@dataclass(frozen=True)
class Processes:
    """``workers`` processes. ``threads`` of each; None: those of this process, so that results have the same bits."""

    workers: int
    threads: int | None = None
    repeats: int = REPEATS
    shares_files: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for option, value in (("--workers", self.workers), ("--threads", self.threads)):
            if value is not None and value < 1:
                raise UsageError(f"{option} is {value}.", "Give at least 1.")

    def threads_of_shard(self) -> Threads:
        """Return the threads asked for, or those of this process."""
        return threads_here() if self.threads is None else Threads.equal(self.threads)

    @contextmanager
    def open(self, job: Job, talk: Talk) -> Iterator[Pool]:
        """Open ``job`` in as many processes as there are shards to compute, at most ``workers``."""
        pool = _ProcessPool(self, job, talk)
        try:
            yield pool
        finally:
            pool.end()

    def environment(self) -> dict[str, str]:
        """Return a worker's environment: this process's, with the number of threads asked for.

        torch and BLAS find the same environment and machine as here, and so take the same number of
        threads.
        """
        threads = {RUNTIME_THREADS: str(runtime_threads()), **SLEEPING}
        if self.threads is not None:
            threads = Threads.equal(self.threads).environment()
        return {**child_environment(), **threads}


def start_process(environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """Start a worker's process with that environment; orders and answers go through its pipes."""
    return subprocess.Popen(
        child_command("mpq_deploy.system.parallel.child"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        **apart(),
    )


@dataclass(eq=False)
class _Process:
    """A worker: its process, where its answers go with itself (None: it is gone), and the shard that it computes."""

    process: subprocess.Popen[bytes]
    answers: SimpleQueue[tuple[_Process, bytes]]
    environment: dict[str, str]
    busy: int | None = None
    gone: bool = False

    @classmethod
    def start(
        cls, environment: dict[str, str], answers: SimpleQueue[tuple[_Process, bytes]]
    ) -> _Process:
        worker = cls(start_process(environment), answers, environment)
        threading.Thread(target=worker._listen, daemon=True).start()
        return worker

    def send(self, order: tuple[Any, ...] | None) -> None:
        """Give it an order. One that is gone by now is found by listening to it."""
        assert self.process.stdin is not None
        with suppress(OSError):
            write_frame(self.process.stdin, pickle.dumps(order))

    def end(self, patience: float = 0.0) -> None:
        """End the process: at once, or when it has not ended by itself after ``patience`` seconds."""
        assert self.process.stdin is not None
        with suppress(OSError):
            self.process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(patience)
        self.process.kill()
        self.process.wait()

    def _listen(self) -> None:
        """Pass on what it answers; b"" when it is gone."""
        assert self.process.stdout is not None
        with self.process.stdout as stream:
            while answer := read_frame(stream):
                self.answers.put((self, answer))
        # Before it is said to whom it answers now: who takes it over asks afterwards.
        self.gone = True
        self.answers.put((self, b""))


class _Kept:
    """Workers between two jobs, while a ``kept_workers`` block is open."""

    def __init__(self) -> None:
        self._lock, self._blocks = threading.Lock(), 0
        self._waiting: list[_Process] = []

    def enter(self) -> None:
        """Count a block more."""
        with self._lock:
            self._blocks += 1

    def leave(self) -> None:
        """Count a block less; end all at the end of the last one."""
        with self._lock:
            self._blocks -= 1
            if self._blocks:
                return
            waiting, self._waiting = self._waiting, []
        _end(waiting)

    def keep(self, worker: _Process) -> bool:
        """Let an idle worker wait for the next job; False outside all blocks."""
        with self._lock:
            if not self._blocks or worker.gone:
                return False
            worker.send(("close",))
            self._waiting.append(worker)
            return True

    def take(
        self, environment: dict[str, str], answers: SimpleQueue[tuple[_Process, bytes]]
    ) -> _Process | None:
        """Return a waiting worker of that environment, which answers to ``answers`` from now on."""
        with self._lock:
            for worker in [one for one in self._waiting if one.environment == environment]:
                self._waiting.remove(worker)
                worker.answers = answers
                if not worker.gone and worker.process.poll() is None:
                    return worker
                worker.end()
        return None

    @property
    def count(self) -> int:
        """How many wait."""
        return len(self._waiting)


_KEPT = _Kept()


@contextmanager
def kept_workers() -> Iterator[None]:
    """Keep workers from one job to the next; when the outermost block ends, none is left."""
    _KEPT.enter()
    try:
        yield
    finally:
        _KEPT.leave()


def _end(workers: Sequence[_Process]) -> None:
    """End processes that have nothing to do: all are told before the first is waited for."""
    for worker in workers:
        worker.send(None)
    for worker in workers:
        worker.end(PATIENCE)


@dataclass
class _ProcessPool:
    crew: Processes
    job: Job
    talk: Talk
    workers: list[_Process] = field(default_factory=list)
    answers: SimpleQueue[tuple[_Process, bytes]] = field(default_factory=SimpleQueue)
    said: set[str] = field(default_factory=set)
    told: bool = False

    def run(self, shards: Sequence[Shard], progress: Progress) -> Iterator[tuple[int, Result]]:
        waiting, lost = deque(range(len(shards))), Counter[int]()
        left = len(shards)
        while left:
            self._assign(waiting, shards)
            worker, content = self.answers.get()
            if not content:
                self._lost(worker, shards, waiting, lost)
                continue
            # Only what our own child wrote: pickles can run code.
            answer: tuple[Any, ...] = pickle.loads(content)  # noqa: S301
            if answer[0] == "steps":
                progress(answer[1], answer[2])
            elif answer[0] == "failed":
                index = worker.busy if answer[1] is None else answer[1]
                assert index is not None  # a worker is opened for a shard
                raise in_shard(answer[2], shards[index])
            elif answer[0] == "done":
                worker.busy = None
                left -= 1
                yield answer[1], answer[2]
            else:
                self._say(*answer)

    def end(self) -> None:
        """Let idle workers wait for the next job, or clean up and end; kill the others."""
        workers, self.workers = self.workers, []
        for worker in workers:
            if worker.busy is not None:
                worker.process.kill()
        _end([worker for worker in workers if worker.busy is not None or not _KEPT.keep(worker)])

    def _assign(self, waiting: deque[int], shards: Sequence[Shard]) -> None:
        """Give waiting shards to idle workers, and to new ones while there may be more."""
        idle = [worker for worker in self.workers if worker.busy is None]
        while waiting and (idle or len(self.workers) < self.crew.workers):
            worker = idle.pop() if idle else self._opened()
            worker.busy = waiting.popleft()
            worker.send(("run", worker.busy, shards[worker.busy].task))

    def _opened(self) -> _Process:
        if not self.told:
            self.told = True
            check_workers(self.crew.workers, self.job, self.talk)
        environment = self.crew.environment()
        worker = _KEPT.take(environment, self.answers) or _Process.start(environment, self.answers)
        self.workers.append(worker)
        worker.send(("open", self.job.opener, self.job.root))
        return worker

    def _lost(
        self, worker: _Process, shards: Sequence[Shard], waiting: deque[int], lost: Counter[int]
    ) -> None:
        """Take a worker out; its shard waits again, before the others, unless it was lost too often."""
        self.workers.remove(worker)
        how = fate(worker.process.wait())
        worker.end()
        index = worker.busy
        if index is None:
            return
        lost[index] += 1
        if lost[index] > self.crew.repeats:
            raise lost_too_often(shards[index], lost[index], how, self.crew.workers)
        self.talk.warn(f"a worker {how}; the shard '{shards[index].name}' is computed again")
        waiting.appendleft(index)

    def _say(self, kind: str, text: str) -> None:
        """Pass on what a worker said; what each says when it opens the job is said once."""
        if text not in self.said:
            self.said.add(text)
            (self.talk.warn if kind == "warn" else self.talk.line)(text)


def check_workers(workers: int, job: Job, talk: Talk) -> None:
    """Say what ``workers`` on this machine are estimated to hold; raises UsageError where there is less."""
    each = job.memory_bytes + PROCESS_BYTES
    talk.line(f"  {job.name} on {_many(workers)}, an estimated {each / 1e9:.1f} GB each")
    room = memory_room()
    # Those that wait hold their code already.
    if room is not None and not room.holds(workers * each - _KEPT.count * PROCESS_BYTES):
        raise UsageError(
            f"{_many(workers)} would need about {workers * each / 1e9:.1f} GB of memory for {job.name} "
            f"({each / 1e9:.1f} GB each), and {room}.",
            _hint(room.bytes // each, room),
        )


def _many(workers: int) -> str:
    return f"{workers} workers" if workers > 1 else "1 worker"


def _hint(fitting: int, room: Room) -> str:
    if fitting > 1:
        first = f"Give --workers {fitting}, which fit"
    else:
        first = (
            "Leave out --workers and --threads: one process needs less"
            if fitting
            else "Not even one fits"
        )
    return f"{first}; or set MPQ_DEPLOY_MEMORY to the memory that may be used, if the estimate is wrong."
