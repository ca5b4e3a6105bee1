"""Make infinities in masks finite: gradients, observers and FP16 cannot handle them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from mpq_deploy.graph.passes.base import GraphPass, ensure
from mpq_deploy.models.spec import Array

# Readers that pass a mask's values on, or limit others by them. Comparisons with infinity stay as
# they are.
HANDING_ON = ("Add", "Where", "Concat", "Expand", "Pad", "ScatterND", "Trilu", "Max", "Min", "Clip")


class FiniteMasksPass(GraphPass):
    """Write infinities in constants that masks and limits are made of as the largest FP32 numbers.

    1. A float initializer with infinities, all of whose readers are ``HANDING_ON``: what PyTorch
       makes of ``masked_fill(-inf)``. A softmax gives the same but where a whole row is masked,
       which is NaN with infinities.
    2. A ConstantOfShape whose value is infinite.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Go through the initializers, then the nodes."""
        masks, fills = list(_infinite_masks(model)), list(_infinite_fills(model))
        for value, array in masks:
            value.const_value = ir.tensor(finite(array), name=value.name)
        for node, array in fills:
            node.attributes["value"] = ir.AttrTensor("value", ir.tensor(finite(array)))
        return ir.passes.PassResult(model, bool(masks or fills))

    def ensures(self, model: ir.Model) -> None:
        """No mask or fill is infinite."""
        ensure(
            not any(_infinite_masks(model)) and not any(_infinite_fills(model)),
            "An infinite mask is left.",
        )


def _infinite_masks(model: ir.Model) -> Iterator[tuple[ir.Value, Array]]:
    for value in model.graph.initializers.values():
        tensor = value.const_value
        readers = {node.op_type for node, _ in value.uses()}
        if tensor is not None and tensor.dtype == ir.DataType.FLOAT and readers <= set(HANDING_ON):
            array = tensor.numpy()
            if np.isinf(array).any():
                yield value, array


def _infinite_fills(model: ir.Model) -> Iterator[tuple[ir.Node, Array]]:
    for node in model.graph:
        if node.op_type == "ConstantOfShape" and "value" in node.attributes:
            array = node.attributes["value"].as_tensor().numpy()
            if np.isinf(array).any():
                yield node, array


def finite(array: Array) -> Array:
    """Return ``array`` with the largest FP32 numbers in the place of infinities; NaN stays."""
    largest = np.finfo(np.float32).max
    return np.where(np.isinf(array), np.copysign(largest, array), array).astype(array.dtype)
