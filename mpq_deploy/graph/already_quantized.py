"""Graphs that another tool has quantized: refused, since rounding again would only add error.

In: an ``onnx_ir.Model`` as it was read. Out: nothing, or a ModelError that names the first node.
"""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from mpq_deploy.errors import ModelError

# Operators of ONNX, of ONNX Runtime and of TensorRT that hold or make codes.
QUANTIZERS = frozenset({
    "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "QLinearConv", "QLinearMatMul",
    "ConvInteger", "MatMulInteger", "QGemm", "QAttention", "QEmbedLayerNormalization",
    "QOrderedMatMul", "QOrderedAttention", "QLinearAdd", "QLinearMul", "QLinearSigmoid",
    "QLinearSoftmax", "QLinearConcat", "QLinearAveragePool", "QLinearGlobalAveragePool",
    "MatMulNBits", "MatMulBnb4", "MatMulFpQ4", "GatherBlockQuantized", "DynamicQuantizeMatMul",
    "MatMulIntegerToFloat", "TRT_FP8QuantizeLinear", "TRT_FP8DequantizeLinear",
    "TRT_INT4QuantizeLinear", "TRT_INT4DequantizeLinear", "TRT_FP4DynamicQuantize",
    "TRT_MXFP8DynamicQuantize", "TRT_MXFP8DequantizeLinear",
})  # fmt: skip
# Types of constants that hold codes wherever they stand; INT8 and UINT8 do where a Cast makes
# floats of them.
CODES = ("INT4", "UINT4", "INT2", "UINT2", "FLOAT8", "FLOAT4")
BYTES = ("INT8", "UINT8")
FLOAT_FILE = "Give the float file that it was made from: mpq-deploy quantizes it itself."


def refuse_quantized(model: ir.Model, path: Path) -> None:
    """Raise ModelError where a node of ``model``, which was read from ``path``, holds or makes codes."""
    quantizers = [node for node in _nodes(model) if node.op_type in QUANTIZERS]
    if quantizers:
        first = quantizers[0]
        raise ModelError(
            f"{path} is already quantized: {len(quantizers):,} of its nodes quantize or dequantize, the first is "
            f"'{first.name}' ({first.op_type}).",
            FLOAT_FILE,
        )
    for node in _nodes(model):
        for value in node.inputs:
            kind = "" if value is None or not value.is_initializer() else _type(value)
            cast = node.op_type == "Cast" and kind in BYTES and _to_float(node)
            if value is not None and (kind.startswith(CODES) or cast):
                raise ModelError(
                    f"{path} is already quantized: its weight '{value.name}' is stored as {kind}.",
                    FLOAT_FILE,
                )


def _nodes(model: ir.Model) -> list[ir.Node]:
    """Return every node, those of subgraphs and functions too."""
    graphs: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    return [node for graph in graphs for node in ir.traversal.RecursiveGraphIterator(graph)]


def _type(value: ir.Value) -> str:
    tensor = value.const_value
    return "" if tensor is None else tensor.dtype.name


def _to_float(node: ir.Node) -> bool:
    """Whether a Cast makes floats."""
    to = node.attributes.get("to")
    return to is not None and ir.DataType(to.as_int()).is_floating_point()
