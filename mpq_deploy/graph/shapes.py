"""Shapes of all tensors of an ONNX graph as they follow from those of its inputs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx

# Constants that shapes are computed from are smaller.
SHAPE_BYTES = 4096


def known_shapes(
    model: Path, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[onnx.GraphProto, dict[str, tuple[int, ...]]]:
    """Return the graph of ``model``, and every shape that follows from inputs of ``shapes``."""
    graph = inferred_graph(onnx.load(model, load_external_data=False), shapes)
    return graph, _complete(graph)


def inferred_shapes(
    proto: onnx.ModelProto, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """Return what follows from inputs of ``shapes``; ``proto`` loses its own shapes, and weights."""
    return _complete(inferred_graph(proto, shapes))


def _complete(graph: onnx.GraphProto) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for value in (*graph.input, *graph.value_info, *graph.output):
        tensor = value.type.tensor_type
        dims = tensor.shape.dim
        # Without a shape at all the list of sizes is empty too, as that of a scalar is.
        if (
            tensor.elem_type
            and tensor.HasField("shape")
            and all(dim.HasField("dim_value") for dim in dims)
        ):
            shapes[value.name] = tuple(dim.dim_value for dim in dims)
    return shapes


def inferred_graph(
    proto: onnx.ModelProto, shapes: Mapping[str, tuple[int, ...]]
) -> onnx.GraphProto:
    """Return the graph with all shapes inferred from those of its inputs, computed shapes included."""
    for value in proto.graph.input:
        if value.name in shapes:
            shape = value.type.tensor_type.shape
            shape.ClearField("dim")
            # A scalar has a shape, of no sizes.
            shape.SetInParent()
            for size in shapes[value.name]:
                shape.dim.add(dim_value=size)
    for value in proto.graph.output:
        value.type.tensor_type.ClearField("shape")
    del proto.graph.value_info[:]
    for tensor in proto.graph.initializer:
        # Shapes are made of small constants. Large ones in the file itself would be copied, twice.
        if len(tensor.raw_data) > SHAPE_BYTES:
            tensor.ClearField("raw_data")
    return onnx.shape_inference.infer_shapes(proto, data_prop=True).graph
