"""Work for worker processes: it has to be importable there."""

from __future__ import annotations

import errno
import os
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mpq_deploy.errors import InfeasibleBudgetError, ModelError
from mpq_deploy.system.parallel.work import Job, Result, Shard
from mpq_deploy.system.progress import Talk


@dataclass(frozen=True)
class Task:
    """What a shard does before its numbers: nothing, or an accident, once (``until`` exists) or always."""

    number: int
    accident: str = ""
    until: Path | None = None


def noise(task: Task, talk: Talk) -> Result:
    """Sums that round otherwise in another order, of numbers that depend on the shard alone."""
    with talk.bar("inner", 3) as advance:
        values = np.random.default_rng(task.number).standard_normal((200, 50), np.float32)
        advance(1)
        if task.accident and not (task.until and task.until.exists()):
            happen(task)
        advance(2)
    return {"sum": values.sum(0), "product": values.T @ values, "pid": np.array(os.getpid())}


def happen(task: Task) -> None:
    if task.until:
        task.until.write_text(str(os.getpid()), encoding="utf-8")
    if task.accident == "meet":
        # Until another shard is computed at the same time.
        while len(list(task.until.parent.glob("met-*"))) < 2:
            time.sleep(0.02)
        return
    if task.accident == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if task.accident == "exit":
        os._exit(3)
    if task.accident == "model":
        raise ModelError("The tensor 'x' holds NaN.", "Check the weights.")
    if task.accident == "budget":
        raise InfeasibleBudgetError("No plan fits.", "Give more.", 1234)
    if task.accident == "bug":
        raise ZeroDivisionError("one over nothing")
    if task.accident.startswith("wait for "):
        while not Path(task.accident.removeprefix("wait for ")).exists():
            time.sleep(0.02)
        return
    if task.accident.startswith("full"):
        fill(task)
        return
    time.sleep(600)


def fill(task: Task) -> None:
    """Say that the disk is full: on every node ("full"), or on the first that comes ("full once", in a file)."""
    if task.accident != "full":
        import ray

        node, place = (
            ray.get_runtime_context().get_node_id(),
            Path(task.accident.removeprefix("full once ")),
        )
        with suppress(FileExistsError), place.open("x", encoding="utf-8") as file:
            file.write(node)
        if place.read_text(encoding="utf-8") != node:
            return
    raise OSError(errno.ENOSPC, "No space left on device")


def opened(word: str, root: Path, talk: Talk) -> Any:
    """Open: say so, and read what the job's file holds."""
    talk.warn(f"opened with {word}")
    text = (root / "file.txt").read_text(encoding="utf-8")

    def work(task: Task, inner: Talk) -> Result:
        return {
            **noise(task, inner),
            "text": np.array(text),
            "threads": np.array(os.environ.get("OMP_NUM_THREADS")),
        }

    return work


def job(root: Path, **changes: Any) -> Job:
    root.mkdir(exist_ok=True)
    (root / "file.txt").write_text("a model", encoding="utf-8")
    return Job(
        **{
            "name": "noise",
            "opener": partial(opened, "care"),
            "root": root,
            "files": ("file.txt",),
            **changes,
        }
    )


def shards(count: int, **accidents: Task) -> list[Shard]:
    """``count`` shards; accidents by ``at<number>``."""
    found = [Task(number) for number in range(count)]
    for name, task in accidents.items():
        found[int(name.removeprefix("at"))] = task
    return [Shard(f"part {task.number}", task, 3, {"part": task.number}) for task in found]
