"""Make infinities in masks finite: gradients, observers and FP16 have no use for them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from mpq_deploy.models.spec import Array

# Readers that hand a mask's values on, or limit others by them. Comparisons with infinity stay what they are.
HANDING_ON = ("Add", "Where", "Concat", "Expand", "Pad", "ScatterND", "Trilu", "Max", "Min", "Clip")


class FiniteMasksPass(ir.passes.InPlacePass):
    """Write infinities in constants that masks and limits are made of as the largest FP32 numbers.

    1. A float initializer with infinities, all of whose readers are ``HANDING_ON``: what PyTorch makes of
       ``masked_fill(-inf)``. A softmax gives the same but where a whole row is masked, which is NaN with infinities.
    2. A ConstantOfShape whose value is infinite.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Go through the initializers, then the nodes."""
        modified = False
        for value in model.graph.initializers.values():
            tensor = value.const_value
            readers = [node.op_type for node, _ in value.uses()]
            if tensor is None or tensor.dtype != ir.DataType.FLOAT or not set(readers) <= set(HANDING_ON):
                continue
            array = tensor.numpy()
            if np.isinf(array).any():
                value.const_value = ir.tensor(finite(array), name=value.name)
                modified = True
        for node in model.graph:
            attribute = node.attributes.get("value") if node.op_type == "ConstantOfShape" else None
            if attribute is not None and np.isinf(attribute.as_tensor().numpy()).any():
                array = attribute.as_tensor().numpy()
                node.attributes["value"] = ir.AttrTensor("value", ir.tensor(finite(array)))
                modified = True
        return ir.passes.PassResult(model, modified)


def finite(array: Array) -> Array:
    """Return ``array`` with the largest FP32 numbers in the place of infinities; NaN stays."""
    largest = np.finfo(np.float32).max
    return np.where(np.isinf(array), np.copysign(largest, array), array).astype(array.dtype)
