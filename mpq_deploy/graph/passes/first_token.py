"""Keep a text's first token apart: its keys and values become constants (MixDQ)."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from mpq_deploy.errors import UsageError
from mpq_deploy.graph.constants import add_constant
from mpq_deploy.graph.layers import STANDARD_DOMAINS
from mpq_deploy.graph.passes.base import GraphPass, ensure
from mpq_deploy.models.spec import Array

# How far the first tokens of prompts may lie apart, as a share of their largest value (our choice):
# encoders run in half precision and in batches.
SAME_TOKEN = 1e-2


def common_first_token(name: str, texts: Array) -> Array:
    """Return the first token float64 [C] of all rows of the condition ``texts`` [N, T, C].

    Raises UsageError where they do not, or where there is no other token.
    """
    tokens = np.asarray(texts[:, 0], np.float64)
    if texts.shape[1] < 2:
        raise UsageError(
            f"The condition '{name}' has only {texts.shape[1]} token.",
            "Use first_token: quantized (the default).",
        )
    apart = token_distance(tokens, tokens[0])
    if apart > SAME_TOKEN:
        raise UsageError(
            f"The first tokens of '{name}' differ between prompts by {apart:.2g} of their largest value.",
            "first_token: precomputed is for encoders whose first token is the same for every text, such as "
            "CLIP's; use quantized.",
        )
    return np.asarray(tokens.mean(axis=0))


def token_distance(tokens: Array, token: Array) -> float:
    """Return the distance of ``tokens`` [N, C] from ``token`` [C], over its largest value."""
    largest = max(float(np.abs(token).max()), float(np.finfo(np.float32).tiny))
    return float(np.abs(tokens - token).max()) / largest


class FirstTokenPass(GraphPass):
    """Rewrite the projections of the input ``name`` [B, T, C], whose first token is ``token`` [C].

    CLIP's first token is the same for every prompt and far larger than the others, so that it alone
    sets the INT8 range of what the keys and values are made from (Zhao et al. 2024, "MixDQ", arXiv
    2405.17873: quantized apart from the others, its output computed beforehand). Every MatMul that
    reads the text's tokens itself

    1. multiplies tokens 1 to T - 1, which one Slice for all of them takes out: observers, scales
       and rounding see no other;
    2. gets row 0 of its output from a constant, token times weight: float64 here, FP16 as deployed;
    3. and Concat joins the two, by the old output's name.
    4. Other readers (Shape, another projection in front) keep the whole text.
    """

    def __init__(self, name: str, token: Array) -> None:
        self.name, self.token = name, token

    def requires(self, model: ir.Model) -> None:
        """The token has as many channels as every projection takes."""
        for node in projections(model, self.name):
            rows = node.inputs[1].const_value.shape[0]  # type: ignore[union-attr]
            if self.token.shape != (rows,):
                raise ir.passes.PreconditionError(
                    f"The token has shape {self.token.shape}; '{node.name}' takes {rows} channels."
                )

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Go through the projections in graph order."""
        readers = projections(model, self.name)
        if readers:
            text = next(value for value in model.graph.inputs if value.name == self.name)
            rest, batch = _others(model, text), _batch(model, text)
            for node in readers:
                _join(model, node, rest, batch, self.token)
        return ir.passes.PassResult(model, bool(readers))

    def ensures(self, model: ir.Model) -> None:
        """No projection reads the whole text."""
        ensure(
            not projections(model, self.name), f"A projection reads all tokens of '{self.name}'."
        )


def projections(model: ir.Model, name: str) -> list[ir.Node]:
    """Return the nodes that multiply the input ``name`` by a constant matrix."""
    uses = [use for value in model.graph.inputs if value.name == name for use in value.uses()]
    return [node for node, index in uses if index == 0 and _projects(node)]


def _projects(node: ir.Node) -> bool:
    weight = (
        node.inputs[1] if node.op_type == "MatMul" and node.domain in STANDARD_DOMAINS else None
    )
    return (
        weight is not None and weight.const_value is not None and len(weight.const_value.shape) == 2
    )


def _others(model: ir.Model, text: ir.Value) -> ir.Value:
    """Return tokens 1 to T - 1 of ``text``."""
    bounds = [
        add_constant(model, f"{text.name}//others_{part}", np.array([value]))
        for part, value in _BOUNDS.items()
    ]
    node = _node("Slice", [text, *bounds], {}, f"{text.name}/others", ir.DataType.FLOAT)
    if text.shape is not None and isinstance(text.shape[1], int):
        node.outputs[0].shape = ir.Shape([text.shape[0], text.shape[1] - 1, text.shape[2]])
    model.graph.insert_before(model.graph[0], node)
    return node.outputs[0]


# From the second token to the last, along the axis of the tokens.
_BOUNDS = {"start": 1, "end": np.iinfo(np.int32).max, "axis": 1}


def _batch(model: ir.Model, text: ir.Value) -> ir.Value:
    """Return the shape [B, 1, 1] that a constant row is repeated to, once for each sample."""
    shape = _node("Shape", [text], {"start": 0, "end": 1}, f"{text.name}/batch", ir.DataType.INT64)
    ones = add_constant(model, f"{text.name}//one_row", np.array([1, 1]))
    join = _node(
        "Concat", [shape.outputs[0], ones], {"axis": 0}, f"{text.name}/row_shape", ir.DataType.INT64
    )
    model.graph.insert_before(model.graph[0], [shape, join])
    return join.outputs[0]


def _join(model: ir.Model, node: ir.Node, rest: ir.Value, batch: ir.Value, token: Array) -> None:
    """Let ``node`` multiply the ``rest``; put the first token's row before its output."""
    output, weight = node.outputs[0], node.inputs[1]
    assert weight is not None and weight.const_value is not None  # projects
    row = token @ weight.const_value.numpy().astype(np.float64)
    constant = add_constant(
        model, f"{weight.name}//first_token", row.astype(np.float32).reshape(1, 1, -1)
    )
    repeat = _node("Expand", [constant, batch], {}, f"{node.name}/first_token", ir.DataType.FLOAT)
    join = _node(
        "Concat",
        [repeat.outputs[0], output],
        {"axis": 1},
        f"{node.name}/first_token_join",
        ir.DataType.FLOAT,
    )
    joined = join.outputs[0]
    ir.convenience.replace_all_uses_with(output, joined, replace_graph_outputs=True)
    # That replaced the join's own input, too.
    join.replace_input_with(1, output)
    node.replace_input_with(0, rest)
    joined.name, joined.shape, output.name = output.name, output.shape, f"{output.name}//others"
    if rest.shape is not None and output.shape is not None:
        output.shape = ir.Shape([*rest.shape[:2], output.shape[-1]])
    else:
        output.shape = None
    model.graph.insert_after(node, [repeat, join])


def _node(
    op: str, inputs: list[ir.Value], attributes: dict[str, Any], name: str, dtype: ir.DataType
) -> ir.Node:
    node = ir.node(op, inputs, attributes, name=name, num_outputs=1)
    node.outputs[0].name, node.outputs[0].type = f"{name}_output", ir.TensorType(dtype)
    return node
