"""Says per node what a target's TensorRT refuses, gets wrong, runs in FP16 or runs slowly."""
