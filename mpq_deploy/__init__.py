"""Diffusion models on edge GPUs: mixed-precision TensorRT engines under an exact byte budget."""

import sys

from mpq_deploy.system.import_path import drop_current_folder

if sys.argv[:1] == ["-m"]:
    # What `python -m mpq_deploy...` is while it imports this package: before anything else is.
    drop_current_folder()

from mpq_deploy.api import BuildResult, build, load, record
from mpq_deploy.system.release import __version__

__all__ = ["BuildResult", "__version__", "build", "load", "record"]
