"""Children: their output and fate come back, and they end with their parent."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mpq_deploy.system.children import ORPHANED, fate, read_frame, run_child, write_frame

# A module that writes its process id and does what it is told.
CHILD = """
import os, sys, time
from mpq_deploy.system.children import orders_from_parent
orders_from_parent()
open(sys.argv[1], "w", encoding="utf-8").write(str(os.getpid()))
print("said", sys.stdin.read() == "")
if sys.argv[2] == "wait":
    time.sleep(600)
if sys.argv[2] == "spin":
    while True:
        pass
sys.exit(7)
"""
PARENT = "import sys; from mpq_deploy.system.children import run_child; run_child('a_child', *sys.argv[1:])"


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "a_child.py").write_text(CHILD, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    return "a_child"


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_child_gives_its_output_and_exit_code(module: str, tmp_path: Path) -> None:
    done = run_child(module, str(tmp_path / "pid"), "end")
    assert (done.returncode, done.stdout) == (7, "said True\n")
    with pytest.raises(subprocess.TimeoutExpired):
        run_child(module, str(tmp_path / "pid"), "wait", seconds=2.0)
    assert not alive(int((tmp_path / "pid").read_text(encoding="utf-8")))


@pytest.mark.parametrize("busy", ["wait", "spin"])
def test_a_child_ends_when_its_parent_is_killed(module: str, tmp_path: Path, busy: str) -> None:
    told = tmp_path / "pid"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, str(told), busy], env=environment
    ) as parent:
        until = time.monotonic() + 60
        while not (told.exists() and told.read_text(encoding="utf-8")):
            assert parent.poll() is None and time.monotonic() < until
            time.sleep(0.02)
        child = int(told.read_text(encoding="utf-8"))
        assert alive(child)
        parent.kill()
    until = time.monotonic() + 10
    while alive(child) and time.monotonic() < until:
        time.sleep(0.02)
    assert not alive(child)


def test_the_fate_is_named() -> None:
    assert fate(ORPHANED) == "exited with code 5"
    assert fate(-signal.SIGTERM) == "was killed by SIGTERM"


def test_frames_come_whole_or_not_at_all() -> None:
    stream = io.BytesIO()
    for content in (b"one", bytes(100_000)):
        write_frame(stream, content)
    written = stream.getvalue()
    stream.seek(0)
    assert [read_frame(stream) for _ in range(3)] == [b"one", bytes(100_000), b""]
    assert read_frame(io.BytesIO(written[:10])) == b"" == read_frame(io.BytesIO(written[:3]))
