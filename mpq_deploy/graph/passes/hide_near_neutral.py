"""Keep the exporter's optimizer from treating scalars that are nearly 0 or 1 as 0 or 1."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from mpq_deploy.graph.constants import add_constant
from mpq_deploy.graph.passes.base import GraphPass, ensure

# The optimizer's tolerances: it drops a term within the first of 0, and a factor within the second
# of 1.
NEAR_ZERO, NEAR_ONE = 1e-8, 1e-5


class HideNearNeutralPass(GraphPass):
    """Give scalars nearly 0 or 1 the shape [1], which the optimizer leaves alone.

    x / (y + 1e-15), which is 0 where both are 0, would become 0 / 0.

    1. An operand of rank 0 of Add, Sub, Mul or Div beside one of known rank above 0 is replaced by
       a constant of shape [1], which the result's shape does not depend on.
    2. Exactly 0, and what is far from 0 and 1, stays.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Replace the operands in graph order."""
        scalars = list(_near_neutral(model))
        for node, index, value, tensor in scalars:
            hidden = add_constant(model, f"{value.name}.near_neutral", tensor.numpy().reshape(1))
            node.replace_input_with(index, hidden)
        return ir.passes.PassResult(model, bool(scalars))

    def ensures(self, model: ir.Model) -> None:
        """No such scalar is left."""
        ensure(not any(_near_neutral(model)), "A scalar nearly 0 or 1 is left.")


def _near_neutral(model: ir.Model) -> Iterator[tuple[ir.Node, int, ir.Value, ir.TensorProtocol]]:
    for node in model.graph:
        if node.op_type not in ("Add", "Sub", "Mul", "Div"):
            continue
        for index, other in ((0, 1), (1, 0)):
            value, beside = node.inputs[index], node.inputs[other]
            tensor = None if value is None else ir.convenience.get_const_tensor(value)
            if tensor is None or value is None or tensor.size != 1 or len(tensor.shape):
                continue
            scalar = float(tensor.numpy())
            near = 0 < abs(scalar) <= NEAR_ZERO or 0 < abs(scalar - 1) <= NEAR_ONE
            if near and beside is not None and beside.shape is not None and len(beside.shape):
                yield node, index, value, tensor
