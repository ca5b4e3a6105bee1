"""Shards on an existing Ray cluster; a lost worker or node loses its shards to others.

Only versions and processors of the nodes can make results differ from those of one process; the
first is refused, the second is said.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from mpq_deploy.errors import MissingDependencyError, UsageError
from mpq_deploy.system.compute import VARIABLE as COMPUTE_VARIABLE
from mpq_deploy.system.compute import Compute
from mpq_deploy.system.parallel.node import Facts, NodeWorker, Packed
from mpq_deploy.system.parallel.processes import REPEATS
from mpq_deploy.system.parallel.work import (
    Job,
    Pool,
    Progress,
    Result,
    Shard,
    ShardError,
    in_shard,
    lost_too_often,
)
from mpq_deploy.system.progress import Talk
from mpq_deploy.system.threads import Threads, threads_here

# Files travel in pieces of this size, so that no store has to hold a model as one object.
PIECE_BYTES = 64 << 20
# Seconds without any worker after which the cluster is given up, and between two looks at it.
WAITING_SECONDS = 120.0
LOOK_SECONDS = 1.0


@dataclass(frozen=True)
class Cluster:
    """The Ray cluster at ``address``: ``workers`` (None: all that fit) of ``threads`` each.

    ``threads`` None: those of this process, so that results have the same bits.
    """

    address: str
    workers: int | None = None
    threads: int | None = None
    repeats: int = REPEATS
    shares_files: ClassVar[bool] = False

    def threads_of_shard(self) -> Threads:
        """Return the threads asked for, or those of this process."""
        return threads_here() if self.threads is None else Threads.equal(self.threads)

    @contextmanager
    def open(self, job: Job, talk: Talk) -> Iterator[Pool]:
        """Open ``job`` on the cluster. Raises UsageError where there is none."""
        ray = connected(self.address)
        try:
            packed = _packed(ray, job)
        except (ray.exceptions.OutOfDiskError, ray.exceptions.ObjectStoreFullError) as error:
            raise _store_is_full(error) from error
        pool = _ClusterPool(ray, self, job, talk, packed)
        try:
            yield pool
        finally:
            pool.end()


def connected(address: str) -> Any:
    """Return the module ray, connected to the cluster at ``address``; a connection that there is already stays."""
    if importlib.util.find_spec("ray") is None:
        raise MissingDependencyError("ray", "ray", "Computing on a Ray cluster (--ray)")
    import ray

    if not ray.is_initialized():
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise UsageError(
                f"There is no Ray cluster at '{address}': {str(error).splitlines()[0]}",
                "Start one with 'ray start --head', and give its HOST:PORT, or auto on one of its machines.",
            ) from error
    return ray


def _packed(ray: Any, job: Job) -> Packed:
    """Put the job's files into the object store."""
    digest = hashlib.sha256(ray.get_runtime_context().get_job_id().encode())
    files: dict[str, tuple[Any, ...]] = {}
    for path in (found for name in job.files for found in _files(job.root / name)):
        name, pieces = path.relative_to(job.root).as_posix(), []
        digest.update(f"{name}|{path.stat().st_size}|".encode())
        with path.open("rb") as file:
            while piece := file.read(PIECE_BYTES):
                digest.update(piece)
                pieces.append(ray.put(np.frombuffer(piece, np.uint8)))
        files[name] = tuple(pieces)
    return Packed(digest.hexdigest()[:16], files)


def _store_is_full(error: Exception) -> ShardError:
    return ShardError(
        f"Ray's object store is full: {str(error).splitlines()[0]}",
        "Free space where Ray spills to ('ray start --temp-dir'), or give it more with --object-store-memory.",
    )


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())


@dataclass(eq=False)
class _Actor:
    """A worker: its handle, what it is asked now, and the shard that it computes; ``node``: its id, once it is open."""

    handle: Any
    started: Any
    asked: Any
    busy: int | None = None
    open: bool = False
    node: str = ""


