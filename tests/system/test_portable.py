"""Nothing needs what only Unix has: modules and functions that Windows lacks are taken away, in children, too."""

from __future__ import annotations

import ast
import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import mpq_deploy
from tests.pipeline.runs import call, save_denoiser

# Imported by every Python of the test. psutil comes first: on Linux it is built on resource.
BLOCK = """
import os, sys
try:
    import psutil
except ImportError:
    pass
BLOCKED = ("fcntl", "resource", "pwd", "grp", "termios")
# Of the tests alone, and written for the system that it finds itself on.
TESTS_ONLY = ("peft", "accelerate")
for name in (*BLOCKED, *TESTS_ONLY):
    sys.modules[name] = None
for name in ("fork", "forkpty", "getpgid", "setsid", "killpg", "getuid", "geteuid", "sched_getaffinity"):
    vars(os).pop(name, None)
os.environ["BLOCKED"] = "1"
"""
# Less than recipes/quick.yaml, every stage nevertheless.
TINY = """
calibrate: {timesteps: 2, samples: 4, observed: 4, steps: 4}
measure: {probes: 1, timesteps: 2, samples: 2, calls: 2}
quantize: {rounding: nearest}
evaluate: {samples: 2, steps: 4, timesteps: 2}
"""
MODULES = [
    m.name
    for m in pkgutil.walk_packages(mpq_deploy.__path__, "mpq_deploy.")
    if "demo" not in m.name
]
ROOT = Path(mpq_deploy.__file__).parents[1]


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Variables of the environment for a Python that is not on Unix."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "sitecustomize.py").write_text(BLOCK, encoding="utf-8")
    path = [str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(filter(None, path))}


def test_every_module_is_imported(elsewhere: dict[str, str]) -> None:
    code = f"""
import importlib, os
assert os.environ["BLOCKED"] and not hasattr(os, "fork")
for name in {MODULES}:
    importlib.import_module(name)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **elsewhere},
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("arguments", [("--help",), ("--json", "doctor")], ids=["help", "doctor"])
def test_the_machine_is_described(elsewhere: dict[str, str], arguments: tuple[str, ...]) -> None:
    done = call(*arguments, **elsewhere)
    assert done.returncode == 0, done.stderr
    if "--json" in arguments:
        values = {one["name"]: one["value"] for one in json.loads(done.stdout)}
        assert "GB available" in values["memory"] and int(values["CPU cores"]) >= 1


def test_a_model_is_checked(elsewhere: dict[str, str], tmp_path: Path) -> None:
    done = call("check", save_denoiser(tmp_path), **elsewhere)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_bundled_digits_are_built(elsewhere: dict[str, str], tmp_path: Path) -> None:
    pytest.importorskip("torch")
    run = tmp_path / "run"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(TINY, encoding="utf-8")
    build = ("build", "digits", "-r", recipe, "--budget", "0.35", "-o", run)
    done = call(*build, **elsewhere)
    assert done.returncode == 0, done.stderr
    assert (run / "report.html").is_file() and not (run / ".owner").exists()


def unnamed(call: ast.Call) -> bool:
    """Whether ``call`` reads or writes text in the locale's encoding. ruff sees it only where it knows the type."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else ""
    named = {keyword.arg for keyword in call.keywords}
    if name == "write_text":
        return len(call.args) == 1 and "encoding" not in named
    return name == "read_text" and not call.args and "encoding" not in named


@pytest.mark.parametrize("room", ["mpq_deploy", "tests", "benchmarks", "scripts"])
def test_text_files_name_their_encoding(room: str) -> None:
    found = [
        f"{path}:{node.lineno}"
        for path in (ROOT / room).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and unnamed(node)
    ]
    assert not found
