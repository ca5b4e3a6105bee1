"""Locks: who holds a folder is named, and a holder that is killed leaves no lock behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mpq_deploy.system.locks import HeldError, alone_with, hold_folder

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
