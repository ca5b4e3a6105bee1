"""The command line's own part: help, versions, lists."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import mpq_deploy
from mpq_deploy import cli
from mpq_deploy.cli import app
from mpq_deploy.cli.app import State, make_talk
from mpq_deploy.errors import MpqError
from mpq_deploy.system.progress import PlainTalk

RUNNER = CliRunner(env={"COLUMNS": "80", "NO_COLOR": "1", "TERM": "dumb"})
COMMANDS = [
    *(
        "build",
        "export",
        "calibrate",
        "measure",
        "allocate",
        "quantize",
        "engine",
        "evaluate",
        "report",
    ),
    *(
        "sweep",
        "sample",
        "check",
        "compare",
        "gate",
        "package",
        "install",
        "deploy",
        "bench",
        "targets",
        "doctor",
    ),
]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_with_an_example_in_80_columns(command: str) -> None:
    result = RUNNER.invoke(app, [command, "--help"])
    assert result.exit_code == 0
    assert f"Example: mpq-deploy {command}" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_the_first_help_names_every_command() -> None:
    result = RUNNER.invoke(app, ["--help"])
    assert all(f" {command} " in result.stdout for command in COMMANDS)


def test_help_loads_nothing_heavy() -> None:
    script = (
        "import sys; import mpq_deploy.cli; "
        "heavy = {'torch', 'diffusers', 'onnx', 'onnxruntime', 'numpy', 'pydantic', 'matplotlib', 'tensorrt_rtx'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, encoding="utf-8", check=True
    )
    assert done.stdout.strip() == "[]"


def test_version() -> None:
    assert RUNNER.invoke(app, ["--version"]).stdout.strip() == mpq_deploy.__version__


def test_targets_are_listed_and_shown_as_json() -> None:
    listed = json.loads(RUNNER.invoke(app, ["--json", "targets"]).stdout)
    assert {"rtx", "jetson-agx-orin", "onnxruntime-cpu"} <= {target["name"] for target in listed}
    shown = json.loads(RUNNER.invoke(app, ["--json", "targets", "rtx"]).stdout)
    assert shown in listed


def test_doctor_finds_onnxruntime() -> None:
    findings = json.loads(RUNNER.invoke(app, ["--json", "doctor"]).stdout)
    assert any(f["name"] == "onnxruntime" and f["status"] == "ok" for f in findings)


def test_a_target_is_printed_in_80_columns() -> None:
    shown = RUNNER.invoke(app, ["targets", "jetson-agx-orin"]).stdout
    assert "TensorRT documents no INT4 convolution" in shown
    assert max(map(len, shown.splitlines())) <= 80


def _run(*arguments: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from mpq_deploy.cli import main; main()", *arguments],
        capture_output=True,
        encoding="utf-8",
        check=False,
        cwd=folder,
    )


def _reported(monkeypatch: pytest.MonkeyPatch, error: Exception) -> tuple[int, str]:
    """What ``main`` says, and its exit code, where a command raises ``error``."""
    said = io.StringIO()

    def fail() -> None:
        raise error

    monkeypatch.setattr(cli, "app", fail)
    monkeypatch.setattr(sys, "stderr", said)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert isinstance(ended.value.code, int)
    return ended.value.code, said.getvalue()


def test_quiet_leaves_warnings_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(State, "quiet", True)
    talk = make_talk()
    talk.line("A stage is made.")
    with talk.bar("measure", 3) as advance:
        advance(3)
    talk.warn("The plan is slow.")
    assert capsys.readouterr().err == "warning: The plan is slow.\n"


@pytest.mark.parametrize(
    "error", [KeyError("x"), RecursionError("deep"), MemoryError(), TypeError("a\nb")], ids=repr
)
def test_an_error_of_our_own_is_one_line_that_asks_for_a_report(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, said = _reported(monkeypatch, error)
    assert code == 70
    first, second = said.splitlines()
    assert type(error).__name__ in first and "--debug" in second


def test_control_characters_of_names_are_shown_as_escapes(monkeypatch: pytest.MonkeyPatch) -> None:
    code, said = _reported(monkeypatch, MpqError("no '\x1b[2Jlayer\r\u202e'", "Mend '\x9b'."))
    assert code == 1
    assert said == "mpq-deploy: no '\\x1b[2Jlayer\\x0d\\u202e'\n  Mend '\\x9b'.\n"
    stream = io.StringIO()
    PlainTalk(stream).warn("layer \x1b[31m\nof two lines")
    assert stream.getvalue() == "warning: layer \\x1b[31m\nof two lines\n"


def test_check_ends_with_2_where_the_file_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_bytes(b"no model")
    for name in ("x.onnx", "none.onnx"):
        done = _run("check", str(tmp_path / name))
        assert done.returncode == 2
        assert name in done.stderr and "Traceback" not in done.stderr


def test_a_deleted_folder_and_a_closed_reader_are_one_line_at_most(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    script = "import os; os.rmdir(os.getcwd()); from mpq_deploy.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", script, "targets"],
        capture_output=True, encoding="utf-8", check=False, cwd=gone,
    )  # fmt: skip
    assert done.returncode == 2
    assert "current folder" in done.stderr and len(done.stderr.splitlines()) == 2
    script = (
        "import sys; sys.argv[1:] = ['--json', 'targets']; from mpq_deploy.cli import main; main()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert child.stdout and child.stderr
    child.stdout.close()
    assert child.stderr.read() == b""
    # As typer counts a reader that has gone.
    assert child.wait() == 1
