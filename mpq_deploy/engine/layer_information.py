"""Read the layer information that TensorRT proper writes as JSON (inspector, --exportLayerInfo).

Unproven: written after the documented form of TensorRT 10 and 11, without a device. TensorRT-RTX
without a GPU prints its layers in the log instead (``build_log``).
"""

from __future__ import annotations

import re
from typing import Any

from mpq_deploy.engine.build_log import ONNX_NODE, EngineLayer, EngineLog, EngineTensor, totals
from mpq_deploy.errors import EngineError, InputError
from mpq_deploy.system.inputs import as_object, parse_json

# The words of TensorRT's format descriptions, such as "Row major linear FP16 format", and of its
# weights.
_DTYPES = {
    "INT8": "Int8",
    "INT4": "Int4",
    "FP8": "FP8",
    "FP4": "FP4E2M1",
    "FP16": "Half",
    "HALF": "Half",
    "FP32": "Float",
    "FLOAT": "Float",
}
_TYPES = {
    "CASKCONVOLUTION": "correlation",
    "CONVOLUTION": "correlation",
    "CASKGEMMCONVOLUTION": "correlation",
}


def parse_layer_information(text: str, log: str) -> EngineLog:
    """Return the kernels from ``text`` (JSON), and the totals from the builder's ``log``.

    Raises EngineError when the JSON holds no detailed layers.
    """
    try:
        listed = as_object(parse_json(text, "it"), "it")["Layers"]
        if not isinstance(listed, list):
            raise KeyError("Layers")
    except (InputError, KeyError) as error:
        text = "The builder's layer information is not JSON with 'Layers', so the engine cannot be checked."
        raise EngineError(text) from error
    if any(not isinstance(layer, dict) for layer in listed):
        raise EngineError(
            "The builder's layer information holds only names, so the engine cannot be checked.",
            "Build with --profilingVerbosity=detailed.",
        )
    memory = totals(log)
    return EngineLog(
        tuple(_layer(layer) for layer in listed), memory.get("Weights"), memory.get("Activation")
    )


def _layer(layer: dict[str, Any]) -> EngineLayer:
    kind = str(layer.get("LayerType", ""))
    constants = [_tensor(one) for one in layer.get("Constants", ())]
    weights = layer.get("Weights")
    if isinstance(weights, dict) and weights.get("Count"):
        constants.append(
            EngineTensor("weights", (int(weights["Count"]),), _dtype(str(weights.get("Type", ""))))
        )
    return EngineLayer(
        str(layer.get("Name", "")),
        _TYPES.get(kind.upper(), kind),
        tuple(_tensor(one) for one in layer.get("Inputs", ())),
        tuple(constants),
        tuple(_tensor(one) for one in layer.get("Outputs", ())),
        str(layer.get("TacticName", "")),
        tuple(dict.fromkeys(ONNX_NODE.findall(str(layer.get("Metadata", ""))))),
    )


def _tensor(tensor: dict[str, Any]) -> EngineTensor:
    dtype = _dtype(str(tensor.get("Datatype") or tensor.get("Format/Datatype") or ""))
    return EngineTensor(
        str(tensor.get("Name", "")), tuple(map(int, tensor.get("Dimensions", ()))), dtype
    )


def _dtype(described: str) -> str:
    for word in re.findall(r"[A-Za-z]+[0-9]*", described):
        if word.upper() in _DTYPES:
            return _DTYPES[word.upper()]
    return described
