"""The same inputs give the same bytes: in another folder, with another hash seed, with other threads."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pipeline.runs import (
    Built,
    build,
    call,
    environment,
    recipe_for,
    stage_bytes,
    write_recipe,
)

ROOT = Path(__file__).parents[2]


def test_another_folder_and_process_give_the_same_bytes(
    model: Path, tmp_path: Path, finished: Built
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml")
    build = ("--quiet", "build", model, "-r", recipe, "-o", tmp_path / "run")
    done = call(*build, PYTHONHASHSEED="77")
    assert done.returncode == 0, done.stderr
    # --quiet: warnings alone.
    assert all(line.startswith("warning: ") for line in done.stderr.splitlines())
    assert stage_bytes(tmp_path / "run") == stage_bytes(finished.run)


def test_a_model_elsewhere_gives_the_same_bytes(
    model: Path, tmp_path: Path, finished: Built
) -> None:
    """Where the model lies is not part of what is made, but of what it was made from."""
    copy = Path(shutil.copytree(model.parent, tmp_path / "elsewhere")) / model.name
    build(recipe_for(copy), tmp_path / "run")
    here, there = (
        {
            name: content
            for name, content in stage_bytes(run).items()
            if not name.endswith("stage.json")
        }
        for run in (tmp_path / "run", finished.run)
    )
    different = {name for name in here if here[name] != there[name]}
    # The description of the denoiser names its source.
    assert different <= {"export/denoiser.json"}


def test_threads_do_not_change_what_is_chosen(model: Path, tmp_path: Path, finished: Built) -> None:
    """Sums over other numbers of threads round otherwise: figures agree to 1e-4, the choices and bytes exactly."""
    write_recipe(tmp_path / "recipe.yaml", model=str(model))
    code = (
        "import sys; from pathlib import Path; from mpq_deploy.recipe import load_recipe; "
        "from tests.pipeline.runs import build; "
        "build(load_recipe(Path(sys.argv[1])), Path(sys.argv[2]), 'allocate')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "recipe.yaml", tmp_path / "run"],
        env=environment(OMP_NUM_THREADS="2"),
        cwd=ROOT,
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    here, there = (
        json.loads((run / "allocate/plan.json").read_text(encoding="utf-8"))
        for run in (tmp_path / "run", finished.run)
    )
    assert here["schemes"] == there["schemes"]
    assert here["size_bytes"] == there["size_bytes"]
    assert here["predicted_loss"] == pytest.approx(there["predicted_loss"], rel=1e-4)
