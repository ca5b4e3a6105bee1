"""Counts of calls, probes and images for an effort and a time, fitted by the forecast.

In: a recipe and what a build by it takes. Out: the recipe with the counts that its user left open
set. All counts follow one scale: 1 has the recipe's defaults, less of it fewer of each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from mpq_deploy.errors import UsageError
from mpq_deploy.system.quantities import duration_text

if TYPE_CHECKING:
    from mpq_deploy.recipe import Effort, Recipe

# The seconds that a build by these recipes takes.
Seconds = Callable[["Recipe"], float]


@dataclass(frozen=True)
class Count:
    """A count of the recipe: its default times the scale to the power ``exponent``, at least ``least``.

    ``most``: above a scale of 1; ``ruler``: settings that need this one to be as large as they say,
    so that it stays where one of them is given.
    """

    setting: str
    exponent: float
    least: int
    most: int
    rulers: tuple[str, ...] = ()

    def at(self, scale: float) -> int:
        """Return the count at a scale."""
        usual: int = _default(self.setting)
        wanted = round(usual * scale**self.exponent)
        return int(min(max(wanted, self.least), self.most if scale > 1 else usual))


# Other timesteps tell more than other calls at a timestep do, so they fall more slowly (our choice;
# docs/results/few-entries.md).
# Calls measured on stay fewer than those recorded, so that some are left to round weights on.
COUNTS = (
    Count("calibrate.timesteps", 0.25, 5, 20, ("measure.timesteps", "measure.coarse_timesteps")),
    Count("calibrate.samples", 1.0, 4, 256, ("measure.samples",)),
    Count("calibrate.observed", 1.0, 2, 96),
    Count("measure.timesteps", 0.25, 5, 20),
    Count("measure.samples", 1.0, 3, 192),
    Count("measure.calls", 1.0, 1, 24),
    Count("quantize.noise_draws", 1.0, 1, 2),
    Count("quantize.refinements", 0.5, 0, 3),
    Count("evaluate.samples", 1.0, 1, 64),
    Count("evaluate.timesteps", 0.5, 4, 20),
    Count("evaluate.calls", 1.0, 1, 16),
)
# Scale that each effort begins with, and the seconds that it is lowered to fit (None: any). Our
# choice: quick ends within a coffee break or two, standard within a morning.
EFFORTS: dict[Effort, tuple[float, float | None]] = {
    "quick": (0.25, 45 * 60),
    "standard": (1.0, 2 * 3600),
    "thorough": (2.0, None),
}
# Scales that are tried: each 2^-1/4 of the one before, down to where all counts are at their least.
STEP, LEAST_SCALE = 2**-0.25, 2**-8


def fitted(recipe: Recipe, seconds: Seconds) -> tuple[Recipe, str]:
    """Return the recipe with the counts of its effort, lowered until the forecast fits, and what was done.

    Counts that the recipe names are left as they are. An effort's own limit is kept where that can
    be. Raises UsageError for ``time`` below what a build by the least counts takes.
    """
    free = open_counts(recipe)
    first, limit = EFFORTS[recipe.effort]
    if recipe.time is not None:
        limit = recipe.time.seconds
    found = _with(recipe, free, first)
    for scale in _scales(first):
        found = _with(recipe, free, scale)
        taken = seconds(found)
        if limit is None or taken <= limit:
            break
    else:
        if recipe.time is not None:
            raise UsageError(
                f"The time '{recipe.time}' is less than a build by the smallest counts takes: about "
                f"{duration_text(taken)} on this machine.",
                f"Give at least --time {_minutes(taken)}, fewer allocate.schemes, or evaluate.controls: false "
                "('--dry-run' shows what takes how long).",
            )
    # What it came to stays with the run; what it was requested would be compared with other work.
    found = found.model_copy(update={"time": None})
    changed = [c.setting for c in free if get(found, c.setting) != get(recipe, c.setting)]
    if not changed:
        return found, ""
    counts = ", ".join(f"{name} {get(found, name)}" for name in changed)
    within = f" within {recipe.time}" if recipe.time else ""
    return found, f"effort {recipe.effort}{within}: {counts}"


def least(recipe: Recipe) -> Recipe:
    """Return the recipe with all counts that it leaves open at their least."""
    return _with(recipe, open_counts(recipe), LEAST_SCALE)


def open_counts(recipe: Recipe) -> list[Count]:
    """Return the counts that the recipe leaves open, and that no other count of it rules."""
    return [
        count
        for count in COUNTS
        if not any(_given(recipe, name) for name in (count.setting, *count.rulers))
    ]


def reopened(recipe: Recipe) -> Recipe:
    """Return the recipe of a run with its counts left open, for another effort."""
    names: dict[str, set[str]] = {}
    for count in COUNTS:
        section, name = count.setting.split(".")
        names.setdefault(section, set()).add(name)
    sections = {}
    for section, own in names.items():
        present = getattr(recipe, section)
        sections[section] = type(present)(**present.model_dump(exclude=own))
    return recipe.model_copy(update=sections)


def with_counts_of(recipe: Recipe, other: Recipe) -> Recipe:
    """Return ``recipe`` with the counts that it leaves open as ``other`` has them: they share its calls."""
    given: dict[str, dict[str, Any]] = {}
    for count in open_counts(recipe):
        section, name = count.setting.split(".")
        given.setdefault(section, {})[name] = get(other, count.setting)
    sections = {
        section: getattr(recipe, section).model_copy(update=own) for section, own in given.items()
    }
    return recipe.model_copy(update={**sections, "effort": other.effort, "time": other.time})


def get(recipe: Recipe, setting: str) -> Any:
    """Return the value of a setting by its dotted name."""
    section, name = setting.split(".")
    return getattr(getattr(recipe, section), name)


def _given(recipe: Recipe, setting: str) -> bool:
    section, name = setting.split(".")
    return name in getattr(recipe, section).model_fields_set


@cache
def _default(setting: str) -> int:
    from mpq_deploy.recipe import Recipe

    return int(get(Recipe(), setting))


def _with(recipe: Recipe, counts: list[Count], scale: float) -> Recipe:
    values: dict[str, dict[str, int]] = {}
    for count in counts:
        own, (section, name) = count.at(scale), count.setting.split(".")
        if own != _default(count.setting):
            # A sampler of fewer steps has no more timesteps.
            most = recipe.calibrate.steps if count.setting == "calibrate.timesteps" else own
            values.setdefault(section, {})[name] = min(own, most)
    sections = {
        section: getattr(recipe, section).model_copy(update=own) for section, own in values.items()
    }
    return recipe.model_copy(update=sections)


def _scales(first: float) -> Iterator[float]:
    scale = first
    while scale >= LEAST_SCALE:
        yield scale
        scale *= STEP


def _minutes(seconds: float) -> str:
    return f"{int(seconds // 60) + 1}min"
