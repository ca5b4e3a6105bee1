"""A run of several targets: what they share lies in it, each target's own below ``targets/NAME``.

In: a recipe whose target is a list of names with commas. Out: a recipe and a run folder for each.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mpq_deploy.engine.target import load_target
from mpq_deploy.errors import UsageError
from mpq_deploy.recipe import Recipe, load_recipe, make_recipe, recipe_over
from mpq_deploy.run.effort import with_counts_of
from mpq_deploy.run.folder import PIPELINE, RECIPE, TARGETS, base_of, several_in
from mpq_deploy.run.pipeline_file import PipelineFile

# Sections of a recipe that are a target's own, but for what ``_shared`` adds.
OWN = {
    "target",
    "budget",
    "compute",
    "measure",
    "allocate",
    "quantize",
    "recover",
    "engine",
    "evaluate",
}


def runs_of(recipe: Recipe, run: Path) -> list[tuple[Recipe, Path]]:
    """Return the recipe and the run folder of each target: ``run`` itself where there is one alone.

    On a run of several targets one that is named alone is added, and none named means all of them.
    Raises UsageError for an unknown or empty name, and one that is given twice.
    """
    present = several_in(run)
    if present and not (present[0] / PIPELINE).is_file():
        # Parts of a whole pipeline each have counts of their own.
        recipe = with_counts_of(recipe, load_recipe(present[0] / RECIPE))
    if present and "target" not in recipe.model_fields_set:
        chosen = [stored_recipe(folder).target for folder in present]
    else:
        chosen = recipe.target.split(",")
    if len(chosen) == 1 and not present:
        return [(recipe, run)]
    if base_of(run) != run:
        raise UsageError(
            f"{run} is a target of {base_of(run)}, which holds the others beside it.",
            f"Give that run: -o {base_of(run)}.",
        )
    # Defaults differ by target: each recipe is made of what was given.
    given = recipe.model_dump(mode="json", exclude_unset=True)
    found: dict[str, tuple[Recipe, Path]] = {}
    for text in map(str.strip, chosen):
        if not text:
            raise UsageError(
                f"An empty name in the list of targets '{recipe.target}'.",
                "Write for example jetson-orin-nano,rtx-blackwell.",
            )
        name = load_target(text).name
        if name in found:
            raise UsageError(f"The target '{name}' is given twice.", "Name each target once.")
        found[name] = (make_recipe({**given, "target": text}), run / TARGETS / name)
    for folder in present:
        if folder.name not in found:
            _check_shared(recipe, folder)
    return list(found.values())


def targets_going_on(run: Path, options: dict[str, Any]) -> list[tuple[Recipe, Path]]:
    """Return the recipe and the folder of each target that ``options`` name of a run of several; all by default.

    Each goes on with its own recipe, a new one with the first's, but for schemes that were the
    first's by default. Raises UsageError as ``runs_of`` does.
    """
    present = several_in(run)
    first = stored_recipe(present[0])
    values = first.model_dump(mode="json", exclude_unset=True)
    default = make_recipe({"target": values.pop("target", None) or first.target}).allocate.schemes
    if first.allocate.schemes == default:
        values.get("allocate", {}).pop("schemes", None)
    found = runs_of(recipe_over(values, options, str(run)), run)
    return [
        (stored_recipe(folder, {**options, "target": own.target}), folder)
        if folder in present
        else (own, folder)
        for own, folder in found
    ]


def stored_recipe(run: Path, options: dict[str, Any] | None = None) -> Recipe:
    """Return the recipe of a run with ``options`` (dotted keys) over it, with paths from here.

    Of a whole pipeline it is the one that was given.
    """
    if (run / PIPELINE).is_file():
        return recipe_over(PipelineFile.load(run).given(), options or {}, str(run))
    return load_recipe(run / RECIPE, options)


def _check_shared(recipe: Recipe, folder: Path) -> None:
    """Raise UsageError where ``recipe`` would make again what the target in ``folder`` was built on."""
    now, stored = _shared(recipe), _shared(stored_recipe(folder))
    changed = next((key for key in now if now[key] != stored[key]), None)
    if changed is not None:
        raise UsageError(
            f"'{changed}' is not as {folder} was built, and targets of a run share their calls.",
            f"Give the same model and recipe, or name '{folder.name}' too, to build it again.",
        )


def _shared(recipe: Recipe) -> dict[str, Any]:
    """Return the settings that what targets share is made by."""
    more = {"sampler": recipe.evaluate.sampler, "attention": recipe.allocate.attention}
    return {**recipe.model_dump(mode="json", exclude=OWN), **more}
