"""Declared stages: their order, what they need, when they are made again, and what is said of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from mpq_deploy.errors import UsageError
from mpq_deploy.recipe import Recipe
from mpq_deploy.run import pipeline
from mpq_deploy.run.folder import RunFolder
from mpq_deploy.run.pipeline import STAGES, Pipeline
from mpq_deploy.run.stage import Stage, settings, stages_in_order, version_of
from mpq_deploy.run.view import Run
from mpq_deploy.system.files import Fields
from mpq_deploy.system.memory import MemoryRanOutError
from mpq_deploy.system.release import __version__
from tests.pipeline.runs import Notes


class MadeUp:
    """Three stages that write ``values`` and note that they were made: first <- second <- last."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {"first": "1", "second": "2", "last": "3"}
        self.made: list[str] = []
        self.stages = stages_in_order(
            self.stage("first", hint="Lower the made-up width, or"),
            self.stage("second", reads=("first",), applies=lambda recipe: recipe.recover.steps > 0),
            self.stage("last", reads=("first",), after=("second",)),
        )

    def stage(self, name: str, **declared: object) -> Stage:
        def make(run: Run, folder: Path) -> str:
            self.made.append(name)
            (folder / "value.txt").write_text(self.values[name], encoding="utf-8")
            return f"wrote {self.values[name]}"

        def inputs(run: Run) -> Fields:
            return {f"{name}.value": self.values[name]}

        return Stage(name, make, inputs, **declared)  # type: ignore[arg-type]


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> Iterator[MadeUp]:
    stages = MadeUp()
    monkeypatch.setattr(pipeline, "STAGES", stages.stages)
    yield stages


def opened(folder: Path, notes: Notes | None = None, recovers: bool = True) -> Pipeline:
    recipe = Recipe.model_validate({"recover": {"steps": 1}} if recovers else {})
    folder.mkdir(exist_ok=True)
    return Pipeline(RunFolder(folder), recipe, notes or Notes())


def test_a_stage_is_made_after_all_that_it_needs_and_once(made_up: MadeUp, tmp_path: Path) -> None:
    opened(tmp_path / "run").current("last")
    assert made_up.made == ["first", "second", "last"]
    opened(tmp_path / "run").current("last")
    assert made_up.made == ["first", "second", "last"]


def test_a_stage_that_the_recipe_does_not_want_is_passed_over_on_the_way(
    made_up: MadeUp, tmp_path: Path
) -> None:
    opened(tmp_path / "run", recovers=False).current("last")
    assert made_up.made == ["first", "last"]
    opened(tmp_path / "run", recovers=False).current("second")  # asked for by name, it is made
    assert made_up.made == ["first", "last", "second"]


def test_only_what_reads_a_changed_output_is_made_again(made_up: MadeUp, tmp_path: Path) -> None:
    opened(tmp_path / "run").current("last")
    made_up.made.clear()
    made_up.values["second"] = "20"
    notes = Notes()
    opened(tmp_path / "run", notes).current("last")
    # "last" is made after "second", but does not read it.
    assert made_up.made == ["second"]
    text = "\n".join(notes.lines)
    assert (
        "first      up to date" in text
        and "second     again: second.value changed" in text
        and "wrote 20" in text
    )
    made_up.made.clear()
    made_up.values["first"] = "10"
    notes = Notes()
    opened(tmp_path / "run", notes).current("last")
    assert made_up.made == ["first", "second", "last"]
    assert any(line == "last       again: first changed" for line in notes.lines)


def test_memory_that_runs_out_is_told_with_the_stage_s_hint(
    made_up: MadeUp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(run: Run, folder: Path) -> str:
        raise MemoryError

    monkeypatch.setitem(made_up.stages, "first", replace(made_up.stages["first"], make=make))
    with pytest.raises(MemoryRanOutError, match="'first'") as refused:
        opened(tmp_path / "run").current("first")
    assert "Lower the made-up width, or use a machine with more memory." in refused.value.hint


def test_a_stage_whose_need_was_never_made_is_refused(made_up: MadeUp, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="The stage 'first' is missing"):
        opened(tmp_path / "run").ensure("last")
    assert made_up.made == []


def test_a_stage_declared_with_a_missing_need_is_refused(made_up: MadeUp) -> None:
    first, second, last = made_up.stages.values()
    with pytest.raises(ValueError, match="'second' needs 'first'"):
        stages_in_order(second, first)
    with pytest.raises(ValueError, match="'last' needs 'second'"):
        stages_in_order(first, last)
    with pytest.raises(ValueError, match="'first' is declared twice"):
        stages_in_order(first, first)


@pytest.mark.parametrize("stage", STAGES.values(), ids=list(STAGES))
def test_every_real_stage_has_a_hint_that_reads_on_and_needs_none_twice(stage: Stage) -> None:
    assert stage.hint.endswith(", or")
    assert len(set(stage.needs)) == len(stage.needs) and stage.name not in stage.needs


def test_settings_and_versions_are_flat_fields() -> None:
    assert settings(Recipe().engine, "engine")["recipe.engine.build"] is True
    assert all(yaml.safe_dump(value) for value in settings(Recipe().measure, "measure").values())
    versions = version_of("numpy", "no-such-package")
    assert versions["version.mpq-deploy"] == __version__
    assert versions["version.numpy"] and versions["version.no-such-package"] is None
