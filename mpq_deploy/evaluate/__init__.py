"""Compare a quantized denoiser with the float one: output error per timestep, images, sizes, latency."""
