"""onnxsim's quantizers, followed by its own simplify (which takes out the float weights left behind).

python run_onnxsim.py MODEL INPUTS MODE OUT     MODE: static, int4, int8-block
"""

from __future__ import annotations

import onnx
import onnxsim
from inputs import arguments

model, feeds, mode, out = arguments()
loaded = onnx.load(model)
if mode == "static":
    quantized = onnxsim.quantize_static(loaded, calibration_data=feeds)
elif mode == "int4":
    quantized = onnxsim.quantize_weight_only_int4(loaded)
else:
    quantized = onnxsim.quantize_weight_only_int8_block(loaded)
simplified, _ = onnxsim.simplify(quantized)
onnx.save(simplified, out)
