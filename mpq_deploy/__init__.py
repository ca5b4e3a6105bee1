"""Diffusion models on edge GPUs: mixed-precision TensorRT engines under an exact byte budget."""

from mpq_deploy.api import BuildResult, build, load
from mpq_deploy.system.release import __version__

__all__ = ["BuildResult", "__version__", "build", "load"]
