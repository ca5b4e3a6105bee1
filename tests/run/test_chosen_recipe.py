"""A second call on a run is of the run's model, whatever says what else is to change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

import mpq_deploy
from mpq_deploy.errors import UsageError
from mpq_deploy.run.chosen_recipe import recipe_of, recipe_to_build
from mpq_deploy.run.folder import TARGETS
from mpq_deploy.run.pipeline_file import PipelineFile

OWN = {"model": "digits", "budget": 0.5, "target": "onnxruntime-cpu", "prompts": "mine.txt"}


@pytest.fixture(params=["one model", "a whole pipeline", "several targets"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    place = tmp_path / "run"
    if request.param == "a whole pipeline":
        place.mkdir()
        PipelineFile(class_name="", source="", denoiser="unet", recipe=OWN, parts={}).save(place)
        return place
    holds = place / TARGETS / "rtx" if request.param == "several targets" else place
    holds.mkdir(parents=True)
    (holds / "recipe.yaml").write_text(yaml.safe_dump(OWN), encoding="utf-8")
    (holds / "run.json").write_text("{}", encoding="utf-8")
    return place


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    """Another budget, and no model."""
    path = tmp_path / "other.yaml"
    path.write_text("model: null\nbudget: 0.3\n", encoding="utf-8")
    return str(path)


def test_a_recipe_without_a_model_is_of_the_runs_model(run: Path, recipe: str) -> None:
    built = recipe_to_build(run, recipe, {"model": None, "target": "rtx"})
    assert (built.model, built.budget.text, built.target) == ("digits", "0.3", "rtx")
    assert built.prompts == "mine.txt"


def test_what_is_named_wins(run: Path, recipe: str, tmp_path: Path) -> None:
    assert recipe_to_build(run, recipe, {"model": "emoji"}).model == "emoji"
    assert recipe_to_build(tmp_path / "new", recipe, {"model": None}).model is None
    named = tmp_path / "named.yaml"
    named.write_text("model: emoji\n", encoding="utf-8")
    assert recipe_to_build(run, str(named), {"model": None}).model == "emoji"


def test_a_stage_takes_a_recipe_with_the_runs_model(run: Path, recipe: str) -> None:
    one = run / TARGETS / "rtx" if (run / TARGETS).is_dir() else run
    changed = recipe_of(one, recipe, {})
    assert (changed.model, changed.budget.text) == ("digits", "0.3")
    assert recipe_of(one, None, {"budget": "0.4"}).budget.text == "0.4"


def test_python_takes_the_runs_model(
    tmp_path: Path, recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[Any] = []

    def opened(settings: Any, *others: Any) -> None:
        chosen.append(settings)
        raise UsageError("opened")

    monkeypatch.setattr("mpq_deploy.run.pipeline.open_pipeline", opened)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(OWN), encoding="utf-8")
    for given in ({"budget": 0.3}, {"recipe": recipe}):
        with pytest.raises(UsageError, match="opened"):
            mpq_deploy.build(out=tmp_path, quiet=True, **given)
    assert [(one.model, one.budget.text) for one in chosen] == [("digits", "0.3")] * 2


def test_python_builds_one_target(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the targets rtx, simulate; build"):
        mpq_deploy.build("digits", target="rtx,simulate", out=tmp_path / "run")
