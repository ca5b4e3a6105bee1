"""Timestep sampling, denoising trajectories through ONNX Runtime, and observers placed inside the graph."""
