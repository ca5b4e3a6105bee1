"""Nothing that lies beside a model is imported: not by the command line, and not by its children."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mpq_deploy.system.children import run_child
from tests.pipeline.runs import build, recipe_for, save_denoiser

# Modules that some process of ours imports at its start or later.
PLANTED = (
    *("json", "numpy", "onnx", "onnxruntime", "onnx_ir", "tensorrt_rtx", "torch", "yaml", "queue"),
    *("difflib", "typer", "pydantic", "runpy", "pickle", "highspy", "tempfile", "argparse"),
)


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    """A folder with modules that leave a mark when they are imported."""
    folder = tmp_path / "strangers"
    folder.mkdir()
    mark = f"open({str(tmp_path / 'mark')!r}, 'a').write(__name__ + '\\n')\nraise SystemExit(9)\n"
    for name in PLANTED:
        (folder / f"{name}.py").write_text(mark, encoding="utf-8")
    return folder


def marks(folder: Path) -> str:
    mark = folder.parent / "mark"
    return mark.read_text(encoding="utf-8") if mark.exists() else ""


ROOT = str(Path(__file__).parents[2])


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": ROOT}
    return subprocess.run(
        command, capture_output=True, encoding="utf-8", check=False, cwd=folder, env=environment
    )


def test_the_planted_modules_would_run(planted: Path) -> None:
    assert run(planted, sys.executable, "-c", "import json").returncode == 9
    assert marks(planted)


def test_a_child_imports_nothing_from_its_folder(
    planted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(planted)
    done = run_child("mpq_deploy.engine.build_worker", "no-such-job", seconds=60)
    assert "There is no file no-such-job" in done.stderr
    assert not marks(planted)


@pytest.mark.parametrize("module", ["mpq_deploy.install", "mpq_deploy.bench"])
def test_python_m_imports_nothing_from_its_folder(module: str, planted: Path) -> None:
    done = run(planted, sys.executable, "-m", module, "no-such-file")
    assert "no-such-file" in done.stderr
    assert done.returncode in (1, 2)
    # Python itself imports runpy before it runs any module.
    assert set(marks(planted).split()) <= {"runpy"}


@pytest.mark.rtx
def test_a_build_and_its_workers_import_nothing_from_the_folder(
    planted: Path, tmp_path: Path
) -> None:
    recipe = recipe_for(save_denoiser(tmp_path))
    made = build(recipe, tmp_path / "run", "quantize").run
    start = "import sys; from mpq_deploy.cli import main; main()"
    script = (sys.executable, "-c", f"import sys; del sys.path[0]; {start}")
    for command in (
        ("measure", str(made), "--workers", "2"),
        ("engine", str(made)),
        ("bench", str(made), "--calls", "5", "--rounds", "1", "--warm-up", "1"),
    ):
        done = run(planted, *script, *command)
        assert done.returncode == 0, done.stderr
    assert not marks(planted)
