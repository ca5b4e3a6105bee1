"""How fast this machine runs a denoiser, in turns with its float one. Engines need NumPy and TensorRT alone."""
