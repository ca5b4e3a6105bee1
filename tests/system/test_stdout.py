"""stdout carries data whatever a library or a child process writes to file descriptor 1."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from mpq_deploy.system.stdout import claim_stdout

# ``doctor`` with a library that writes to descriptor 1 directly, through C's buffered printf, and in a child.
NOISY = """
import ctypes, os, subprocess, sys
import mpq_deploy.system.doctor as doctor
from mpq_deploy.cli import main

find_gpus = doctor.find_gpus

def noisy():
    os.write(1, b"raw noise\\n")
    (ctypes.cdll.msvcrt if os.name == "nt" else ctypes.CDLL(None)).printf(b"buffered noise\\n")
    subprocess.run([sys.executable, "-c", "print('noise of a child')"], check=True)
    return find_gpus()

doctor.find_gpus = noisy
sys.argv = ["mpq-deploy", *sys.argv[1:]]
main()
"""
NOISE = ("raw noise", "buffered noise", "noise of a child")


def run(code: str, *arguments: str, **options: object) -> subprocess.CompletedProcess[bytes]:
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], check=False, timeout=120, **streams
    )


def test_an_answer_in_json_stays_json_when_libraries_print():
    done = run(NOISY, "--json", "doctor")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)
    assert all(line in done.stderr.decode() for line in NOISE)


def test_help_goes_to_stdout():
    done = run(NOISY, "--help")
    assert b"Usage" in done.stdout
    assert done.stderr == b""


def test_text_is_utf8_whatever_the_locale():
    code = "from mpq_deploy.system.stdout import claim_stdout; claim_stdout(); print('\\u00d7 \\udcff')"
    done = run(f"import sys; sys.stdout.reconfigure(encoding='ascii'); {code}")
    assert (done.returncode, done.stdout.decode().strip()) == (0, "\u00d7 \\udcff")


@pytest.mark.skipif(sys.platform == "win32", reason="a shell closes the streams")
@pytest.mark.parametrize("closed", ["1>&-", "2>&-", "1>&- 2>&-"])
def test_closed_streams_are_no_error(closed, tmp_path):
    line = f'"$0" -c "$1" --json doctor {closed}'
    done = subprocess.run(
        ["sh", "-c", line, sys.executable, NOISY], capture_output=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert ("1>&-" in closed) == (done.stdout == b"")
    assert not done.stdout or json.loads(done.stdout)


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo terminal")
def test_a_terminal_stays_one_and_is_written_by_lines():
    import os
    import pty

    parent, child = pty.openpty()
    code = (
        "from mpq_deploy.system.stdout import claim_stdout; claim_stdout(); import os, sys; print('line'); "
        "os.write(2, str(sys.stdout.isatty()).encode()); os._exit(0)"
    )
    done = run(code, stdout=child)
    os.close(child)
    assert done.stderr == b"True"
    assert os.read(parent, 100).strip() == b"line"
    os.close(parent)


def test_a_replaced_stdout_is_left_alone(capsys):
    before = sys.stdout
    claim_stdout()
    assert sys.stdout is before


@pytest.mark.skipif(os.name == "nt", reason="a pipe that nobody reads is another error on Windows")
def test_a_reader_that_has_read_enough_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from mpq_deploy.cli import _write_rest

    read, write = os.pipe()
    os.close(read)
    stream = os.fdopen(write, "w")
    monkeypatch.setattr(sys, "stdout", stream)
    stream.write("what nobody reads")
    _write_rest()
    # Python flushes once more at its end.
    stream.close()
