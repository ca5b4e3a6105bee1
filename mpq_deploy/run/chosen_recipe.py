"""The recipe of a call: what was given, over the recipe of the run where there is one.

In: a run folder, a recipe's file or name, and options by dotted key. Out: a recipe. Used by the
command line and by Python alike, so that a second call on a run is of its own model in both.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpq_deploy.errors import UsageError

if TYPE_CHECKING:
    from mpq_deploy.models.pipeline_parts import Parts
    from mpq_deploy.recipe import Recipe


# What of a recipe says which model it is, and how that is called.
OF_MODEL = (
    *("model", "description", "conditions", "scheduler", "prompts", "call", "calls", "config"),
    *("lora", "lora_slots", "component", "pinned", "sizes"),
)


def recipe_for(recipe: str | Path | None, options: Mapping[str, Any]) -> Recipe:
    """Return a recipe, overridden by ``options`` (values by dotted key; None: not given)."""
    from mpq_deploy.recipe import load_recipe

    return load_recipe(recipe, _plain(options))


def recipe_of(
    run: Path, recipe: str | Path | None, options: Mapping[str, Any] | None = None
) -> Recipe:
    """Return the recipe of a run folder, or ``recipe`` where one is given, overridden by ``options``.

    The run's model stays where neither names one. Raises UsageError for what is no run.
    """
    from mpq_deploy.recipe import recipe_over
    from mpq_deploy.run.folder import PIPELINE, RECIPE, check_one_run
    from mpq_deploy.run.pipeline_file import PipelineFile

    given = options or {}
    if not (run / PIPELINE).is_file():
        check_one_run(run)
        if recipe is None and not (run / RECIPE).is_file():
            raise UsageError(
                f"{run} is not a run folder: it has no {RECIPE}.",
                "Create one: mpq-deploy build -o RUN",
            )
    if recipe is not None:
        return _of_its_model(recipe, given, _stored(run) or {})
    if (run / PIPELINE).is_file():
        return recipe_over(PipelineFile.load(run).given(), _plain(given), str(run))
    return recipe_for(run / RECIPE, given)


def recipe_to_build(
    out: Path | None, recipe: str | Path | None, options: Mapping[str, Any]
) -> Recipe:
    """Return the recipe of a build; without a recipe and a model, that of an existing run at ``out``.

    Of a recipe that names no model it is still the run's: otherwise a new budget for an existing run
    would build the bundled model in its folder.
    """
    from mpq_deploy.run.folder import several_in

    stored = None if out is None or options.get("model") is not None else _stored(out)
    if out is None or stored is None:
        return recipe_for(recipe, options)
    if recipe is not None or several_in(out):
        return _of_its_model(recipe, options, stored)
    return going_on(recipe_of(out, None, options), options)


def runs_to_build(
    out: Path | None, recipe: str | None, options: Mapping[str, Any]
) -> tuple[Path, list[tuple[Recipe, Path]]]:
    """Return the run folder of a build, and the recipe and folder of each target in it.

    Without a model and a recipe the targets of a run of several at ``out`` go on with their own.
    """
    from mpq_deploy.run.folder import several_in
    from mpq_deploy.run.pipeline import default_run
    from mpq_deploy.run.several_targets import runs_of, targets_going_on

    named = recipe is not None or options.get("model") is not None
    if out is not None and not named and several_in(out):
        runs = targets_going_on(out, _plain(options))
        return out, [(going_on(settings, options), folder) for settings, folder in runs]
    settings = recipe_to_build(out, recipe, options)
    run = out or default_run(settings)
    return run, runs_of(settings, run)


def parts_to_build(recipe: Recipe, run: Path) -> Parts | None:
    """Return the parts of a whole pipeline; None where one model is built, or ``run`` holds one."""
    from mpq_deploy.models.pipeline_parts import whole_parts
    from mpq_deploy.run.folder import RECIPE, telling_what_is_gone

    with telling_what_is_gone(recipe.model, run):
        return None if (run / RECIPE).is_file() else whole_parts(recipe)


def _of_its_model(
    recipe: str | Path | None, options: Mapping[str, Any], stored: Mapping[str, Any]
) -> Recipe:
    """Return ``recipe``, overridden by ``options``, of the model that is ``stored`` where they name none."""
    from mpq_deploy.recipe import Recipe

    chosen = recipe_for(recipe, options)
    if chosen.model is not None:
        return chosen
    fields = Recipe.model_fields
    unnamed = [key for key in OF_MODEL if getattr(chosen, key) == fields[key].default]
    kept = {key: stored[key] for key in unnamed if key in stored}
    given = {key: value for key, value in options.items() if value is not None}
    return recipe_for(recipe, {**kept, **given})


def _stored(run: Path) -> dict[str, Any] | None:
    """Return the values of a run's recipe, of several targets the first's; None where there is no run."""
    from mpq_deploy.run.folder import PIPELINE, RECIPE, several_in
    from mpq_deploy.run.several_targets import stored_recipe

    one = next((run for file in (PIPELINE, RECIPE) if (run / file).is_file()), None)
    one = next(iter(several_in(run)), None) if one is None else one
    return None if one is None else stored_recipe(one).model_dump(mode="json")


def _plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options without the types of the command line: choices and paths as texts."""
    plain = {
        key: value.value if isinstance(value, Enum) else value for key, value in options.items()
    }
    return {key: str(v) if isinstance(v, Path) else v for key, v in plain.items()}


def going_on(stored: Recipe, options: Mapping[str, Any]) -> Recipe:
    """Return a run's recipe; a given effort or time clears its counts, so that they are fitted again."""
    from mpq_deploy.run.effort import reopened

    return reopened(stored) if options.get("effort") or options.get("time") else stored
