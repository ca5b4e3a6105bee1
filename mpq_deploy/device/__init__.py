"""What runs on a device: unpack, build, check, run, measure. Standard library, NumPy and TensorRT only."""
