"""The machine: progress, memory, processes, locks, threads, sessions of ONNX Runtime, and work over workers."""
