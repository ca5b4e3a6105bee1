"""A stage of a run, declared: what it reads, how it is made, when it applies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel

from mpq_deploy.run.folder import alike
from mpq_deploy.system.files import Fields
from mpq_deploy.system.release import __version__

if TYPE_CHECKING:
    from mpq_deploy.recipe import Recipe
    from mpq_deploy.run.view import Run


def _always(recipe: Recipe) -> bool:
    return True


@dataclass(frozen=True)
class Stage:
    """One stage. It is made again when what it reads has changed.

    ``reads``: the stages whose outputs it reads, by digest; ``after``: further stages that must be
    current before. ``inputs``: what else it depends on (settings, versions), by name; None: it is
    made each time. ``make`` fills an empty folder (the run's own where there are no ``inputs``) and
    returns a few words for the log. ``applies``: whether a recipe wants it on the way to later
    stages. ``noted``: inputs that count when it is made, and do not make it again by themselves.
    ``hint``: what to change when its memory does not suffice, up to "or". ``computes``:
    whether it runs the model, and so needs the recipe's compute device.
    """

    name: str
    make: Callable[[Run, Path], str]
    inputs: Callable[[Run], Fields] | None
    reads: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    applies: Callable[[Recipe], bool] = _always
    hint: str = "Close other programs, or"
    computes: bool = True
    noted: frozenset[str] = frozenset()

    @property
    def needs(self) -> tuple[str, ...]:
        """The stages that must be current before this one."""
        return (*self.reads, *self.after)

    def fields(self, run: Run) -> Fields:
        """Return everything that the stage depends on, by name.

        Raises UsageError where a stage it reads is missing.
        """
        digests: Fields = {name: run.digest(name) for name in self.reads}
        found = {**digests, **(self.inputs(run) if self.inputs else {})}
        record = run.folder.record(self.name) if self.noted else None
        if record is None or not alike(record.inputs, found, self.noted):
            return found
        return {**found, **{name: record.inputs.get(name) for name in self.noted}}


def stages_in_order(*stages: Stage) -> dict[str, Stage]:
    """Return ``stages`` by name, in the order in which they are made.

    Raises ValueError for a stage that is declared twice, or before a stage that it needs.
    """
    by_name: dict[str, Stage] = {}
    for stage in stages:
        if stage.name in by_name:
            raise ValueError(f"The stage '{stage.name}' is declared twice.")
        for need in stage.needs:
            if need not in by_name:
                raise ValueError(
                    f"The stage '{stage.name}' needs '{need}', not declared before it."
                )
        by_name[stage.name] = stage
    return by_name


def version_of(*packages: str) -> Fields:
    """Return ``version.NAME`` of this tool and of each package; None for one not installed."""
    found = {f"version.{package}": _installed(package) for package in packages}
    return {"version.mpq-deploy": __version__, **found}


@cache
def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def settings(section: BaseModel, prefix: str) -> Fields:
    """Return a recipe section as flat fields ``recipe.PREFIX.KEY``."""
    return {f"recipe.{prefix}.{k}": value for k, value in section.model_dump(mode="json").items()}
