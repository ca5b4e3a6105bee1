"""Nothing needs what only Unix has: modules and functions that Windows lacks are taken away, in children, too."""

from __future__ import annotations

import ast
import json
import os
import pkgutil
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import mpq_deploy
from tests.pipeline.runs import call, save_denoiser

# Less than recipes/quick.yaml, every stage nevertheless.
TINY = """
calibrate: {timesteps: 2, samples: 4, observed: 4, steps: 4}
allocate: {schemes: [fp16, w8a8, w4a16-b32], branches: []}
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
RESERVED = {
    "con",
    "prn",
    "aux",
    "nul",
    *(f"{port}{n}" for port in ("com", "lpt") for n in range(10)),
}
# Of the 259 characters that a path may have, what a run folder leaves to the folder it lies in.
LONGEST = 120


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Variables of the environment for a Python that is not on Unix."""
    folder = tmp_path_factory.mktemp("site")
    shutil.copy(Path(__file__).with_name("windows_rules.py"), folder / "sitecustomize.py")
    path = [str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")]
    # A console of the code page that most of Europe and America has.
    console = {"PYTHONIOENCODING": "cp1252", "PYTHONWARNDEFAULTENCODING": "1", "PYTHONUTF8": "0"}
    return {"PYTHONPATH": os.pathsep.join(filter(None, path)), **console}


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
def test_a_model_is_exported_built_and_packed(elsewhere: dict[str, str], tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from tests.tiny_models import ONE_LEVEL_CLASSES, tiny_unet_folder

    model, run = tiny_unet_folder(tmp_path, **ONE_LEVEL_CLASSES), tmp_path / "run"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(TINY, encoding="utf-8")
    build = ("build", model, "-r", recipe, "--budget", "0.35", "-o", run, "--workers", "1")
    for arguments in (build, ("package", run, "-o", tmp_path / "model.mpq.tar")):
        done = call(*arguments, **elsewhere)
        assert done.returncode == 0, done.stderr
    assert (run / "report.html").is_file() and not (run / ".owner").exists()
    names = [path.relative_to(tmp_path) for path in run.rglob("*")]
    assert len({str(name).casefold() for name in names}) == len(names)
    assert not [name for name in names if not all(map(usable, name.parts))]
    assert max(len(str(name)) for name in names) < LONGEST


def usable(name: str) -> bool:
    """Whether Windows takes a file of that name."""
    reserved = name.split(".")[0].casefold() in RESERVED
    return not (reserved or set(name) & set('<>:"|?*\\') or name.endswith((".", " ")))


@pytest.mark.parametrize(
    ("code", "refused"),
    [
        ("open(p, 'w'); os.replace(p, q)", False),
        ("f = open(p, 'w'); os.replace(p, q)", True),
        ("f = open(q, 'w'); open(p, 'w'); os.replace(p, q)", True),
        ("np.zeros(9).tofile(p); m = np.memmap(p); os.remove(p)", True),
        ("np.zeros(9).tofile(p); m = np.memmap(p); shutil.rmtree(d)", True),
        ("open(p, 'w'); shutil.rmtree(d)", False),
        ("os.symlink(p, q)", True),
        ("import fcntl", True),
    ],
)
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no /proc to look into")
def test_the_rules_are_those_of_windows(
    elsewhere: dict[str, str], tmp_path: Path, code: str, refused: bool
) -> None:
    start = f"import os, shutil, numpy as np; d = {str(tmp_path)!r}; p, q = d + '/p', d + '/q'\n"
    command = [sys.executable, "-c", start + code]
    done = subprocess.run(command, env={**os.environ, **elsewhere}, capture_output=True)
    assert (done.returncode != 0) == refused, done.stderr


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
