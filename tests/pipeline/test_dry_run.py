"""What a build says and decides before the wait: the forecast, counts of an effort, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from mpq_deploy.errors import UsageError
from mpq_deploy.system import memory
from tests.pipeline.conftest import Outcome
from tests.pipeline.runs import build, recipe_for, save_denoiser, write_recipe

Cli = Callable[..., Outcome]


def test_a_dry_run_makes_the_export_alone(cli: Cli, tmp_path: Path) -> None:
    model = save_denoiser(tmp_path)
    file, run = write_recipe(tmp_path / "recipe.yaml"), tmp_path / "run"
    asked = ("build", model, "--recipe", file, "-o", run, "--dry-run")
    first = cli(*asked)
    assert first.code == 0, first.err
    assert {path.name for path in run.iterdir() if path.is_dir()} == {"export"}
    names = [line.split()[0] for line in first.out.splitlines()]
    assert names[0] == "forecast" and names[-1] == "together"
    assert {"calibrate", "candidates", "measure", "evaluate"} <= set(names)
    values = json.loads(cli("--json", *asked).out)
    again = json.loads(cli("--json", *asked).out)
    assert set(values["stages"]) == set(names[1:-1])
    # Timed once: the second call says the same. Memory counts what this process holds by then.
    for name, stage in values["stages"].items():
        later = again["stages"][name]
        assert stage.pop("memory_bytes") == pytest.approx(later.pop("memory_bytes"), abs=5e8)
        assert stage == later, name
    assert values["seconds"] == pytest.approx(
        sum(stage["seconds"] for stage in values["stages"].values()), abs=1
    )
    assert values["counts"]["evaluate.samples"] == 2


def test_a_dry_run_leaves_the_recipe_of_a_run(cli: Cli, tmp_path: Path) -> None:
    model, run = save_denoiser(tmp_path), tmp_path / "run"
    build(recipe_for(model), run, "calibrate")
    before = (run / "recipe.yaml").read_bytes()
    file = write_recipe(tmp_path / "recipe.yaml")
    said = cli("build", model, "--recipe", file, "-o", run, "--dry-run", "--effort", "quick")
    assert said.code == 0 and "calibrate.observed" in said.out
    assert (run / "recipe.yaml").read_bytes() == before


def test_a_build_without_a_model_goes_on_with_that_of_the_run(cli: Cli, tmp_path: Path) -> None:
    model, run = save_denoiser(tmp_path), tmp_path / "run"
    build(recipe_for(model), run, "export")
    said = cli("build", "-o", run, "--budget", "0.6", "--dry-run")
    assert said.code == 0 and "export     up to date" in said.err
    # Its counts are those that it was made with, unless an effort is asked for.
    assert "calibrate.observed" not in said.out
    said = cli("build", "-o", run, "--effort", "quick", "--dry-run")
    assert said.code == 0 and "calibrate.observed 12" in said.out


def test_fitted_counts_are_kept_with_the_run(tmp_path: Path) -> None:
    recipe, run = recipe_for(save_denoiser(tmp_path), effort="quick", time="1h"), tmp_path / "run"
    assert recipe.calibrate.observed == 48
    made = build(recipe, run, "calibrate")
    text = (run / "recipe.yaml").read_text(encoding="utf-8")
    assert "observed: 12" in text and "samples: 4" in text and "time: null" in text
    assert any(
        line.startswith("effort quick within 1h: calibrate.observed 12") for line in made.said
    )
    assert any(line.startswith("forecast ") for line in made.said)
    # Another clock would fit other counts; the one of this run is kept.
    again = build(recipe, run, "calibrate")
    assert again.made == [] and (run / "recipe.yaml").read_text(encoding="utf-8") == text
    assert not any(line.startswith("forecast ") for line in again.said)


def test_a_time_that_is_too_short_is_refused_before_the_wait(tmp_path: Path) -> None:
    model, run = save_denoiser(tmp_path), tmp_path / "run"
    with pytest.raises(UsageError, match=r"The time '0\.001s' is less than"):
        build(recipe_for(model, time="0.001s"), run)
    assert not (run / "calibrate").exists()


def test_too_little_memory_for_a_later_stage_is_said_before_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, run = save_denoiser(tmp_path), tmp_path / "run"
    build(recipe_for(model), run, "export")
    monkeypatch.setattr(memory, "held_memory", lambda: 0)
    # Enough to calibrate, not for torch.
    monkeypatch.setenv("MPQ_DEPLOY_MEMORY", "300MB")
    with pytest.raises(UsageError, match=r"The stage '(candidates|measure)' would need") as caught:
        build(recipe_for(model), run)
    assert "Lower " in caught.value.hint
    assert not (run / "calibrate").exists()
