"""Where a denoiser comes from (diffusers folder, hub id, ONNX file, demo), and its export."""
