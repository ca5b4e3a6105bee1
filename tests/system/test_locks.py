"""Locks: who holds a folder is named, and a holder that is killed leaves no lock behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mpq_deploy.errors import UsageError
from mpq_deploy.system.locks import (
    HeldError,
    alone_with,
    check_private,
    hold_folder,
    scratch_folder,
)

SCRATCH = """
import sys, time
from pathlib import Path
from mpq_deploy.system.locks import scratch_folder
with scratch_folder("session", Path(sys.argv[1])) as folder:
    (folder / "weights").write_bytes(b"w")
    print(folder, flush=True)
    time.sleep(600)
"""
HOLD = """
import sys, time
from pathlib import Path
from mpq_deploy.system.locks import alone_with, hold_folder
with {lock}(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def holder(lock: str, path: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", HOLD.format(lock=lock), str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, encoding="utf-8")
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_a_held_folder_names_its_holder_and_is_free_after_a_kill(tmp_path: Path) -> None:
    with holder("hold_folder", tmp_path) as process:
        with pytest.raises(HeldError, match=f"^{process.pid}$"), hold_folder(tmp_path):
            pass
        process.kill()
    for _ in range(2):
        with hold_folder(tmp_path):
            assert (tmp_path / ".owner").is_file()
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_one_process_at_a_time_has_a_file_that_it_cannot_write(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"weights")
    path.chmod(0o444)
    tmp_path.chmod(0o555)
    with holder("alone_with", path) as process:
        waiting = holder_started(path)
        with pytest.raises(subprocess.TimeoutExpired):
            waiting.wait(1.0)
        process.kill()
        assert waiting.wait(30) == 0
    with alone_with(path):
        assert path.read_bytes() == b"weights"
    tmp_path.chmod(0o755)


def holder_started(path: Path) -> subprocess.Popen[bytes]:
    code = HOLD.format(lock="alone_with").replace("time.sleep(600)", "pass")
    return subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.DEVNULL)


def test_what_a_killed_process_left_is_removed_at_the_next_start_and_nothing_else(
    tmp_path: Path,
) -> None:
    living, killed = (
        subprocess.Popen(
            [sys.executable, "-c", SCRATCH, str(tmp_path)], stdout=subprocess.PIPE, encoding="utf-8"
        )
        for _ in range(2)
    )
    assert living.stdout and killed.stdout
    lives, left = (Path(one.stdout.readline().strip()) for one in (living, killed))
    (tmp_path / "session-of-mine").mkdir()
    killed.kill()
    killed.wait()
    assert (left / "weights").is_file()
    with scratch_folder("session", tmp_path) as folder:
        assert list(folder.iterdir()) == []
        assert not left.exists()
        assert (lives / "weights").is_file()
    assert not folder.exists()
    living.kill()
    living.wait()
    with scratch_folder("session", tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["session-of-mine"]


def test_a_folder_that_others_may_write_into_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    check_private(tmp_path)
    tmp_path.chmod(0o777)
    with pytest.raises(UsageError, match="may be written by others"):
        check_private(tmp_path)
    tmp_path.chmod(0o700)
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(UsageError, match="is a link"):
        check_private(tmp_path / "link")
    if os.getuid() == 0:
        os.chown(tmp_path, 12345, -1)
        with pytest.raises(UsageError, match="another user"):
            check_private(tmp_path)
