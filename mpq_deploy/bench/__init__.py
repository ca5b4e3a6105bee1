"""How fast this machine runs a denoiser, alternating with its float one."""
