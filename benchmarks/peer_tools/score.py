"""SQNR of a quantized model against the float one on the held-out inputs: 10 log10 (sum of y^2 / sum of (y - q)^2).

python score.py MODEL INPUTS CANDIDATE     prints {"mean": dB, "min": dB} as JSON

Both run in ONNX Runtime on the CPU, Q/DQ pairs in float arithmetic as they are written: the integer kernels of some
CPUs saturate, which is no property of a model.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
from inputs import read_feeds

from mpq_deploy.runtime.ort import session_options


def outputs(path: str, feeds: list[dict[str, np.ndarray]]) -> list[np.ndarray]:
    """Run a model on every feed and return its first output, float64."""
    session = ort.InferenceSession(
        path, session_options(fake_quant_only=True), providers=["CPUExecutionProvider"]
    )
    names = {value.name for value in session.get_inputs()}
    return [
        np.asarray(session.run(None, {n: v for n, v in feed.items() if n in names})[0], np.float64)
        for feed in feeds
    ]


model, inputs, candidate = sys.argv[1:4]
held_out = read_feeds(Path(inputs), "heldout")
pairs = zip(outputs(model, held_out), outputs(candidate, held_out), strict=True)
ratios = [float(np.sum(y**2) / max(np.sum((y - q) ** 2), 1e-300)) for y, q in pairs]
decibels = 10 * np.log10(ratios)
print(json.dumps({"mean": float(decibels.mean()), "min": float(decibels.min())}))
