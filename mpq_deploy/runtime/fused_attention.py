"""Attention as ONNX Runtime's one operator on the CPU, which never holds all scores at once.

In: a graph that a session on the CPU is about to be opened on. Out: the same values to 1e-6, where
softmax(Q K^T) V without a mask was three nodes. At 64 x 64 latents Stable Diffusion 1.5's scores
take 0.5 GB per sample, twice; the operator works on blocks of them that fit the cache
(MultiHeadAttention of ONNX Runtime's contrib operators). The file itself stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from mpq_deploy.graph.attention import PlainAttention, plain_attention

CONTRIB, CONTRIB_VERSION = "com.microsoft", 1
# Scores of one sample from which on the operator is faster: below, its copies of the operands take
# as long as it saves (measured on two cores: 0.9 of the speed at 16 x 16 tokens, 1.2 to 2 of it
# from 256 x 256 on).
LEAST_SCORES = 1 << 18


@dataclass(frozen=True)
class _Heads:
    """Of an attention's operands [N, heads, tokens, size] or, without heads, [N, tokens, size]."""

    rank: int
    count: int
    scores: int


def fused_proto(proto: onnx.ModelProto) -> bytes | None:
    """Return ``proto`` with its attentions fused; None where there is none to fuse.

    Constants in files stay named as they are.
    """
    made = {name for node in proto.graph.node if node.op_type == "Softmax" for name in node.output}
    known = {value.name: value.type.tensor_type.shape.dim for value in proto.graph.value_info}
    # Nearly all that a graph says of its scores' sizes spares building it.
    if all(
        (sizes := [size.dim_value for size in known.get(name, ())][1:])
        and all(sizes)
        and prod(sizes) < LEAST_SCORES
        for name in made
    ):
        return None
    model = ir.from_proto(proto)
    return ir.to_proto(model).SerializeToString() if fuse_attention(model) else None


def fuse_attention(model: ir.Model) -> int:
    """Fuse the large attentions of ``model`` in place; return how many."""
    found = [(node, one) for node in model.graph if (one := plain_attention(node)) is not None]
    if any(_heads(one) is None for _, one in found):
        ShapeInferencePass()(model)
    fused = 0
    for node, one in found:
        heads = _heads(one)
        if heads is not None and heads.scores >= LEAST_SCORES:
            _fuse(model, node, one, heads)
            fused += 1
    if fused:
        model.opset_imports.setdefault(CONTRIB, CONTRIB_VERSION)
    return fused


def _heads(one: PlainAttention) -> _Heads | None:
    """Return the operands' heads; None where their sizes are unknown, or not float32.

    Keys whose number is left open, as exporters do, count as as many as there are queries.
    """
    shapes = [value.shape for value in (one.queries, one.keys, one.values)]
    if one.queries.dtype != ir.DataType.FLOAT or any(shape is None for shape in shapes):
        return None
    queries, keys, values = ([_size(size) for size in shape or ()] for shape in shapes)
    if not len(queries) == len(keys) == len(values) or len(queries) not in (3, 4):
        return None
    heads = queries[1] if len(queries) == 4 else 1
    if len(queries) == 4 and not queries[1] == keys[1] == values[1]:
        return None
    if heads is None or queries[-2] is None or queries[-1] is None or values[-1] is None:
        return None
    return _Heads(len(queries), heads, heads * queries[-2] * (keys[-1] or queries[-2]))


def _size(size: object) -> int | None:
    return size if isinstance(size, int) else None


def _fuse(model: ir.Model, last: ir.Node, one: PlainAttention, heads: _Heads) -> None:
    made: list[ir.Node] = []
    prefix = last.name or last.outputs[0].name or "attention"

    def node(op: str, inputs: list[ir.Value], domain: str = "", **attributes: object) -> ir.Value:
        name = f"{prefix}/fused.{len(made)}"
        made.append(ir.node(op, inputs, attributes, domain=domain, name=name))
        made[-1].outputs[0].name = name
        return made[-1].outputs[0]

    def sizes(kind: str, values: list[int]) -> ir.Value:
        name = f"{prefix}/fused.{kind}"
        tensor = ir.tensor(values, ir.DataType.INT64, name)
        value = ir.Value(name=name, const_value=tensor, shape=ir.Shape([len(values)]))
        value.dtype = ir.DataType.INT64
        model.graph.register_initializer(value)
        return value

    def rows(value: ir.Value, perm: tuple[int, ...]) -> ir.Value:
        """Return [N, tokens, heads * size]."""
        moved = node("Transpose", [value], perm=perm)
        return moved if heads.rank == 3 else node("Reshape", [moved, joined])

    if heads.rank == 3:
        operands = [one.queries, rows(one.keys, (0, 2, 1)), one.values]
    else:
        joined = sizes("joined", [0, 0, -1])
        perms = (0, 2, 1, 3), (0, 3, 1, 2), (0, 2, 1, 3)
        given = one.queries, one.keys, one.values
        operands = [rows(value, perm) for value, perm in zip(given, perms, strict=True)]
    found = node(
        "MultiHeadAttention", operands, CONTRIB, num_heads=heads.count, scale=float(one.scale)
    )
    if heads.rank == 4:
        apart = node("Reshape", [found, sizes("apart", [0, 0, heads.count, -1])])
        found = node("Transpose", [apart], perm=(0, 2, 1, 3))
    output, graph = last.outputs[0], model.graph
    graph.insert_after(last, made)
    found.shape, found.type = output.shape, output.type
    name, was_output = output.name, output.is_graph_output()
    output.name = f"{prefix}/fused.before"
    ir.convenience.replace_all_uses_with(output, found, replace_graph_outputs=was_output)
    found.name = name
    graph.remove([last, *one.dropped], safe=True)
