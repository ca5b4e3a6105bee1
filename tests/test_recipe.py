"""Recipes: every bundled file loads and is printed in full, and a mistake is answered with the nearest right thing."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from mpq_deploy.cli import app
from mpq_deploy.errors import UsageError
from mpq_deploy.models.locate import DEMOS
from mpq_deploy.recipe import (
    Recipe,
    Section,
    bundled_recipes,
    load_recipe,
    make_recipe,
    recipe_heading,
)

RUNNER = CliRunner(env={"COLUMNS": "80", "NO_COLOR": "1", "TERM": "dumb"})
RECIPES = bundled_recipes()
NEEDED = {"sd15-jetson-orin-nano", "sdxl-rtx", "sd3-rtx-blackwell", "flux-rtx-blackwell"}


def flat(values: dict[str, Any], path: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{path}{name}"
        found |= (
            flat(value, f"{key}.") if isinstance(value, dict) and name != "losses" else {key: value}
        )
    return found


def test_the_recipes_are_named_after_what_is_deployed() -> None:
    assert set(RECIPES) == NEEDED | {"demo", "ci", "quick", "simulate"}


@pytest.mark.parametrize("name", RECIPES)
def test_a_bundled_recipe_says_for_whom_it_is_and_holds_only_what_differs(name: str) -> None:
    heading = recipe_heading(RECIPES[name])
    assert 20 < len(heading[0]) <= 56
    written = yaml.safe_load(RECIPES[name].read_text(encoding="utf-8")) or {}
    complete, default = (flat(r.model_dump(mode="json")) for r in (load_recipe(name), Recipe()))
    assert load_recipe(name) == load_recipe(RECIPES[name])
    assert all(complete[key] != default[key] for key in flat(written))


@pytest.mark.parametrize("name", RECIPES)
def test_a_printed_recipe_has_every_setting_with_a_comment_and_is_the_same_recipe(
    name: str, tmp_path: Path
) -> None:
    shown = RUNNER.invoke(app, ["recipe", name])
    assert shown.exit_code == 0, shown.output
    (tmp_path / "mine.yaml").write_text(shown.stdout, encoding="utf-8")
    assert load_recipe(tmp_path / "mine.yaml") == load_recipe(name)
    assert set(flat(yaml.safe_load(shown.stdout))) == set(flat(Recipe().model_dump(mode="json")))
    lines = shown.stdout.splitlines()
    settings = [
        number for number, line in enumerate(lines) if line and not line.strip().startswith("#")
    ]
    assert all("  # " in lines[n] or lines[n - 1].strip().startswith("# ") for n in settings)
    values = json.loads(RUNNER.invoke(app, ["--json", "recipe", name]).stdout)
    assert values == load_recipe(name).model_dump(mode="json")


def test_what_differs_from_the_default_is_said() -> None:
    shown = RUNNER.invoke(app, ["recipe", "ci"]).stdout.splitlines()
    assert any(line.startswith("  samples: 8 ") and line.endswith("default: 32") for line in shown)
    assert sum("default: " in line for line in shown) == 2


def test_recipes_are_listed_in_80_columns() -> None:
    listed = RUNNER.invoke(app, ["recipe"]).stdout.splitlines()
    assert [line.split()[0] for line in listed] == sorted(RECIPES)
    assert max(map(len, listed)) <= 80
    assert set(json.loads(RUNNER.invoke(app, ["--json", "recipe"]).stdout)) == set(RECIPES)


def test_a_file_wins_over_a_bundled_name_where_it_is_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quick").write_text("budget: 0.9\n", encoding="utf-8")
    assert str(load_recipe("./quick").budget) == "0.9"
    assert str(load_recipe("quick").budget) == "0.35"


def test_a_recipe_survives_its_own_yaml() -> None:
    recipe = load_recipe(
        None, {"budget": "0.3", "allocate.protect": [{"layers": "conv_in", "schemes": ["fp16"]}]}
    )
    for text in (recipe.to_yaml(), recipe.explained()):
        assert Recipe.model_validate(yaml.safe_load(text)) == recipe


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("calibrate.sample", 3, "Did you mean 'samples'"),
        ("budgett", "0.3", "Did you mean 'budget'"),
        ("allocate.schemes", ["w4a61"], "Did you mean 'w4a16'"),
        ("calibrate.scale", "mean", "found 'mean'"),
        ("calibrate.timesteps", 0, "found 0"),
        ("calibrate.timesteps", "many", "found 'many'"),
        # What YAML makes of yes and off: Python counts them as 1 and 0.
        ("calibrate.timesteps", True, "true or false"),
        ("guidance_scale", False, "true or false"),
        ("allocate.schemes", "fp16", "should be a list"),
        ("calibrate", [], "keys with values"),
        ("objective", "latency", "allocate.objective"),
        ("measure.method", "guess", "probe"),
        ("evaluate.calls", 0, "found 0"),
        ("evaluate.samples", 0, "found 0"),
        ("calibrate.percentile", 40.0, "found 40.0"),
        # Before anything is measured, not when the engine is built.
        ("engine.batch_max", 1, "are 1, 2, 1; they must be ascending"),
        ("recover.losses", {"output": 0}, "weight above 0"),
        ("recover.losses", {"relations": 1}, "'relation' or 'memory' (found 'relations')"),
    ],
)
def test_a_mistake_is_named_with_what_was_found(key: str, value: object, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_recipe(None, {key: value})
    assert words in str(caught.value)


def test_a_run_of_another_folder_is_opened_by_the_paths_it_was_built_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there, here = tmp_path / "there", tmp_path / "here"
    for name in (
        "there/model",
        *(f"there/{demo}" for demo in DEMOS),
        "there/a.safetensors",
        "here/own",
    ):
        (tmp_path / name).mkdir(parents=True)
    given: dict[str, Any] = {"model": "model", "prompts": "own", "lora": ("a.safetensors:0.5",)}
    monkeypatch.chdir(there)
    for name, values in (("one", given), *((f"{demo} 1", {"model": demo}) for demo in DEMOS)):
        (there / name).write_text(make_recipe(values).stored(), encoding="utf-8")
        assert load_recipe(there / name) == make_recipe(values)
    monkeypatch.chdir(here)
    read = load_recipe(there / "one")
    assert read.model == str(there / "model")
    # What is not there starts here, as in a folder that was moved as a whole.
    assert read.prompts == "own"
    assert read.lora == (f"{there / 'a.safetensors'}:0.5",)
    assert [load_recipe(there / f"{demo} 1").model for demo in DEMOS] == list(DEMOS)


@pytest.mark.parametrize("text", ["- a\n- b\n", "just words", "a: [1"])
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match=r"recipe\.yaml"):
        load_recipe(path)


def test_an_absent_recipe_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no recipe"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(UsageError, match="Did you mean 'sdxl-rtx'"):
        load_recipe("sdxl")


def _setting_names(model=Recipe, before=""):
    for name, field in model.model_fields.items():
        nested = field.annotation
        if isinstance(nested, type) and issubclass(nested, Section):
            yield from _setting_names(nested, f"{before}{name}.")
        yield before + name


@pytest.mark.parametrize(
    "value",
    [float("nan"), 1e308, -1e308, 10**30, "", "a\0b", "\x1b[31m", "x" * 5000, [[]], {"a": 1}],
    ids=["nan", "huge", "negative", "integer", "empty", "NUL", "escape", "long", "list", "object"],
)
def test_a_value_of_the_wrong_kind_is_refused_for_every_setting(value):
    for name in _setting_names():
        if (name, value) == ("model", ""):
            continue  # said where models are opened
        with pytest.raises(UsageError) as caught:
            load_recipe(None, {name: value})
        assert len(caught.value.message) < 1000, name


def test_a_section_that_is_no_section_is_refused_under_options(tmp_path):
    (tmp_path / "r.yaml").write_text("allocate: 3\n", encoding="utf-8")
    with pytest.raises(UsageError, match=r"allocate in r\.yaml"):
        load_recipe(tmp_path / "r.yaml", {"allocate.gap": 0.1})


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    text = "model: ~/model\nallocate: {latency_table: ~/t.json}\n"
    (tmp_path / "r.yaml").write_text(text, encoding="utf-8")
    recipe = load_recipe("~/r.yaml")
    assert recipe.model == str(tmp_path / "model")
    assert recipe.allocate.latency_table == str(tmp_path / "t.json")


def test_a_recipe_from_a_stranger_ends_in_one_line(tmp_path):
    path = tmp_path / "r.yaml"
    for content in (
        "[" * 5000,
        "budget: .inf",
        "budget: 1\nbudget: 2",
        "a: !!python/name:os.x",
        "\0",
    ):
        path.write_text(content, encoding="utf-8")
        with pytest.raises(UsageError, match=r"r\.yaml"):
            load_recipe(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UsageError, match="named pipe"):
        load_recipe(path)


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "CPU"])
def test_an_unknown_compute_device_is_answered_with_those_that_are_known(device: str) -> None:
    with pytest.raises(UsageError, match=r"unknown device .*auto, cpu, cuda or cuda:N"):
        load_recipe(None, {"compute.device": device})
