"""Where a denoiser comes from (diffusers folder, hub id, ONNX file, the bundled demo) and its export to ONNX."""
