"""Raise the opset of a model, so that quantizers with blocks and INT4 (opset 21) may be added."""

from __future__ import annotations

import onnx
import onnx_ir as ir
from onnx import version_converter

from mpq_deploy.errors import ModelError
from mpq_deploy.graph.passes.base import GraphPass, ensure
from mpq_deploy.graph.sound import UNKNOWN, set_apart_unknown

# The first opset with block-wise DequantizeLinear and INT4.
QUANTIZED_OPSET = 21
# ONNX's converter reads small constants (axes, shapes); larger tensors are weights, which it must
# not copy.
SMALL_BYTES = 1024


class RaiseOpsetPass(GraphPass):
    """Convert a model to at least ``opset`` by ONNX's own converter.

    1. A model at or above the wanted opset is left alone. 2. The weights do not go through the
    converter: they stand in as graph inputs meanwhile. 3. Operators that ONNX does not have stay as
    they are. 4. What the converter cannot convert is a ModelError with its message. The model is
    not to be used after it.
    """

    def __init__(self, opset: int = QUANTIZED_OPSET) -> None:
        self.opset = opset

    def requires(self, model: ir.Model) -> None:
        """Functions are inlined: the converter does not look into them."""
        if model.functions:
            raise ir.passes.PreconditionError("The model has functions: run InlinePass first.")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Convert the graph without its weights, and give it its weights back."""
        declared = model.graph.opset_imports.get("", 0)
        if declared >= self.opset:
            return ir.passes.PassResult(model, False)
        inputs = len(model.graph.inputs)
        tensors = _take_weights(model.graph)
        proto = ir.to_proto(model)
        # Before this version every constant is an input, too.
        proto.ir_version = max(proto.ir_version, 4)
        set_apart_unknown(proto)
        converted: ir.Model = ir.from_proto(_converted(proto, declared, self.opset))
        converted.graph.opset_imports.pop(UNKNOWN, None)
        for node in converted.graph:
            node.domain = "" if node.domain == UNKNOWN else node.domain
        stand_ins = {value.name: value for value in converted.graph.inputs}
        del converted.graph.inputs[inputs:]
        for name, tensor in tensors.items():
            value = stand_ins[name]
            value.const_value = tensor
            converted.graph.register_initializer(value)
        model.graph, model.ir_version = converted.graph, converted.ir_version
        return ir.passes.PassResult(model, True)

    def ensures(self, model: ir.Model) -> None:
        """The opset is not below the wanted one."""
        declared = model.graph.opset_imports.get("", 0)
        ensure(declared >= self.opset, f"The model has opset {declared}, below {self.opset}.")


def _take_weights(graph: ir.Graph) -> dict[str, ir.TensorProtocol]:
    """Make the weights of ``graph`` inputs, behind its own; return their tensors by name."""
    weights: dict[str, ir.TensorProtocol] = {}
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        if tensor is None:
            continue
        if tensor.nbytes <= SMALL_BYTES:
            # Small tensors go through the converter, which knows nothing of files beside the model.
            if isinstance(tensor, ir.ExternalTensor):
                value.const_value = ir.tensor(tensor.numpy().copy(), name=name)
            continue
        weights[name] = tensor
        value.shape, value.dtype = ir.Shape(tensor.shape), tensor.dtype  # type: ignore[arg-type]
        del graph.initializers[name]
        value.const_value = None
        graph.inputs.append(value)
    return weights


def _converted(proto: onnx.ModelProto, declared: int, opset: int) -> onnx.ModelProto:
    try:
        return version_converter.convert_version(proto, opset)
    except (RuntimeError, version_converter.ConvertError) as error:
        raise ModelError(
            f"The model has opset {declared}, and ONNX cannot convert it to {opset}: {error}",
            f"Export it again with opset {opset - 1} or {opset}.",
        ) from error
