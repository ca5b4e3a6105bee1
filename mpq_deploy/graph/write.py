"""From a plan to files: the FP16 graph for TensorRT and its FP32-arithmetic twin for ONNX Runtime.

In: the exported model, the scheme and codes of every layer, the activation scales. Out: ``model.onnx`` and
``model.fp32.onnx`` over one ``weights.bin``. Both hold the same integers and scales, because they are the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx_ir as ir

from mpq_deploy.graph.load import load_model
from mpq_deploy.graph.passes.fp16_arithmetic import fp16_arithmetic
from mpq_deploy.graph.passes.fp16_region import Fp16Region, fp16_region
from mpq_deploy.graph.passes.fp16_storage import fp16_storage
from mpq_deploy.graph.passes.quantize_layers import LayerRewrite, quantize_layers
from mpq_deploy.graph.save import constant_bytes, save_sharing

DEPLOYED = "model.onnx"
SIMULATED = "model.fp32.onnx"
WEIGHTS = "weights.bin"


def write_quantized(
    exported: Path,
    timestep: str,
    sample: str,
    rewrites: Sequence[LayerRewrite],
    scales: Mapping[str, float],
    folder: Path,
) -> int:
    """Write both graphs of a plan into ``folder``; return the bytes of all constants, counted from the file.

    ``exported`` is the FP32 model; ``timestep`` and ``sample`` name its inputs; ``scales`` are INT8 scales by
    activation tensor.
    """
    models = {}
    for name, finish in ((DEPLOYED, fp16_arithmetic), (SIMULATED, fp16_storage)):
        model = load_model(exported)
        region = fp16_region(model, timestep, sample)
        quantize_layers(model, list(rewrites), scales)
        finish(model, region)
        models[name] = model
    save_sharing(models, folder, WEIGHTS)
    return constant_bytes(folder / DEPLOYED)


def fp16_bytes(model: ir.Model, timestep: str, sample: str) -> int:
    """Bytes of all constants of ``model`` when deployed in FP16 without quantization; rewrites ``model``."""
    region: Fp16Region = fp16_region(model, timestep, sample)
    fp16_arithmetic(model, region)
    return sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
