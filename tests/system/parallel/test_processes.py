"""Shards over processes: the same bits whoever computes, whoever is killed; one error; nobody left behind."""

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mpq_deploy.errors import InfeasibleBudgetError, ModelError, UsageError
from mpq_deploy.evaluate.cache import SampleCache
from mpq_deploy.system.parallel.processes import Processes, kept_workers
from mpq_deploy.system.parallel.work import Alone, ShardError, run_shards
from mpq_deploy.system.progress import Talk
from tests.system.parallel.tasks import Task, job, shards

PARTS = 7


class Heard(Talk):
    def __init__(self):
        self.warnings, self.moves, self.total = [], [], None

    def warn(self, text):
        self.warnings.append(text)

    def bar(self, what, total):
        from contextlib import nullcontext

        self.total = total
        return nullcontext(self.moves.append)


def merged(crew, root, parts, talk=None, store=None):
    with crew.open(job(root), talk or Talk()) as pool:
        return list(run_shards(pool, "parts", parts, talk or Talk(), store))


def same(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected):
        for name in ("sum", "product", "text"):
            np.testing.assert_array_equal(one[name], other[name])
    order = np.sum([one["sum"] for one in found], axis=0)
    np.testing.assert_array_equal(order, np.sum([one["sum"] for one in expected], axis=0))


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def gone(pids, seconds=10.0):
    until = time.monotonic() + seconds
    while time.monotonic() < until and any(alive(pid) for pid in pids):
        time.sleep(0.05)
    return not any(alive(pid) for pid in pids)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_any_number_of_workers_gives_the_same_bits(tmp_path, workers):
    alone, heard = merged(Alone(), tmp_path / "job", shards(PARTS)), Heard()
    found = merged(Processes(workers), tmp_path / "job", shards(PARTS), heard)
    same(found, alone)
    pids = {int(result["pid"]) for result in found}
    assert os.getpid() not in pids and 1 <= len(pids) <= workers
    assert gone(pids)
    assert heard.total == sum(heard.moves) == 3 * PARTS
    assert heard.warnings == ["opened with care"]  # said once, however many workers say it


def pids_of(results):
    return {int(result["pid"]) for result in results}


def test_workers_take_the_next_job_until_the_block_ends(tmp_path):
    alone = merged(Alone(), tmp_path / "job", shards(PARTS))
    with kept_workers():
        # Both are there: two shards wait for each other.
        met = shards(
            2, at0=Task(0, "meet", tmp_path / "met-0"), at1=Task(1, "meet", tmp_path / "met-1")
        )
        first = pids_of(merged(Processes(2), tmp_path / "job", met))
        with kept_workers():
            again, heard = merged(Processes(2), tmp_path / "job", shards(PARTS), Heard()), Heard()
            same(again, alone)
            assert len(first) == 2 and pids_of(again) <= first
        other = pids_of(merged(Processes(2, threads=2), tmp_path / "job", shards(PARTS)))
        assert not other & first and all(alive(pid) for pid in first)
        # One that dies while it waits is one less.
        killed = min(first)
        os.kill(killed, signal.SIGKILL)
        same(merged(Processes(2), tmp_path / "job", shards(PARTS), heard), alone)
        assert gone([killed])
        # What fails ends those that are at it.
        with pytest.raises(ModelError):
            merged(Processes(2), tmp_path / "job", shards(1, at0=Task(0, "model")))
        same(merged(Processes(2), tmp_path / "job", shards(PARTS)), alone)
    assert gone(first | other)


@pytest.mark.parametrize("accident", ["killed", "exit"])
def test_a_worker_that_dies_changes_nothing(tmp_path, accident):
    alone, heard = merged(Alone(), tmp_path / "job", shards(PARTS)), Heard()
    once = shards(PARTS, at3=Task(3, accident, tmp_path / "happened"))
    same(merged(Processes(2), tmp_path / "job", once, heard), alone)
    assert (tmp_path / "happened").exists()
    said = [text for text in heard.warnings if "part 3" in text]
    assert len(said) == 1 and ("SIGKILL" if accident == "killed" else "code 3") in said[0]
    assert sum(heard.moves) == 3 * PARTS


