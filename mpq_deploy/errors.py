"""Exceptions that users can cause. Each says what was wrong, the value found, and how to fix it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class MpqError(Exception):
    """A failure with a message for the user and, where there is one, a remedy.

    The command line prints ``message`` and ``hint`` and exits with ``exit_code``; a traceback
    appears only with ``--debug``.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.exit_code = type(self).exit_code

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".strip()

    def __reduce__(self) -> tuple[Any, ...]:
        # Worker processes send errors back pickled, and constructors of subclasses take other
        # arguments.
        return _remade, (type(self), self.__dict__)


def _remade(kind: type[MpqError], values: dict[str, Any]) -> MpqError:
    """Return an error of ``kind`` with the fields ``values``, without calling its constructor."""
    error = kind.__new__(kind)
    Exception.__init__(error, values["message"])
    error.__dict__.update(values)
    return error


class UsageError(MpqError):
    """The command, recipe or option is wrong: nothing was started. Exit code 2."""

    exit_code = 2


class NoModelError(UsageError):
    """There is no model where one was named."""


class InputError(MpqError):
    """A file or a name from someone else cannot be read, or is not what it should be. Exit code 2."""

    exit_code = 2


class ModelError(MpqError):
    """The model cannot be read, or holds something that cannot be deployed."""


class RunFolderError(MpqError):
    """The run folder is in use, of another format, or cannot be written."""


class DiskError(RunFolderError):
    """A disk is full, or a folder cannot be written."""


class InfeasibleBudgetError(UsageError):
    """No plan fits the budget. ``smallest`` is the smallest feasible budget, in bytes."""

    def __init__(self, message: str, hint: str, smallest: int) -> None:
        super().__init__(message, hint)
        self.smallest = smallest


class InfeasibleLatencyError(UsageError):
    """No plan within the budget is fast enough. ``minimum_ns`` is the minimum latency there, in nanoseconds."""

    def __init__(self, message: str, hint: str, minimum_ns: int) -> None:
        super().__init__(message, hint)
        self.minimum_ns = minimum_ns


class EngineError(MpqError):
    """A builder failed, crashed, or built something other than the plan."""


class MissingDependencyError(MpqError):
    """An optional package is needed for what was asked."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package '{package}', which is not installed.",
            f'Install it with: pip install "mpq-deploy[{extra}]"',
        )


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``Did you mean 'x'? `` for the closest of ``known`` (empty when none is close), to start a hint."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"Did you mean '{matches[0]}'? " if matches else ""
