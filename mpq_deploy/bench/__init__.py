"""How fast this machine runs a denoiser, in turns with its float one."""
