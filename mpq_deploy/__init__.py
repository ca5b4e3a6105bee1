"""Diffusion models on edge GPUs: mixed-precision TensorRT engines under an exact byte budget."""

from mpq_deploy.api import BuildResult, build, load

__version__ = "0.1.0"
__all__ = ["BuildResult", "__version__", "build", "load"]
