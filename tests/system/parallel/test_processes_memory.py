"""Workers that would not fit are refused before the first one starts, with the number that fits."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpq_deploy.errors import UsageError
from mpq_deploy.system.parallel.processes import PROCESS_BYTES, Processes, check_workers
from mpq_deploy.system.parallel.work import Job, Shard, run_shards
from mpq_deploy.system.progress import Talk

GB = 10**9
EACH = GB + PROCESS_BYTES


def never(root: Path, talk: Talk) -> None:
    raise AssertionError("a worker was started")


JOB = Job("probes", never, Path(), (), GB)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("free", "advice"), [(3, "--workers 3"), (1, "one process"), (0, "Not even one")]
)
def test_workers_are_refused_with_the_number_that_fits(
    monkeypatch: pytest.MonkeyPatch, free: int, advice: str
) -> None:
    monkeypatch.setenv("MPQ_DEPLOY_MEMORY", str(free * EACH + 1))
    with pytest.raises(
        UsageError, match=r"4 workers would need about 5\.6 GB of memory for probes"
    ) as caught:
        check_workers(4, JOB, Talk())
    assert advice in caught.value.hint
    if free:
        check_workers(free, JOB, Talk())


def test_no_worker_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPQ_DEPLOY_MEMORY", "1GB")
    with (
        pytest.raises(UsageError, match="2 workers would need"),
        Processes(2).open(JOB, Talk()) as pool,
    ):
        list(run_shards(pool, "probes", [Shard("one", None), Shard("two", None)], Talk()))
