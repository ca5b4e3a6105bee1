"""Write sequences of tensors as the tensors: no TensorRT has sequences."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common_passes

from mpq_deploy.errors import ModelError
from mpq_deploy.graph.layers import STANDARD_DOMAINS
from mpq_deploy.graph.passes.base import GraphPass, NodeMaker
from mpq_deploy.graph.sound import check_growth

SEQUENCES = (
    *("SplitToSequence", "SequenceAt", "SequenceConstruct", "SequenceEmpty", "SequenceInsert"),
    *("SequenceErase", "SequenceLength", "SequenceMap", "ConcatFromSequence"),
)


class UnrollSequencesPass(GraphPass):
    """Replace what torch's exporters write for lists of tensors, where they are not optimized.

    1. SplitToSequence whose parts are known: by sizes that are a constant, or of one size along an
       axis whose size is declared or can be inferred. It becomes a Slice per part, or a Gather without ``keepdims``.
    2. SequenceConstruct: its inputs.
    3. SequenceAt with a constant position is one of these; ConcatFromSequence joins them.
    4. Any other sequence is a ModelError that names its node.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Go through the nodes in graph order."""
        parts: dict[ir.Value, list[ir.Value]] = {}
        nodes = [node for node in model.graph if _of_sequences(node)]
        if any(node.op_type == "SplitToSequence" and not _sizes(node) for node in nodes):
            check_growth(model)
            common_passes.ShapeInferencePass(check_type=False, strict_mode=False)(model)
        for node in nodes:
            made = _parts(model, node)
            if made is not None:
                parts[node.outputs[0]] = made
            elif node.inputs and node.inputs[0] in parts:
                _replace(model, node, parts[node.inputs[0]])
        for node in reversed(nodes):
            if node.graph is not None and not any(node.outputs[0].uses()):
                model.graph.remove(node, safe=True)
        return ir.passes.PassResult(model, bool(nodes))

    def ensures(self, model: ir.Model) -> None:
        """No sequence is left."""
        for node in model.graph:
            if _of_sequences(node):
                raise ModelError(
                    f"The node '{node.name}' ({node.op_type}) handles a sequence of tensors whose parts are not "
                    "known before run time.",
                    "Export the model with plain tensors (torch.onnx.export with optimize=True).",
                )


def _of_sequences(node: ir.Node) -> bool:
    return node.op_type in SEQUENCES and node.domain in STANDARD_DOMAINS


def _parts(model: ir.Model, node: ir.Node) -> list[ir.Value] | None:
    """Return the tensors of the sequence that ``node`` makes; None where they are not known."""
    if node.op_type == "SequenceConstruct":
        return [value for value in node.inputs if value is not None]
    sizes = _sizes(node) if node.op_type == "SplitToSequence" else None
    if sizes is None:
        return None
    x, axis = node.inputs[0], node.attributes.get_int("axis", 0)
    new, ends, made = NodeMaker(model, node.outputs[0].name or ""), np.cumsum(sizes), []
    squeezed = len(node.inputs) < 2 and not node.attributes.get_int("keepdims", 1)
    for start, end in zip(ends - sizes, ends):
        if squeezed:
            place = new.constant(f"place_{start}", np.array(start))
            made.append(new.op("Gather", x, place, axis=axis))
        else:
            bounds = [new.constant(f"at_{at}", np.array([at])) for at in (start, end)]
            made.append(new.op("Slice", x, *bounds, new.constant("axes", np.array([axis]))))
    model.graph.insert_before(node, new.nodes)
    return made


def _sizes(node: ir.Node) -> list[int] | None:
    x, split = (*node.inputs, None)[:2]
    dims = None if x is None else x.shape
    size = None if dims is None else dims[node.attributes.get_int("axis", 0)]
    if split is not None and split.const_value is None:
        return None
    given = np.array(1) if split is None or split.const_value is None else split.const_value.numpy()
    if given.ndim:
        return [int(one) for one in given]
    whole, step = size if isinstance(size, int) else 0, int(given)
    return [min(step, whole - start) for start in range(0, whole, step)] or None


def _replace(model: ir.Model, node: ir.Node, parts: list[ir.Value]) -> None:
    """Put a tensor in the place of a SequenceAt or ConcatFromSequence that reads ``parts``."""
    old, new = node.outputs[0], NodeMaker(model, node.outputs[0].name or "")
    place = node.inputs[1].const_value if len(node.inputs) > 1 and node.inputs[1] else None
    if node.op_type == "SequenceAt" and place is not None:
        result = new.op("Identity", parts[int(place.numpy())])
    elif node.op_type == "ConcatFromSequence":
        axis = node.attributes.get_int("axis")
        if node.attributes.get_int("new_axis", 0):
            # Before opset 13 the axes are an attribute.
            old_form = model.graph.opset_imports.get("", 0) < 13
            axes = None if old_form else new.constant("axes", np.array([axis]))
            given = {"axes": [axis]} if old_form else {}
            parts = [new.op("Unsqueeze", *filter(None, (one, axes)), **given) for one in parts]
        result = new.op("Concat", *parts, axis=axis)
    else:
        return
    result.name, result.shape, result.type = old.name, old.shape, old.type
    model.graph.insert_before(node, new.nodes)
    old.replace_all_uses_with(result, replace_graph_outputs=True)
    model.graph.remove(node, safe=True)
