"""Recipes: every shipped file loads, and a mistake is answered with the nearest right thing."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from mpq_deploy.errors import UsageError
from mpq_deploy.recipe import Recipe, load_recipe

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_loads_and_is_complete(path: Path) -> None:
    recipe = load_recipe(path)
    written = yaml.safe_load(path.read_text(encoding="utf-8"))

    def keys(values: dict[str, object]) -> dict[str, object]:
        return {k: keys(v) if isinstance(v, dict) else None for k, v in values.items()}

    assert keys(written) == keys(recipe.model_dump(mode="json"))


def test_there_are_recipes() -> None:
    assert len(RECIPES) >= 3


def test_a_recipe_survives_its_own_yaml() -> None:
    recipe = load_recipe(None, {"budget": "0.3", "allocate.protect": [{"layers": "conv_in", "schemes": ["fp16"]}]})
    assert Recipe.model_validate(yaml.safe_load(recipe.to_yaml())) == recipe


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("calibrate.sample", 3, "Did you mean 'samples'"),
        ("budgett", "0.3", "Did you mean 'budget'"),
        ("allocate.schemes", ["w4a61"], "Did you mean 'w4a16'"),
        ("calibrate.scale", "mean", "found 'mean'"),
        ("calibrate.timesteps", 0, "found 0"),
        ("calibrate.timesteps", "many", "found 'many'"),
        ("measure.method", "guess", "probe"),
    ],
)
def test_a_mistake_is_named_with_what_was_found(key: str, value: object, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_recipe(None, {key: value})
    assert words in str(caught.value)


@pytest.mark.parametrize("text", ["- a\n- b\n", "just words", "a: [1"])
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match=r"recipe\.yaml"):
        load_recipe(path)


def test_an_absent_recipe_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no recipe"):
        load_recipe(tmp_path / "none.yaml")
