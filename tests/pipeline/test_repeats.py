"""The same inputs give the same bytes: in another folder, with another hash seed, with other threads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.pipeline.runs import Built, build, call, recipe_for, stage_bytes, write_recipe


def test_another_folder_and_process_give_the_same_bytes(
    model: Path, tmp_path: Path, finished: Built
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml")
    done = call("build", model, "-r", recipe, "-o", tmp_path / "run", PYTHONHASHSEED="77")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert stage_bytes(tmp_path / "run") == stage_bytes(finished.run)


def test_a_model_elsewhere_gives_the_same_bytes(
    model: Path, tmp_path: Path, finished: Built
) -> None:
    """Where the model lies is no part of what is made, but of what it was made from."""
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
    recipe = write_recipe(tmp_path / "recipe.yaml")
    done = call(
        "--quiet", "build", model, "-r", recipe, "-o", tmp_path / "run", OMP_NUM_THREADS="2"
    )
    assert (done.returncode, done.stderr) == (0, "")
    here, there = (
        json.loads((run / "allocate/plan.json").read_text(encoding="utf-8"))
        for run in (tmp_path / "run", finished.run)
    )
    assert here["schemes"] == there["schemes"]
    assert here["size_bytes"] == there["size_bytes"]
    assert here["predicted_loss"] == pytest.approx(there["predicted_loss"], rel=1e-4)
