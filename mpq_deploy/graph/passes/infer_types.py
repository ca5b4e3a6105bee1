"""Find the element types of all values: the FP16 graph has a Cast wherever FP32 and FP16 meet."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir
import onnx_ir.passes.common as common_passes

from mpq_deploy.errors import ModelError
from mpq_deploy.graph.layers import STANDARD_DOMAINS
from mpq_deploy.graph.passes.base import GraphPass
from mpq_deploy.graph.sound import check_growth, known_operator

FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)


class InferTypesPass(GraphPass):
    """Give every value that some node reads its type, where the file declares none.

    1. ONNX's own inference follows the types from the inputs and weights; shapes come with them.
    2. It stops at GroupNormalization, whose output is like its input, and at operators that ONNX
       does not have in this opset: their outputs take the type of their floats, if that is one (what
       the operators of ONNX Runtime do). From there it goes on.
    3. A graph whose values all have types is left as it is. What stays unknown is a ModelError that
       names the value.
    4. Constants that multiply, which inference would follow, are refused first.
    """

    def requires(self, model: ir.Model) -> None:
        """Constants do not multiply."""
        check_growth(model)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Infer until nothing follows any more."""
        if not any(_untyped(model)):
            return ir.passes.PassResult(model, False)
        infer = common_passes.ShapeInferencePass(check_type=False, strict_mode=False)
        infer(model)
        while _type_others(model):
            infer(model)
        return ir.passes.PassResult(model, True)

    def ensures(self, model: ir.Model) -> None:
        """Every value that a node reads has a type."""
        for value in _untyped(model):
            node = value.producer()
            raise ModelError(
                f"The type of '{value.name}' is not known: ONNX cannot infer what "
                f"{node.op_type if node is not None else 'the model'} gives.",
                "Check it with onnx.checker; run ONNX shape inference on it and save it again, or export it with plain "
                "ONNX operators.",
            )


def _untyped(model: ir.Model) -> Iterator[ir.Value]:
    """Yield the values without a type that a node reads."""
    for node in model.graph:
        yield from (value for value in node.outputs if value.type is None and any(value.uses()))


def _type_others(model: ir.Model) -> bool:
    """Type outputs that ONNX infers nothing of like their inputs; say whether any were."""
    changed, opset = False, model.graph.opset_imports.get("", 0)
    for node in model.graph:
        ours = node.domain in STANDARD_DOMAINS and known_operator(node.op_type, opset)
        if all(value.type is not None for value in node.outputs) or (
            ours and node.op_type != "GroupNormalization"
        ):
            continue
        kinds = {
            value.dtype for value in node.inputs if value is not None and value.dtype in FLOATS
        }
        if len(kinds) != 1:
            continue
        kind = kinds.pop()
        assert kind is not None
        for value in (one for one in node.outputs if one.type is None):
            value.type = ir.TensorType(kind)
            if ours and node.inputs[0] is not None:
                value.shape = node.inputs[0].shape
            changed = True
    return changed
