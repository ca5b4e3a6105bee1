"""Diffusion models on edge GPUs: mixed-precision TensorRT engines under an exact byte budget."""

__version__ = "0.1.0"
