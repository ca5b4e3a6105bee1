"""A build that is killed continues where it stopped, and ends with the bytes of one that was not."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from mpq_deploy.run.pipeline import STAGES
from tests.pipeline import kills
from tests.pipeline.runs import (
    Built,
    build,
    call,
    children_of,
    command,
    environment,
    recipe_for,
    stage_bytes,
    write_recipe,
)

# The tiny recipe asks for no correction of the sampler and no training.
MADE = tuple(name for name in STAGES if name not in ("correction", "recover"))


@pytest.mark.parametrize(
    "prepare", [kills.kill_while_making, kills.kill_after], ids=["while", "after"]
)
def test_killed_at_every_stage(
    model: Path, tmp_path: Path, finished: Built, prepare: kills.Callable[[str], None]
) -> None:
    """One run folder is killed at each stage in turn: every call makes just the stages that the last one did not."""
    recipe, run = recipe_for(model), tmp_path / "run"
    for stage in MADE:
        code, _ = kills.build_in_child(recipe, run, prepare, stage)
        assert code == -signal.SIGKILL
        done = MADE[: MADE.index(stage) + (prepare is kills.kill_after)]
        present = [name for name in MADE[:-1] if (run / name).exists()]
        assert present == [name for name in done if name != "report"]
    code, made = kills.build_in_child(recipe, run)
    assert (code, made) == (0, ["report"])
    assert stage_bytes(run) == stage_bytes(finished.run)
    assert not [path.name for path in run.iterdir() if path.name.endswith((".partial", ".old"))]


def test_killed_while_sessions_map_the_weights(
    model: Path, tmp_path: Path, finished: Built
) -> None:
    """Nothing of the run is linked from elsewhere, and the next call goes on."""
    recipe, run = recipe_for(model), tmp_path / "run"
    for stage in ("calibrate", "evaluate"):
        code, _ = kills.build_in_child(recipe, run, kills.kill_in_session, stage)
        assert code == -signal.SIGKILL
        assert all(path.stat().st_nlink == 1 for path in run.rglob("*") if path.is_file())
    assert kills.build_in_child(recipe, run)[0] == 0
    assert stage_bytes(run) == stage_bytes(finished.run)


def test_killed_between_the_two_renames(model: Path, run: Path, finished: Built) -> None:
    """The old plan is already away, the new one not yet there: the next call makes it again."""
    recipe = recipe_for(model, budget=0.5)
    code, _ = kills.build_in_child(recipe, run, kills.kill_between_renames, "allocate")
    assert code == -signal.SIGKILL
    assert not (run / "allocate").exists()
    code, made = kills.build_in_child(recipe, run)
    assert (code, made) == (0, ["allocate", "quantize", "engine", "evaluate", "report"])
    assert not [path.name for path in run.iterdir() if path.name.endswith((".partial", ".old"))]
    code, made = kills.build_in_child(recipe_for(model), run)
    assert stage_bytes(run) == stage_bytes(finished.run)


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_stopped_by_the_user(model: Path, tmp_path: Path, finished: Built) -> None:
    """Ctrl-C through the command line: one line, exit code 130, and the run goes on afterwards."""
    recipe, run = write_recipe(tmp_path / "recipe.yaml"), tmp_path / "run"
    process = subprocess.Popen(
        command("build", model, "-r", recipe, "-o", run),
        stderr=subprocess.PIPE,
        encoding="utf-8",
        env=environment(),
    )
    wait_for(run / ".measure.partial", process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert (
        err.splitlines()[-1]
        == "mpq-deploy: stopped; the next call continues from the last finished stage"
    )
    assert "Traceback" not in err
    assert not (run / ".measure.partial").exists()
    assert build(recipe_for(model), run).made == [
        "measure",
        "allocate",
        "quantize",
        "controls",
        "engine",
        "evaluate",
        "report",
    ]
    assert stage_bytes(run) == stage_bytes(finished.run)


@pytest.fixture(scope="module")
def engined(model: Path, finished: Built, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The finished run with its engine. Tests leave it as it is."""
    pytest.importorskip("tensorrt_rtx")
    run = Path(shutil.copytree(finished.run, tmp_path_factory.mktemp("engined") / "run"))
    return build(recipe_for(model, engine__build=True), run)


