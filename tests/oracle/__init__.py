"""Pipelines of diffusers against themselves: what our code records of a denoiser's calls is what it was given."""
