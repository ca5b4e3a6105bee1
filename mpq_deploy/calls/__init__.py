"""Samplers, the denoising loop that all stages share, and the calls recorded along it."""
