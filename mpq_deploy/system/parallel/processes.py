"""Shards in several processes of this machine. A process that is killed loses its shard to another one.

Processes are started with ``python -m`` in a session of their own, not forked: threads of ONNX Runtime and torch do not
survive a fork, a user's script needs no guard around its main code, and Ctrl-C reaches this process alone, which ends
the others.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any, ClassVar

from mpq_deploy.errors import UsageError
from mpq_deploy.system.parallel.work import Job, Pool, Progress, Result, Shard, in_shard, lost_too_often
from mpq_deploy.system.parallel.worker_memory import check_workers
from mpq_deploy.system.progress import Talk
from mpq_deploy.system.threads import RUNTIME_THREADS, SLEEPING, Threads, runtime_threads, threads_here

# How often a shard is given to a worker again after it lost one.
REPEATS = 2
# Seconds that a worker that has nothing to do may take to end by itself.
PATIENCE = 2.0


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
        """Return the environment of a worker: that of this process, with the number of threads where it is asked for.

        torch and BLAS find the same environment and machine as here, and so take the same number of threads.
        """
        threads = {RUNTIME_THREADS: str(runtime_threads()), **SLEEPING}
        if self.threads is not None:
            threads = Threads.equal(self.threads).environment()
        path = os.pathsep.join(entry for entry in sys.path if entry)
        return {**os.environ, **threads, "PYTHONPATH": path}


@dataclass
class _Process:
    """A worker: its process, the socket to it, the pipe that keeps it alive, and the shard that it computes."""

    process: subprocess.Popen[bytes]
    orders: Connection
    lifeline: int
    busy: int | None = None

    @classmethod
    def start(cls, environment: dict[str, str]) -> _Process:
        ours, theirs = Pipe()
        read, write = os.pipe()
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", "mpq_deploy.system.parallel.child", str(theirs.fileno()), str(read)],
                stdin=subprocess.DEVNULL,
                stdout=sys.__stderr__ if sys.__stderr__ is not None else subprocess.DEVNULL,
                pass_fds=(theirs.fileno(), read),
                env=environment,
                start_new_session=True,
            )
        except BaseException:
            os.close(write)
            ours.close()
            raise
        finally:
            theirs.close()
            os.close(read)
        return cls(process, ours, write)

    def end(self, patience: float = 0.0) -> None:
        """End the process: at once, or when it has not ended by itself after ``patience`` seconds."""
        self.orders.close()
        os.close(self.lifeline)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(patience)
        self.process.kill()
        self.process.wait()

    def fate(self) -> str:
        """Say how the process ended, in words after "its worker"."""
        code = self.process.wait()
        if code < 0:
            return f"was killed by {signal.Signals(-code).name}"
        return f"ended with exit code {code}"


@dataclass
class _ProcessPool:
    crew: Processes
    job: Job
    talk: Talk
    workers: list[_Process] = field(default_factory=list)
    said: set[str] = field(default_factory=set)
    told: bool = False

    def run(self, shards: Sequence[Shard], progress: Progress) -> Iterator[tuple[int, Result]]:
        waiting, lost = deque(range(len(shards))), Counter[int]()
        left = len(shards)
        while left:
            self._assign(waiting, shards)
            for worker in self._ready():
                answer = self._answer(worker)
                if answer is None:
                    self._lost(worker, shards, waiting, lost)
                elif answer[0] == "steps":
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
        """End all processes: idle ones may clean up, the others are killed."""
        workers, self.workers = self.workers, []
        for worker in workers:
            if worker.busy is not None:
                worker.process.kill()
            else:
                with suppress(OSError):
                    worker.orders.send(None)
        for worker in workers:
            worker.end(PATIENCE)

    def _assign(self, waiting: deque[int], shards: Sequence[Shard]) -> None:
        """Give waiting shards to idle workers, and to new ones while there may be more."""
        idle = [worker for worker in self.workers if worker.busy is None]
        while waiting and (idle or len(self.workers) < self.crew.workers):
            worker = idle.pop() if idle else self._opened()
            worker.busy = waiting.popleft()
            # A worker that is gone by now is found by reading from it.
            with suppress(OSError):
                worker.orders.send(("run", worker.busy, shards[worker.busy].task))

    def _opened(self) -> _Process:
        if not self.told:
            self.told = True
            check_workers(self.crew.workers, self.job, self.talk)
        worker = _Process.start(self.crew.environment())
        self.workers.append(worker)
        with suppress(OSError):
            worker.orders.send(("open", self.job.opener, self.job.root))
        return worker

    def _ready(self) -> list[_Process]:
        """Wait until some workers have answered or are gone; return them."""
        found = set(wait([worker.orders for worker in self.workers]))
        return [worker for worker in self.workers if worker.orders in found]

    def _answer(self, worker: _Process) -> tuple[Any, ...] | None:
        try:
            answer: tuple[Any, ...] = worker.orders.recv()
        except (EOFError, OSError):
            return None
        return answer

    def _lost(self, worker: _Process, shards: Sequence[Shard], waiting: deque[int], lost: Counter[int]) -> None:
        """Take a worker out; its shard waits again, before the others, unless it was lost too often."""
        self.workers.remove(worker)
        fate = worker.fate()
        worker.end()
        index = worker.busy
        if index is None:
            return
        lost[index] += 1
        if lost[index] > self.crew.repeats:
            raise lost_too_often(shards[index], lost[index], fate, self.crew.workers)
        self.talk.warn(f"a worker {fate}; the shard '{shards[index].name}' is computed again")
        waiting.appendleft(index)

    def _say(self, kind: str, text: str) -> None:
        """Pass on what a worker said; what each says when it opens the job is said once."""
        if text not in self.said:
            self.said.add(text)
            (self.talk.warn if kind == "warn" else self.talk.line)(text)
