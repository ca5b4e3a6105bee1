"""Turn half and double precision into FP32, which is measured and quantized."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from mpq_deploy.errors import ModelError
from mpq_deploy.graph.layers import STANDARD_DOMAINS
from mpq_deploy.graph.passes.base import GraphPass, ensure, subgraph_node

HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
OTHERS = (*HALVES, ir.DataType.DOUBLE)
# Integer attributes that name an element type (Cast, RandomNormal, EyeLike, QuantizeLinear, ...).
TYPE_ATTRIBUTES = ("to", "dtype", "output_dtype", "stash_type")


class WidenPass(GraphPass):
    """Replace FLOAT16, BFLOAT16 and DOUBLE by FLOAT everywhere in a graph without control flow.

    1. Weights are converted; inputs, outputs and intermediate values are declared FLOAT.
    2. Attributes that name such a type or hold such a tensor are changed alike.
    3. A Cast that no longer changes anything is removed, unless it gives a graph output.
    4. A model with such types and subgraphs (If, Loop) is refused with a ModelError.
    """

    def requires(self, model: ir.Model) -> None:
        """The model has no control flow, where there is something to widen."""
        node = subgraph_node(model)
        if node is not None and _uses(model, OTHERS):
            raise ModelError(
                f"The model is in half or double precision and has control flow (node '{node.name}', {node.op_type}).",
                "Export it in FP32.",
            )

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Widen weights, values and attributes."""
        if not _uses(model, OTHERS):
            return ir.passes.PassResult(model, False)
        for node in model.graph:
            for attribute in list(node.attributes.values()):
                _widen_attribute(node, attribute)
            for value in node.outputs:
                _declare_float(value)
        for value in (*model.graph.inputs, *model.graph.outputs):
            _declare_float(value)
        for value in list(model.graph.initializers.values()):
            tensor = value.const_value
            if tensor is not None and tensor.dtype in OTHERS:
                value.const_value = ir.tensor(tensor.numpy().astype(np.float32), name=value.name)
            _declare_float(value)
        _remove_idle_casts(model.graph)
        return ir.passes.PassResult(model, True)

    def ensures(self, model: ir.Model) -> None:
        """No weight, input, output or attribute names another float type."""
        ensure(not _uses(model, OTHERS), "Half or double precision is left.")


def uses_halves(model: ir.Model) -> bool:
    """Say whether any weight, input, output or attribute of the graph is in half precision."""
    return _uses(model, HALVES)


def uses_bfloat16(model: ir.Model) -> bool:
    """Say whether any of them is in bfloat16, of which ONNX Runtime runs little on the CPU."""
    return _uses(model, (ir.DataType.BFLOAT16,))


def _uses(model: ir.Model, kinds: tuple[ir.DataType, ...]) -> bool:
    graph = model.graph
    values = (*graph.inputs, *graph.outputs, *graph.initializers.values())
    if any(value.dtype in kinds for value in values):
        return True
    return any(_names(attribute, kinds) for node in graph for attribute in node.attributes.values())


def _names(attribute: ir.Attr, kinds: tuple[ir.DataType, ...]) -> bool:
    if attribute.type == ir.AttributeType.INT:
        return attribute.name in TYPE_ATTRIBUTES and attribute.value in [
            int(kind) for kind in kinds
        ]
    return attribute.type == ir.AttributeType.TENSOR and attribute.value.dtype in kinds


def _widen_attribute(node: ir.Node, attribute: ir.Attr) -> None:
    if not _names(attribute, OTHERS):
        return
    if attribute.type == ir.AttributeType.INT:
        node.attributes[attribute.name] = ir.AttrInt64(attribute.name, int(ir.DataType.FLOAT))
    else:
        widened = ir.tensor(attribute.value.numpy().astype(np.float32))
        node.attributes[attribute.name] = ir.AttrTensor(attribute.name, widened)


def _declare_float(value: ir.Value) -> None:
    if value.dtype in OTHERS:
        value.dtype = ir.DataType.FLOAT


def _remove_idle_casts(graph: ir.Graph) -> None:
    for node in list(graph):
        cast = node.op_type == "Cast" and node.domain in STANDARD_DOMAINS
        if not cast or node.outputs[0].is_graph_output():
            continue
        source = node.inputs[0]
        if source is not None and source.dtype == ir.DataType(node.attributes["to"].value):
            node.outputs[0].replace_all_uses_with(source)
            graph.remove(node, safe=True)
