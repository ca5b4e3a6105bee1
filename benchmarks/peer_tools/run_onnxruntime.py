"""ONNX Runtime's own quantize_static: Q/DQ, per channel, on Conv, MatMul and Gemm.

python run_onnxruntime.py MODEL INPUTS MODE OUT     MODE: minmax, percentile, percentile-in-parts,
                                                       minmax-int4
"""

from __future__ import annotations

from inputs import arguments
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)

METHODS = {
    "minmax": CalibrationMethod.MinMax,
    "percentile": CalibrationMethod.Percentile,
    "percentile-in-parts": CalibrationMethod.Percentile,
    "minmax-int4": CalibrationMethod.MinMax,
}


class Feeds(CalibrationDataReader):
    """Hands out the calibration inputs one by one."""

    def __init__(self, feeds: list) -> None:
        self._feeds = iter(feeds)

    def get_next(self) -> dict | None:
        """Return the next one, None after the last."""
        return next(self._feeds, None)


model, feeds, mode, out = arguments()
quantize_static(
    model,
    out,
    Feeds(feeds),
    quant_format=QuantFormat.QDQ,
    op_types_to_quantize=["Conv", "MatMul", "Gemm"],
    per_channel=True,
    activation_type=QuantType.QInt8,
    weight_type=QuantType.QInt4 if mode.endswith("int4") else QuantType.QInt8,
    calibrate_method=METHODS[mode],
    # Intermediate values of all calls at once would fill the memory where they are large.
    extra_options={"CalibMaxIntermediateOutputs": 4} if mode.endswith("parts") else {},
)
