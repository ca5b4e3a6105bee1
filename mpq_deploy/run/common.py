"""What several stages need: an opened export, recorded calls, and fields for the digests of their inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mpq_deploy.errors import UsageError
from mpq_deploy.system.files import Fields, canonical_json, file_digest
from mpq_deploy.system.release import __version__


def version_of(*packages: str) -> Fields:
    """Return ``version.NAME`` for each installed package, and this tool's own version."""
    from importlib.metadata import PackageNotFoundError, version

    found: Fields = {"version.mpq-deploy": __version__}
    for package in packages:
        try:
            found[f"version.{package}"] = version(package)
        except PackageNotFoundError:
            found[f"version.{package}"] = None
    return found


def settings(section: Any, prefix: str) -> Fields:
    """Return a recipe section as flat fields ``recipe.PREFIX.KEY``."""
    return {f"recipe.{prefix}.{key}": value for key, value in section.model_dump(mode="json").items()}


def path_digest(path: Path) -> str:
    """Digest of a file, or of a folder's files by name. Raises UsageError when there is none."""
    if path.is_file():
        return file_digest(path)
    if path.is_dir():
        return canonical_json({p.name: file_digest(p) for p in sorted(path.iterdir()) if p.is_file()})
    raise UsageError(f"There is no file {path}.", "Check the path.")
