"""Says per node what a target's TensorRT will refuse, get wrong, run in FP16 or run slowly, for any ONNX file."""
