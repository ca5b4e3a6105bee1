"""What runs on a device: unpack, build, check, run, measure. Needs only NumPy and TensorRT."""
