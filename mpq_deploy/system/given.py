"""Arguments of the Python interface: of the right kind, or refused by name. Standard library only."""

from __future__ import annotations

import numbers
import os
from typing import Any

from mpq_deploy.errors import UsageError


def given_path(value: Any, name: str) -> str:
    """Return a path as it was written. Raises UsageError for anything but a text or a path."""
    if not isinstance(value, (str, os.PathLike)):
        raise wrong_kind(value, name, "Give a path, as a text or a pathlib.Path.")
    return os.fsdecode(value)


def check_whole(value: Any, name: str, minimum: int) -> None:
    """Raise UsageError for anything but a whole number of at least ``minimum``."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise wrong_kind(value, name, "Give a whole number.")
    if value < minimum:
        raise UsageError(f"{name} is {value}.", f"Give at least {minimum}.")


def wrong_kind(value: Any, name: str, hint: str) -> UsageError:
    """Return the error for an argument of another kind than it takes."""
    shown = repr(value)
    shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
    return UsageError(f"{name} is {shown}, a {type(value).__name__}.", hint)
