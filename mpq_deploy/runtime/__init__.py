"""Run a denoiser: ONNX Runtime today, TensorRT where present."""
