"""A stage of a run, declared: what it reads, how it is made, when it applies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mpq_deploy.system.files import Fields

if TYPE_CHECKING:
    from mpq_deploy.recipe import Recipe
    from mpq_deploy.run.view import Run


def _always(recipe: Recipe) -> bool:
    return True


@dataclass(frozen=True)
class Stage:
    """One stage. It is made again when what it reads has changed.

    ``reads``: the stages whose outputs it reads, by digest; ``after``: further stages that must be current before.
    ``inputs``: what else it depends on (settings, versions), by name; None: it is made each time. ``make`` fills an
    empty folder (the run's own where there are no ``inputs``) and returns a few words for the log. ``applies``: whether
    a recipe wants it on the way to later stages. ``hint``: what to change when its memory does not suffice, up to "or".
    """

    name: str
    make: Callable[[Run, Path], str]
    inputs: Callable[[Run], Fields] | None
    reads: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    applies: Callable[[Recipe], bool] = _always
    hint: str = "End other programs, or"

    @property
    def needs(self) -> tuple[str, ...]:
        """The stages that must be current before this one."""
        return (*self.reads, *self.after)

    def fields(self, run: Run) -> Fields:
        """Return everything that the stage depends on, by name. Raises UsageError where a stage it reads is missing."""
        return {**{name: run.digest(name) for name in self.reads}, **(self.inputs(run) if self.inputs else {})}
