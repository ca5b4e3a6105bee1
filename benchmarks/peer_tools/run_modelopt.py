"""NVIDIA Model Optimizer's ONNX quantizers on the CPU.

python run_modelopt.py MODEL INPUTS MODE OUT     MODE: int8-max, int8-entropy, int4-rtn
"""

from __future__ import annotations

import numpy as np
from inputs import arguments
from modelopt.onnx.quantization import quantize

METHODS = {
    "int8-max": ("int8", "max"),
    "int8-entropy": ("int8", "entropy"),
    "int4-rtn": ("int4", "rtn_dq"),
}

model, feeds, mode, out = arguments()
kind, method = METHODS[mode]
quantize(
    str(model),
    quantize_mode=kind,
    calibration_data={name: np.concatenate([feed[name] for feed in feeds]) for name in feeds[0]},
    calibration_method=method,
    calibration_eps=["cpu"],
    output_path=str(out),
    high_precision_dtype="fp32",
    # Integers in the file instead of float weights behind a quantizer: the option that makes the file small.
    dq_only=True,
)
