"""Samplers (how x_t becomes x_{t-1}) and the denoising loop that calibration, evaluation and sampling share."""
