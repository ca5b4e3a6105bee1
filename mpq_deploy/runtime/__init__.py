"""Run a denoiser with ONNX Runtime, or TensorRT where present."""
