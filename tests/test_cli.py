"""The command line's own part: help, versions, lists."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

import mpq_deploy
from mpq_deploy.cli import app

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
