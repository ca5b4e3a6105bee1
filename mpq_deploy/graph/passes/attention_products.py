"""Write Attention (opset 23) as two products and a softmax, which every TensorRT runs."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import numpy as np
import onnx_ir as ir

from mpq_deploy.graph.layers import STANDARD_DOMAINS
from mpq_deploy.graph.passes.base import GraphPass, NodeMaker, ensure

LOWEST = float(np.finfo(np.float32).min)


class AttentionProductsPass(GraphPass):
    """Replace Attention by what PyTorch exports for older opsets.

    TensorRT-RTX takes the operator, and then refuses to build it for heads that none of its kernels
    is for; nothing else of this package knows it.

    1. Queries and keys times the root of the scale, their product, the softmax over keys, the product
       with the values. Tokens of three axes are split into heads before, and joined after.
    2. Fewer heads of keys and values than of queries are repeated.
    3. A mask of numbers is added, one of booleans chooses; both may come with ``softcap``. A causal
       mask is a constant, where the numbers of queries and keys are known.
    4. Forms with past keys, further outputs, or sizes that are needed and unknown stay as they are.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Go through the nodes in graph order."""
        known = [(node, found) for node in model.graph if (found := _form(node)) is not None]
        for node, form in known:
            _replace(model, node, form)
        return ir.passes.PassResult(model, bool(known))

    def ensures(self, model: ir.Model) -> None:
        """No Attention is left that can be replaced."""
        ensure(not any(_form(node) for node in model.graph), "An Attention is left.")


@dataclass(frozen=True)
class _Form:
    """What one Attention is: its heads, the factor of each operand, and the causal mask's shape."""

    heads: int
    kv_heads: int
    root: float
    softcap: float
    flat: bool
    causal: tuple[int, int] | None


def _form(node: ir.Node) -> _Form | None:
    """Return the form of an Attention; None for other nodes, and for forms that stay."""
    if node.op_type != "Attention" or node.domain not in STANDARD_DOMAINS:
        return None
    given = {name: item.value for name, item in node.attributes.items()}
    query, key = node.inputs[:2]
    further = any(any(value.uses()) or value.is_graph_output() for value in node.outputs[1:])
    if further or any(value is not None for value in node.inputs[4:]):
        return None
    if query is None or key is None or query.shape is None or key.shape is None:
        return None
    flat = len(query.shape) == 3
    heads = given.get("q_num_heads") if flat else query.shape[1]
    kv_heads = given.get("kv_num_heads") if flat else key.shape[1]
    width, lengths = query.shape[-1], (query.shape[-2], key.shape[-2])
    if not (isinstance(heads, int) and isinstance(kv_heads, int)) or heads % kv_heads:
        return None
    scale = float(given.get("scale", 0.0))
    if not scale:
        if not isinstance(width, int):
            return None
        scale = 1 / sqrt(width // heads if flat else width)
    causal = None
    if given.get("is_causal", 0):
        queries, keys = lengths
        if not (isinstance(queries, int) and isinstance(keys, int)):
            return None
        causal = (queries, keys)
    return _Form(heads, kv_heads, sqrt(scale), float(given.get("softcap", 0.0)), flat, causal)


def _replace(model: ir.Model, node: ir.Node, form: _Form) -> None:
    query, key, value, mask = (*node.inputs, None)[:4]
    new = NodeMaker(model, node.name or "Attention")
    counts = (form.heads, form.kv_heads, form.kv_heads)
    operands = [query, key, value]
    if form.flat:
        operands = [_split(new, one, heads) for one, heads in zip(operands, counts)]
    if form.heads != form.kv_heads:
        group = np.arange(form.heads) // (form.heads // form.kv_heads)
        index = new.constant("heads_of_keys", group)
        operands[1:] = [new.op("Gather", one, index, axis=1) for one in operands[1:]]
    queries, keys, values = operands
    root = new.constant("root_of_scale", np.array([form.root], np.float32))
    turned = new.op("Transpose", keys, perm=(0, 1, 3, 2))
    scores = new.op("MatMul", new.op("Mul", queries, root), new.op("Mul", turned, root))
    if form.softcap:
        cap = new.constant("softcap", np.array([form.softcap], np.float32))
        scores = new.op("Mul", new.op("Tanh", new.op("Div", scores, cap)), cap)
    if form.causal is not None:
        lowest = np.full(form.causal, LOWEST, np.float32)
        scores = new.op("Add", scores, new.constant("causal", np.triu(lowest, 1)))
    if mask is not None:
        scores = _masked(new, scores, mask)
    attended = new.op("MatMul", new.op("Softmax", scores, axis=-1), values)
    if form.flat:
        joined = new.op("Transpose", attended, perm=(0, 2, 1, 3))
        attended = new.op("Reshape", joined, new.constant("joined", np.array([0, 0, -1])))
    old = node.outputs[0]
    attended.name, attended.shape, attended.type = old.name, old.shape, old.type
    model.graph.insert_before(node, new.nodes)
    old.replace_all_uses_with(attended, replace_graph_outputs=True)
    model.graph.remove(node, safe=True)


def _split(new: NodeMaker, tokens: ir.Value | None, heads: int) -> ir.Value:
    """Return tokens [batch, length, heads * width] as [batch, heads, length, width]."""
    apart = new.op("Reshape", tokens, new.constant(f"{heads}_heads", np.array([0, 0, heads, -1])))
    return new.op("Transpose", apart, perm=(0, 2, 1, 3))


def _masked(new: NodeMaker, scores: ir.Value, mask: ir.Value) -> ir.Value:
    if mask.dtype != ir.DataType.BOOL:
        return new.op("Add", scores, mask)
    return new.op("Where", mask, scores, new.constant("lowest", np.array([LOWEST], np.float32)))
