"""A disk that fills up, and folders that cannot be written: a clear message, nothing finished is lost."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.pipeline.conftest import Outcome
from tests.pipeline.runs import Built, build, recipe_for, stage_bytes, write_recipe
from tests.pipeline.test_bad_input import refused

Cli = Callable[..., Outcome]
SIZE = 2 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    if shutil.which("mount") is None or os.geteuid() != 0:
        pytest.skip("only root can mount a small file system")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(place)],
        capture_output=True,
        encoding="utf-8",
    )
    if mounted.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def fill(disk: Path, left: int) -> Path:
    """Take all but ``left`` bytes of the disk."""
    ballast = disk / "ballast"
    free = shutil.disk_usage(disk).free
    ballast.write_bytes(bytes(max(free - left, 0)))
    return ballast


@pytest.mark.parametrize(
    ("done", "left"),
    [
        ("", 150_000),
        ("export", 8_192),
        ("calibrate", 30_000),
        ("candidates", 0),
        ("measure", 4_096),
        ("allocate", 30_000),
    ],
)
def test_a_disk_that_fills_up(
    cli: Cli, model: Path, finished: Built, disk: Path, tmp_path: Path, done: str, left: int
) -> None:
    """With ``left`` bytes free after the stage ``done`` a later one cannot be written."""
    run, recipe = disk / "run", recipe_for(model)
    file = write_recipe(tmp_path / "recipe.yaml")
    before = ("export", "calibrate", "candidates", "measure", "allocate")
    kept = before[: before.index(done) + 1] if done else ()
    run.mkdir()
    for name in (*kept, "run.json", "recipe.yaml") if done else ():
        copy = shutil.copytree if (finished.run / name).is_dir() else shutil.copy
        copy(finished.run / name, run / name)
    ballast = fill(disk, left)
    refused(cli("build", model, "-r", file, "-o", run), 1, "disk is full", "Free some space")
    assert stage_bytes(run, kept) == stage_bytes(finished.run, kept)
    assert not [path.name for path in run.iterdir() if path.name.endswith((".partial", ".old"))]
    ballast.unlink()
    again = build(recipe, run)
    assert not set(kept) & set(again.made)
    assert stage_bytes(run) == stage_bytes(finished.run)


def test_a_limit_on_the_size_of_files(
    cli: Cli, model: Path, finished: Built, run: Path, tmp_path: Path
) -> None:
    """A quota on one file (ulimit -f) is met like a full disk: no traceback, the run folder stays usable."""
    shutil.rmtree(run / "quantize")
    file = write_recipe(tmp_path / "recipe.yaml")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        outcome = cli("build", model, "-r", file, "-o", run)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    refused(outcome, 1, "File too large")
    assert build(recipe_for(model), run).made == ["quantize", "report"]
    assert stage_bytes(run) == stage_bytes(finished.run)


def test_a_folder_that_cannot_be_written(
    cli: Cli, model: Path, disk: Path, tmp_path: Path, finished: Built
) -> None:
    """A file system mounted read-only, with a finished run on it."""
    shutil.copytree(finished.run, disk / "run")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    file = write_recipe(tmp_path / "recipe.yaml", budget=0.5)
    refused(cli("build", model, "-r", file, "-o", disk / "run"), 1, "cannot be written", "-o")
    refused(cli("build", model, "-r", file, "-o", disk / "new"), 1, "cannot be written", "-o")
    assert stage_bytes(disk / "run") == stage_bytes(finished.run)


@pytest.mark.rtx
@pytest.mark.parametrize("left", [100_000, 400_000])
def test_a_disk_that_fills_up_while_an_engine_is_built(
    cli: Cli, model: Path, finished: Built, disk: Path, tmp_path: Path, left: int
) -> None:
    """The builder's child finds no room for its log, or for the engine: the same message as everywhere."""
    pytest.importorskip("tensorrt_rtx")
    shutil.copytree(finished.run, disk / "run")
    file = write_recipe(tmp_path / "recipe.yaml", engine__build=True)
    fill(disk, left)
    refused(
        cli("build", model, "-r", file, "-o", disk / "run"), 1, "disk is full", "Free some space"
    )
    assert stage_bytes(disk / "run") == stage_bytes(finished.run)
    assert not [
        path.name for path in (disk / "run").iterdir() if path.name.endswith((".partial", ".old"))
    ]
