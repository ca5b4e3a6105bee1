"""The models that come with the package."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from mpq_deploy.errors import UsageError, nearest

# In order of preference: the first whose weights are there is the default.
DEMOS = ("emoji", "digits")


def bundled_demo(name: str | None = None) -> Path:
    """Return the pipeline folder of a bundled model; None is the default one.

    Raises UsageError for an unknown name, naming the nearest.
    """
    present = {demo: path for demo in DEMOS if (path := _folder(demo) / "model_index.json").is_file()}
    if name is None:
        name = next(iter(present), DEMOS[0])
    if name not in present:
        raise UsageError(
            f"There is no bundled model '{name}'.", f"{nearest(name, present)}Bundled: {', '.join(present)}."
        )
    return _folder(name)


def _folder(name: str) -> Path:
    return Path(str(resources.files("mpq_deploy"))) / "models" / "demo" / name
