"""Raise the opset of a model, so that quantizers with blocks and INT4 (opset 21) may be added."""

from __future__ import annotations

import onnx
import onnx_ir as ir

from mpq_deploy.errors import ModelError

# The first opset with block-wise DequantizeLinear and INT4.
QUANTIZED_OPSET = 21
# ONNX's converter reads small constants (axes, shapes); larger tensors are weights, which it must not copy.
SMALL_BYTES = 1024


def raise_opset(model: ir.Model, opset: int = QUANTIZED_OPSET) -> ir.Model:
    """Return ``model`` converted to at least ``opset`` by ONNX's own converter; newer models are returned as is.

    The weights do not go through the converter: they stand in as graph inputs meanwhile.
    Raises ModelError naming the operator when the converter cannot convert it.
    """
    declared = model.graph.opset_imports.get("", 0)
    if declared >= opset:
        return model
    graph = model.graph
    for value in graph.initializers.values():
        # Small tensors go through the converter, which knows nothing of files beside the model.
        if isinstance(value.const_value, ir.ExternalTensor) and value.const_value.nbytes <= SMALL_BYTES:
            value.const_value = ir.tensor(value.const_value.numpy().copy(), name=value.name)
    weights = {
        name: value
        for name, value in graph.initializers.items()
        if value.const_value is not None and value.const_value.nbytes > SMALL_BYTES
    }
    tensors = {name: value.const_value for name, value in weights.items()}
    inputs = len(graph.inputs)
    for name, value in weights.items():
        tensor = tensors[name]
        value.shape, value.dtype = ir.Shape(tensor.shape), tensor.dtype  # type: ignore[union-attr, arg-type]
        del graph.initializers[name]
        value.const_value = None
        graph.inputs.append(value)
    proto = ir.to_proto(model)
    del graph.inputs[inputs:]
    converted: ir.Model = ir.from_proto(_converted(proto, declared, opset))
    stand_ins = {value.name: value for value in converted.graph.inputs}
    del converted.graph.inputs[inputs:]
    for name, tensor in tensors.items():
        value = stand_ins[name]
        value.const_value = tensor
        converted.graph.register_initializer(value)
    return converted


def _converted(proto: onnx.ModelProto, declared: int, opset: int) -> onnx.ModelProto:
    from onnx import version_converter

    try:
        return version_converter.convert_version(proto, opset)
    except (RuntimeError, version_converter.ConvertError) as error:
        raise ModelError(
            f"The model has opset {declared}, and ONNX cannot convert it to {opset}: {error}",
            f"Export it again with opset {opset - 1} or {opset}.",
        ) from error