@dataclass
class _ClusterPool:
    ray: Any
    crew: Cluster
    job: Job
    talk: Talk
    packed: Packed
    actors: list[_Actor] = field(default_factory=list)
    said: set[str] = field(default_factory=set)
    unfit: dict[str, str] = field(default_factory=dict)
    losses: int = 0
    last_sign: float = 0.0

    def run(self, shards: Sequence[Shard], progress: Progress) -> Iterator[tuple[int, Result]]:
        waiting, lost, left = deque(range(len(shards))), Counter[int](), len(shards)
        self._grow(left)
        self.last_sign = time.monotonic()
        while left:
            self._assign(waiting, shards)
            for actor in self._ready():
                answers = self._answers(actor)
                if answers is None:
                    self._lost(actor, shards, waiting, lost)
                    continue
                for answer in answers:
                    if answer[0] == "unfit":
                        self._unfit(actor, answer[2], waiting)
                        break
                    if answer[0] == "failed":
                        actor.busy = None
                        raise (
                            answer[2]
                            if answer[1] is None
                            else in_shard(answer[2], shards[answer[1]])
                        )
                    if answer[0] == "done":
                        actor.busy = None
                        left -= 1
                        # Arrays from the store are read-only views of it.
                        yield (
                            answer[1],
                            {name: np.array(array) for name, array in answer[2].items()},
                        )
                    elif answer[0] == "steps":
                        progress(answer[1], answer[2])
                    else:
                        self._say(*answer)

    def end(self) -> None:
        """End all workers, and remove the files from the nodes where a worker has nothing else to do."""
        idle = [
            actor.handle.forget.remote()
            for actor in self.actors
            if actor.open and actor.busy is None
        ]
        if idle:
            self.ray.wait(idle, num_returns=len(idle), timeout=LOOK_SECONDS)
        for actor in self.actors:
            self.ray.kill(actor.handle)
        self.actors.clear()

    def _grow(self, shards: int) -> None:
        """Start workers for so many shards, as far as the cluster's processors allow, spread over its nodes."""
        sizes = self._sizes()
        each = self._processors(sizes)
        fit = self.crew.workers or max(1, sum(size // each for size in sizes))
        count = min(fit, shards)
        if count <= len(self.actors):
            return
        on = f"{len(sizes)} nodes" if len(sizes) > 1 else "1 node"
        many = f"{count} workers" if count > 1 else "1 worker"
        processors = f"{each} processors" if each > 1 else "1 processor"
        self.talk.line(f"  {self.job.name} on {many} of a Ray cluster of {on}, {processors} each")
        for _ in range(count - len(self.actors)):
            self._add(each)

    def _processors(self, sizes: list[int]) -> int:
        """Return the processors that Ray sets aside for a worker: its threads, as far as any node has so many."""
        return max(1, min(self.crew.threads_of_shard().runtime, max(sizes, default=1)))

    def _add(self, processors: int, node: str | None = None) -> None:
        """Start a worker: anywhere, or on ``node``."""
        # Ray hides GPUs from workers that ask for none, and nodes differ: workers there compute on the CPU.
        environment = {
            **self.crew.threads_of_shard().environment(),
            COMPUTE_VARIABLE: Compute().text,
        }
        # A lost worker is not restarted by Ray but by us: it must open its job again.
        options = {"num_cpus": processors, "max_restarts": 0, "scheduling_strategy": "SPREAD"}
        if node is not None:
            from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

            options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(node, soft=False)
        remote = self.ray.remote(_OnRay).options(**options, runtime_env={"env_vars": environment})
        handle = remote.remote()
        started = handle.__ray_ready__.remote()
        self.actors.append(
            _Actor(handle, started, handle.open.remote(self.job.opener, self.packed))
        )

    def _assign(self, waiting: deque[int], shards: Sequence[Shard]) -> None:
        for actor in self.actors:
            if waiting and actor.open and actor.busy is None:
                actor.busy = waiting.popleft()
                actor.asked = actor.handle.run.remote(actor.busy, shards[actor.busy].task)

    def _ready(self) -> list[_Actor]:
        """Wait a little; return the workers that have answered or are lost."""
        asked = [actor.asked for actor in self.actors if actor.busy is not None or not actor.open]
        found, _ = self.ray.wait(asked, num_returns=1, timeout=LOOK_SECONDS)
        if found or any(actor.open for actor in self.actors) or self._started():
            self.last_sign = time.monotonic()
        elif time.monotonic() - self.last_sign > WAITING_SECONDS:
            raise ShardError(
                f"The Ray cluster started no worker within {WAITING_SECONDS:.0f} s.",
                "Check 'ray status': its processors may be in use, or its nodes lost.",
            )
        return [actor for actor in self.actors if actor.asked in found]

    def _started(self) -> bool:
        """Whether a worker is there, which may take long to get its files."""
        started, _ = self.ray.wait(
            [actor.started for actor in self.actors], num_returns=1, timeout=0
        )
        return bool(started)

    def _answers(self, actor: _Actor) -> list[Any] | None:
        """Return what the worker answers; None where it or its answer is lost."""
        errors = self.ray.exceptions
        try:
            found = self.ray.get(actor.asked)
        except (
            errors.RayActorError,
            errors.ObjectLostError,
            errors.NodeDiedError,
            errors.WorkerCrashedError,
        ):
            return None
        except (errors.RaySystemError, errors.RuntimeEnvSetupError) as error:
            raise ShardError(f"The Ray cluster failed: {error}", "Check 'ray status'.") from error
        except (errors.OutOfDiskError, errors.ObjectStoreFullError) as error:
            raise _store_is_full(error) from error
        if actor.open:
            return list(found)
        actor.node, (facts, answers) = found
        self._compare(facts)
        actor.open = True
        return list(answers)

    def _compare(self, facts: Facts) -> None:
        """Refuse a node of other versions; say that one has another processor."""
        here = Facts.here()
        for (name, ours), (_, theirs) in zip(here.versions, facts.versions, strict=True):
            if ours != theirs:
                raise UsageError(
                    f"A node of the Ray cluster has {name} {theirs}, this machine {ours}.",
                    "Install the same versions on all: results would differ in their last digits, or more.",
                )
        if here.processor != facts.processor:
            self._say(
                "warn",
                "a node has another processor type than this machine: last digits may differ",
            )

    def _lost(
        self, actor: _Actor, shards: Sequence[Shard], waiting: deque[int], lost: Counter[int]
    ) -> None:
        """Replace a worker; its shard waits again, before the others, unless it was lost too often."""
        self.actors.remove(actor)
        self.losses += 1
        if actor.busy is not None:
            lost[actor.busy] += 1
            shard = shards[actor.busy]
            if lost[actor.busy] > self.crew.repeats:
                raise lost_too_often(shard, lost[actor.busy], "or its node was lost", 1)
            self.talk.warn(
                f"a worker or its node was lost; the shard '{shard.name}' is computed again"
            )
            waiting.appendleft(actor.busy)
        elif self.losses > self.crew.repeats * (len(self.actors) + 1):
            raise ShardError(
                f"{self.losses} workers were lost on the Ray cluster, the last while it opened its job.",
                "Check 'ray status' and the nodes' memory.",
            )
        # Where the cluster has no room for it, the others go on without.
        self._add(self._processors(self._sizes()))

    def _sizes(self) -> list[int]:
        """Return the processors of the nodes."""
        return [int(node["Resources"].get("CPU", 0)) for node in self.ray.nodes() if node["Alive"]]

    def _unfit(self, actor: _Actor, why: str, waiting: deque[int]) -> None:
        """Continue without a node that cannot keep files; its shard goes back to the front of the queue."""
        self.actors.remove(actor)
        self.ray.kill(actor.handle)
        if actor.busy is not None:
            waiting.appendleft(actor.busy)
        nodes = {node["NodeID"]: node for node in self.ray.nodes() if node["Alive"]}
        if actor.node not in self.unfit:
            self.unfit[actor.node] = f"{_name(actor.node, nodes.get(actor.node))}: {why}"
            self._say("warn", f"{self.unfit[actor.node]}; the work continues without it")
        if self.actors:
            return
        fit = [
            node
            for node, about in nodes.items()
            if node not in self.unfit and about["Resources"].get("CPU", 0) >= 1
        ]
        if not fit:
            raise ShardError(
                f"No node of the Ray cluster can keep the files of {self.job.name}. {'; '.join(self.unfit.values())}.",
                "Free some space there, or start Ray on it with TMPDIR=FOLDER, a folder on a disk with free space.",
            )
        for node in fit[: self.crew.workers]:
            self._add(self._processors(self._sizes()), node)

    def _say(self, kind: str, text: str) -> None:
        if text not in self.said:
            self.said.add(text)
            (self.talk.warn if kind == "warn" else self.talk.line)(text)


def _name(node: str, about: Mapping[str, Any] | None) -> str:
    """Name a node for people: its address and host, and the begin of its id, since a machine may have several."""
    if about is None:
        return f"node {node[:8]}"
    return f"node {about['NodeManagerAddress']} ({about['NodeManagerHostname']}, {node[:8]})"


class _OnRay(NodeWorker):
    """A worker as an actor: knows its node, and gets what references stand for."""

    def open(self, opener: Any, packed: Packed) -> tuple[str, tuple[Facts, list[Any]]]:  # type: ignore[override]
        """Open the job on this node; return the node's id with the answers."""
        import ray

        node = ray.get_runtime_context().get_node_id()
        # A store that can take no more pieces never answers: TimeoutError is an OSError, so the
        # node is unfit then.
        return node, super().open(node, opener, packed, partial(ray.get, timeout=WAITING_SECONDS))
