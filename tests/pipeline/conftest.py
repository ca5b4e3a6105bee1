"""A finished run that the tests share, and the command line in this process."""

from __future__ import annotations

import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.pipeline.runs import Built, build, recipe_for, save_denoiser


@dataclass(frozen=True)
class Outcome:
    """What a command left: its exit code, stdout and stderr."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny ONNX denoiser with its YAML. Tests leave it as it is."""
    return save_denoiser(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def finished(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """A finished run of ``model``. Tests leave it as it is: ``run`` is a copy."""
    return build(recipe_for(model), tmp_path_factory.mktemp("finished") / "run")


@pytest.fixture
def run(finished: Built, tmp_path: Path) -> Path:
    """A copy of the finished run folder."""
    return Path(shutil.copytree(finished.run, tmp_path / "run"))


@pytest.fixture
def cli(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Outcome]:
    """``mpq-deploy`` as users run it, but in this process."""
    from mpq_deploy.cli import main

    def call(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["mpq-deploy", *map(str, arguments)])
        before = signal.getsignal(signal.SIGINT)
        capsys.readouterr()
        try:
            main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        else:
            code = 0
        finally:
            signal.signal(signal.SIGINT, before)
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return call
