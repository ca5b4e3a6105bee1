"""Prompts for calibration and images: the package's own, or a user's file."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from mpq_deploy.errors import ModelError, UsageError


def prompts_file() -> Path:
    """Return the package's own prompts (``calibration/prompts.txt`` of the source tree)."""
    package = Path(str(resources.files("mpq_deploy")))
    for path in (
        package / "calibration_data" / "prompts.txt",
        package.parent / "calibration" / "prompts.txt",
    ):
        if path.is_file():
            return path
    raise ModelError(
        "The package's prompts.txt is missing.", "Install it again, or give --prompts FILE."
    )


def read_prompts(path: Path) -> tuple[str, ...]:
    """Return the prompts of a file, one per line, without empty lines and # comments."""
    if not path.is_file():
        raise UsageError(
            f"There is no prompts file at {path}.", "Give a text file with one prompt per line."
        )
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{path} is not UTF-8 text: {error}", "Give one prompt per line."
        ) from error
    prompts = tuple(line for line in lines if line and not line.startswith("#"))
    if not prompts:
        raise UsageError(f"{path} holds no prompt.", "Give a text file with one prompt per line.")
    return prompts
