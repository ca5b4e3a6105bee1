"""Builds over several processes of which one is killed: every stage has the bytes of a build in one process."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from mpq_deploy.system.parallel import processes
from mpq_deploy.system.parallel.processes import Processes
from tests.forked import living_workers
from tests.pipeline.runs import Built, children_of, stage_bytes
from tests.pipeline.test_workers import PLAIN, over, plain, remade

__all__ = ["plain"]


@pytest.mark.parametrize("task", ["_Gather", "_Layer"])
def test_a_worker_killed_while_it_rounds_changes_nothing(
    model: Path, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str
) -> None:
    """Killed when it has just been given its first timestep, or its first layer."""
    run = remade(Path(shutil.copytree(plain, tmp_path / "run")), "candidates")
    real, killed = processes._ProcessPool._assign, []

    def assigning(self: Any, waiting: Any, shards: Any) -> None:
        real(self, waiting, shards)
        if not killed and any(
            w.busy is not None and type(shards[w.busy].task).__name__ == task for w in self.workers
        ):
            killed.append(self.workers[0].process.pid)
            os.kill(killed[0], signal.SIGKILL)

    monkeypatch.setattr(processes._ProcessPool, "_assign", assigning)
    _, said = over(
        Processes(2), model, run, lambda pipeline: pipeline.run_until("candidates"), **PLAIN
    )
    what = "Hessians 1 of 1, timestep" if task == "_Gather" else "layer "
    assert killed and f"a worker was killed by SIGKILL; the shard '{what}" in said
    assert stage_bytes(run) == stage_bytes(plain)
    assert not workers_of(os.getpid())


def test_a_worker_killed_while_it_measures_changes_nothing(
    model: Path, run: Path, finished: Built
) -> None:
    remade(run, "measure")
    ended = threading.Event()
    killed: list[int] = []

    def kill() -> None:
        while not killed and not ended.is_set():
            for pid in workers_of(os.getpid()):
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)
            time.sleep(0.02)

    killer = threading.Thread(target=kill)
    killer.start()
    _, said = over(Processes(2), model, run, lambda pipeline: pipeline.run_until("measure"))
    ended.set()
    killer.join()
    assert killed and "a worker was killed by SIGKILL; the shard 'probes" in said
    assert stage_bytes(run) == stage_bytes(finished.run)
    assert not workers_of(os.getpid())


def workers_of(parent: int) -> list[int]:
    """The worker processes that ``parent`` started, or had forked for it."""
    return children_of(parent, "mpq_deploy.system.parallel.child") + living_workers()
