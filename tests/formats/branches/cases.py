"""Matrices to put branches beside."""

from __future__ import annotations

import numpy as np

from mpq_deploy.rounding.quantizers import QuantizedMatrix


def quantized(weight: np.ndarray, levels: int) -> QuantizedMatrix:
    scale = (np.abs(weight).max(axis=1, keepdims=True) / levels).astype(np.float16)
    return QuantizedMatrix(np.rint(weight / scale.astype(np.float32)).astype(np.int8), scale)