@pytest.mark.rtx
def test_killed_while_an_engine_is_built(
    model: Path, run: Path, engined: Built, tmp_path: Path
) -> None:
    """The builder's child may outlive its parent; the next build does not meet it, and gives the same engine."""
    recipe = recipe_for(model, engine__build=True)
    file = write_recipe(tmp_path / "recipe.yaml", engine__build=True)
    process = subprocess.Popen(
        command("build", model, "-r", file, "-o", run),
        stderr=subprocess.PIPE,
        encoding="utf-8",
        env=environment(),
    )
    wait_for(run / ".engine.partial", process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert build(recipe, run).made == ["engine", "report"]
    layers = [
        (folder / "engine" / "layers.txt").read_text(encoding="utf-8")
        for folder in (run, engined.run)
    ]
    assert layers[0] == layers[1]


def builder_of(parent: int) -> list[int]:
    """The process that builds an engine for the process ``parent``."""
    return children_of(parent, "mpq_deploy.engine.build_worker")


@pytest.mark.rtx
@pytest.mark.parametrize("moment", ["starting", "building"])
def test_the_builder_itself_is_killed(
    model: Path, run: Path, engined: Built, tmp_path: Path, moment: str
) -> None:
    """As the kernel does for want of memory: one message that names the stage, nothing half done, then it goes on."""
    recipe = recipe_for(model, engine__build=True)
    file, log = write_recipe(tmp_path / "recipe.yaml", engine__build=True), run / "engine.log"
    log.write_text("[INFO] words of an earlier build\n", encoding="utf-8")
    before = stage_bytes(run)
    process = subprocess.Popen(
        command("build", model, "-r", file, "-o", run),
        stderr=subprocess.PIPE,
        encoding="utf-8",
        env=environment(),
    )
    wait_for(run / ".engine.partial", process)
    killed: list[int] = []
    while not killed:
        assert process.poll() is None, process.communicate()[1]
        if moment == "starting" or (
            "earlier"
            not in (text := log.read_text(encoding="utf-8") if log.exists() else "earlier")
            and text
        ):
            for child in builder_of(process.pid):
                os.kill(child, signal.SIGKILL)
                killed.append(child)
        time.sleep(0.01)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 1 and "Traceback" not in said
    line, hint = said.splitlines()[-2:]
    assert line.startswith(
        "mpq-deploy: The stage 'engine' was interrupted. The builder was killed (SIGKILL)"
    )
    assert (
        "printed nothing yet" if moment == "starting" else "last words: ["
    ) in line and "earlier" not in line
    assert hint.startswith("  Repeat the command") and str(log) in hint
    # What was finished is there; the stage engine is the former one, and nothing of the new one is left.
    assert stage_bytes(run) == before
    assert not [path.name for path in run.iterdir() if path.name.endswith((".partial", ".old"))]
    assert build(recipe, run).made == ["engine", "report"]
    layers = [
        (folder / "engine" / "layers.txt").read_text(encoding="utf-8")
        for folder in (run, engined.run)
    ]
    assert layers[0] == layers[1]


@pytest.mark.rtx
def test_two_engines_are_built_at_once(
    model: Path, run: Path, engined: Built, tmp_path: Path
) -> None:
    """In two run folders: the kernels and record of an engine that was built alone. In one the second is refused."""
    other = Path(shutil.copytree(run, tmp_path / "other"))
    file, ways = (
        write_recipe(tmp_path / "recipe.yaml", engine__build=True),
        {"stderr": subprocess.PIPE, "text": True},
    )
    builds = [
        subprocess.Popen(
            command("build", model, "-r", file, "-o", folder), env=environment(), **ways
        )
        for folder in (run, other)
    ]
    wait_for(run / ".engine.partial", builds[0])
    # It must not be done before the other one asks.
    builds[0].send_signal(signal.SIGSTOP)
    refused = call("build", model, "-r", file, "-o", run)
    builds[0].send_signal(signal.SIGCONT)
    assert (
        refused.returncode == 1
        and f"in use by another process (pid {builds[0].pid})" in refused.stderr
    )
    for process in builds:
        assert process.communicate(timeout=120)[1] is not None and process.returncode == 0

    def engine(folder: Path) -> tuple[str, dict[str, object]]:
        record = json.loads((folder / "engine" / "build.json").read_text(encoding="utf-8"))
        # The engine's own file differs between two builds by TensorRT in a few bytes, and in their number.
        return (folder / "engine" / "layers.txt").read_text(encoding="utf-8"), {
            **record,
            "sha256": "",
            "bytes": 0,
        }

    assert engine(run) == engine(other) == engine(engined.run)
