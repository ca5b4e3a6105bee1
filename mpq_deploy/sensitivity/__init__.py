"""What each scheme of each layer costs in the denoiser's output: one metric per file."""
