"""Diffusion models on edge GPUs: mixed-precision TensorRT engines under an exact byte budget."""

import sys
from typing import TYPE_CHECKING, Any

from mpq_deploy.system.import_path import drop_current_folder

if sys.argv[:1] == ["-m"]:
    # What `python -m mpq_deploy...` is while it imports this package: before anything else is.
    drop_current_folder()

from mpq_deploy.api import BuildResult, build, load, record
from mpq_deploy.system.release import __version__

if TYPE_CHECKING:
    from mpq_deploy.device.generate.generator import Generator

__all__ = ["BuildResult", "Generator", "__version__", "build", "load", "record"]


def __getattr__(name: str) -> Any:
    """Import ``Generator`` when it is asked for: it needs NumPy, which ``--help`` does not."""
    if name != "Generator":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from mpq_deploy.device.generate.generator import Generator

    return Generator