def test_a_worker_killed_from_outside_changes_nothing(tmp_path):
    alone, told = merged(Alone(), tmp_path / "job", shards(PARTS)), tmp_path / "pid"

    def kill():
        while not (told.exists() and told.read_text(encoding="utf-8")):
            time.sleep(0.02)
        os.kill(int(told.read_text(encoding="utf-8")), signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    same(merged(Processes(2), tmp_path / "job", shards(PARTS, at2=Task(2, "hang", told))), alone)
    killer.join()


def test_a_shard_that_kills_every_worker_is_given_up_with_its_name(tmp_path):
    heard = Heard()
    with pytest.raises(ShardError, match=r"'part 1' was lost 2 times.*SIGKILL") as caught:
        merged(Processes(2, repeats=1), tmp_path / "job", shards(3, at1=Task(1, "killed")), heard)
    assert "fewer than 2 workers" in caught.value.hint
    assert sum("part 1" in text for text in heard.warnings) == 1


@pytest.mark.parametrize("crew", [Alone(), Processes(1), Processes(2)], ids=["alone", "one", "two"])
def test_an_error_of_ours_comes_back_whole_and_names_the_shard(tmp_path, crew):
    with pytest.raises(ModelError) as caught:
        merged(crew, tmp_path / "job", shards(3, at1=Task(1, "model")))
    assert caught.value.message == "The tensor 'x' holds NaN."
    assert caught.value.hint == "Check the weights. It came from the shard 'part 1'."
    with pytest.raises(InfeasibleBudgetError) as other:
        merged(crew, tmp_path / "job", shards(3, at2=Task(2, "budget")))
    assert other.value.smallest == 1234 and other.value.exit_code == 2


def test_an_unexpected_error_is_one_error_with_its_traceback(tmp_path):
    with pytest.raises(ShardError, match="ZeroDivisionError: one over nothing") as caught:
        merged(Processes(2), tmp_path / "job", shards(3, at1=Task(1, "bug")))
    assert "part 1" in caught.value.hint and "in happen" in str(caught.value.__cause__)


def test_a_job_that_cannot_be_opened_is_one_error(tmp_path):
    elsewhere = replace(job(tmp_path / "job"), root=tmp_path)
    with (
        pytest.raises(ShardError, match=r"FileNotFoundError.*file\.txt"),
        Processes(2).open(elsewhere, Talk()) as pool,
    ):
        list(run_shards(pool, "parts", shards(3), Talk()))


@pytest.mark.parametrize("crew", [Alone(), Processes(2)], ids=["alone", "two"])
def test_finished_shards_are_kept_and_not_computed_again(tmp_path, crew):
    store = SampleCache(tmp_path / "kept", Talk())
    with pytest.raises(ModelError):
        merged(Processes(1), tmp_path / "job", shards(PARTS, at3=Task(3, "model")), store=store)
    assert len(list((tmp_path / "kept").iterdir())) == 3
    heard = Heard()
    # Those that are finished would hang if they were computed.
    parts = shards(PARTS, **{f"at{n}": Task(n, "hang") for n in range(3)})
    same(
        merged(crew, tmp_path / "job", parts, heard, store),
        merged(Alone(), tmp_path / "job", shards(PARTS)),
    )
    assert sum(heard.moves) == 3 * PARTS


def test_results_are_merged_as_soon_as_their_turn_comes(tmp_path):
    with Processes(2).open(job(tmp_path / "job"), Talk()) as pool:
        results = run_shards(pool, "parts", shards(3, at2=Task(2, "hang")), Talk())
        first = [next(results), next(results)]
    same(first, merged(Alone(), tmp_path / "job", shards(2)))


def test_threads_are_those_of_this_process_or_those_asked_for(tmp_path):
    found = merged(Processes(2), tmp_path / "job", shards(2))
    assert {str(result["threads"]) for result in found} == {os.environ["OMP_NUM_THREADS"]}
    found = merged(Processes(2, threads=3), tmp_path / "job", shards(2))
    assert {str(result["threads"]) for result in found} == {"3"}


@pytest.mark.parametrize("change", [{"workers": 0}, {"workers": 1, "threads": 0}])
def test_fewer_than_one_is_refused(change):
    with pytest.raises(UsageError, match="is 0"):
        Processes(**change)


@pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name
)
def test_no_process_outlives_a_stopped_call(tmp_path, number):
    root, repository = tmp_path / "job", Path(__file__).parents[3]
    code = (
        "import signal, sys; from pathlib import Path; from mpq_deploy.cli import _stop\n"
        "from mpq_deploy.system.parallel.processes import Processes\n"
        "from tests.system.parallel.tasks import Task, shards\n"
        "from tests.system.parallel.test_processes import merged\n"
        "signal.signal(signal.SIGINT, _stop); root = Path(sys.argv[1])\n"
        "merged(Processes(2), root, shards(4, at0=Task(0, 'hang', root / 'a'), at1=Task(1, 'hang', root / 'b')))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(root)],
        cwd=repository,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    told = [root / "a", root / "b"]
    until = time.monotonic() + 60
    while not all(path.exists() and path.read_text(encoding="utf-8") for path in told):
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    pids = [int(path.read_text(encoding="utf-8")) for path in told]
    assert all(alive(pid) for pid in pids)
    # As a terminal does it for SIGINT: the whole foreground group gets it.
    os.killpg(process.pid, number)
    process.communicate(timeout=30)
    assert process.returncode != 0 and gone(pids)
