"""The one way to add a constant (an initializer) to a graph."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from mpq_deploy.models.spec import Array


def add_constant(model: ir.Model, name: str, content: Array | ir.TensorProtocol) -> ir.Value:
    """Return the constant ``name`` of ``model`` that holds ``content``; it is added when it is new.

    Tensors are stored as they are: lazy and external ones are not read. A constant that exists
    already is shared when it has the same type and shape, and the same elements where both lie in
    memory; otherwise ValueError.
    """
    value = constant(name, content)
    known = model.graph.initializers.get(name)
    if known is None:
        model.graph.register_initializer(value)
        return value
    if known.const_value is None or not _alike(known.const_value, value.const_value):
        raise ValueError(
            f"The graph has another constant '{name}': {known.const_value}, not {value.const_value}."
        )
    return known


def constant(name: str, content: Array | ir.TensorProtocol) -> ir.Value:
    """Return a value that holds ``content``, for a graph that is still being made."""
    tensor = (
        ir.Tensor(np.asarray(content, order="C"), name=name)
        if isinstance(content, np.ndarray)
        else content
    )
    shape = ir.Shape(tensor.shape.numpy())
    return ir.Value(name=name, shape=shape, type=ir.TensorType(tensor.dtype), const_value=tensor)


def _alike(one: ir.TensorProtocol, other: ir.TensorProtocol | None) -> bool:
    if other is None or one.dtype != other.dtype or one.shape != other.shape:
        return False
    if one is other or not (isinstance(one, ir.Tensor) and isinstance(other, ir.Tensor)):
        return True
    return one.tobytes() == other.tobytes()
