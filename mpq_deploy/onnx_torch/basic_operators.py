"""A table of ONNX operators in torch, with autograd: elementwise, shapes, reductions.

Operators with windows, norms and attention are in ``operators``; ``OPERATORS`` there holds both.
Every entry is a function (call, inputs) -> output or outputs, written from the ONNX operator
specification (opset 13 and later) and compared with ONNX Runtime in the tests. What an operator
reads as numbers (``host_values``) is given on the CPU, all other inputs on the device of the call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch.nn import functional

Tensor = torch.Tensor
Inputs = Sequence[Any]
Outputs = Any

# ONNX TensorProto.DataType -> torch, except for floats of one type (see Call).
INTEGER_TYPES: dict[int, torch.dtype] = {
    2: torch.uint8,
    3: torch.int8,
    5: torch.int16,
    6: torch.int32,
    7: torch.int64,
    9: torch.bool,
}
DOUBLE = 11
FLOATS = (1, 10, 16)


class UnsupportedForm(Exception):  # noqa: N818 - a signal to the evaluator, which adds the node's name
    """An operator of the table with an attribute or type that the table does not cover."""


@dataclass(frozen=True)
class Call:
    """One node, read: attributes, opset, number of outputs, type to compute floats in, and where.

    The graph's FLOAT, FLOAT16 and BFLOAT16 are computed in ``float_type``, DOUBLE in float64.
    """

    attributes: Mapping[str, Any]
    opset: int
    outputs: int
    float_type: torch.dtype
    device: Any = None

    def get(self, name: str, default: Any) -> Any:
        """Return the attribute ``name``, or ``default`` when the node does not have it."""
        return self.attributes.get(name, default)

    def dtype(self, onnx_type: int) -> torch.dtype:
        """Return the torch type in which ONNX type ``onnx_type`` is evaluated."""
        if onnx_type in FLOATS:
            return self.float_type
        if onnx_type == DOUBLE:
            return torch.float64
        if onnx_type not in INTEGER_TYPES:
            raise UnsupportedForm(f"the tensor type number {onnx_type}")
        return INTEGER_TYPES[onnx_type]


Operator = Callable[[Call, Inputs], Outputs]


def optional(inputs: Inputs, index: int) -> Any:
    """Return input ``index``, or None when the node leaves it out."""
    return inputs[index] if index < len(inputs) else None


def integers(tensor: Any) -> list[int]:
    """Return an int64 tensor as a flat list."""
    return [int(v) for v in tensor.reshape(-1).tolist()]


def axis_index(tensor: Any, axis: int) -> int:
    """Return ``axis`` counted from the front."""
    return axis + tensor.ndim if axis < 0 else axis


# --- elementwise
# ---------------------------------------------------------------------------------------------


def _unary(function: Callable[[Any], Any]) -> Operator:
    return lambda call, x: function(x[0])


def _binary(function: Callable[[Any, Any], Any]) -> Operator:
    return lambda call, x: function(x[0], x[1])


def _variadic(function: Callable[[Any, Any], Any]) -> Operator:
    return lambda call, x: reduce(function, x)


def _div(call: Call, x: Inputs) -> Outputs:
    if x[0].is_floating_point():
        return x[0] / x[1]
    return torch.div(x[0], x[1], rounding_mode="trunc")


def _mod(call: Call, x: Inputs) -> Outputs:
    return torch.fmod(x[0], x[1]) if call.get("fmod", 0) else torch.remainder(x[0], x[1])


def _clip(call: Call, x: Inputs) -> Outputs:
    low, high = optional(x, 1), optional(x, 2)
    if low is None and high is None:
        return x[0]
    return torch.clamp(x[0], low, high)


def _hard_sigmoid(call: Call, x: Inputs) -> Outputs:
    return torch.clamp(call.get("alpha", 0.2) * x[0] + call.get("beta", 0.5), 0, 1)


# --- shapes
# --------------------------------------------------------------------------------------------------


def _shape(call: Call, x: Inputs) -> Outputs:
    return torch.tensor(
        list(x[0].shape)[call.get("start", 0) : call.get("end", None)], dtype=torch.int64
    )


def _reshape(call: Call, x: Inputs) -> Outputs:
    target = integers(x[1])
    if not call.get("allowzero", 0):
        target = [x[0].shape[i] if size == 0 else size for i, size in enumerate(target)]
    return x[0].reshape(target)


def _flatten(call: Call, x: Inputs) -> Outputs:
    axis = axis_index(x[0], call.get("axis", 1))
    rows = 1
    for size in x[0].shape[:axis]:
        rows *= size
    return x[0].reshape(rows, -1)


def _split(call: Call, x: Inputs) -> Outputs:
    axis = call.get("axis", 0)
    sizes = optional(x, 1)
    if sizes is not None:
        return torch.split(x[0], integers(sizes), axis)
    parts = call.get("num_outputs", call.outputs)
    part = -(-x[0].shape[axis] // parts)
    return torch.split(x[0], part, axis)


def _slice(call: Call, x: Inputs) -> Outputs:
    starts, ends = integers(x[1]), integers(x[2])
    axes = integers(x[3]) if optional(x, 3) is not None else list(range(len(starts)))
    steps = integers(x[4]) if optional(x, 4) is not None else [1] * len(starts)
    result = x[0]
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        index = range(*slice(start, end, step).indices(result.shape[axis]))
        if step == 1:
            result = (
                result.narrow(axis, index.start, len(index))
                if len(index)
                else result.narrow(axis, 0, 0)
            )
        else:
            places = torch.tensor(list(index), dtype=torch.int64)
            result = result.index_select(axis, places.to(result.device, non_blocking=True))
    return result


def _gather(call: Call, x: Inputs) -> Outputs:
    axis = axis_index(x[0], call.get("axis", 0))
    index = x[1].to(torch.int64)
    index = torch.where(index < 0, index + x[0].shape[axis], index)
    picked = x[0].index_select(axis, index.reshape(-1))
    # As one list: a scalar taken from a vector has no sizes at all.
    return picked.reshape((*x[0].shape[:axis], *index.shape, *x[0].shape[axis + 1 :]))


def _gather_elements(call: Call, x: Inputs) -> Outputs:
    axis = axis_index(x[0], call.get("axis", 0))
    index = x[1].to(torch.int64)
    return torch.gather(x[0], axis, torch.where(index < 0, index + x[0].shape[axis], index))


def _gather_nd(call: Call, x: Inputs) -> Outputs:
    """Entries of x[0] at the places in the last axis of x[1], in each of the ``batch_dims`` first axes' rows."""
    index, batch = x[1].to(torch.int64), call.get("batch_dims", 0)
    rows = [
        torch.arange(size, device=index.device).reshape(-1, *(1,) * (index.ndim - 2 - axis))
        for axis, size in enumerate(x[0].shape[:batch])
    ]
    sizes = x[0].shape[batch : batch + index.shape[-1]]
    single = index.ndim == 1
    # torch reads an index of no axes on the host.
    index = index[None] if single else index
    places = [torch.where(one < 0, one + size, one) for one, size in zip(index.unbind(-1), sizes)]
    found = x[0][tuple(rows + places)]
    return found[0] if single else found


def _one_hot(call: Call, x: Inputs) -> Outputs:
    depth, (off, on) = int(x[1].item()), x[2].unbind()
    axis = call.get("axis", -1)
    axis += x[0].ndim + 1 if axis < 0 else 0
    index = torch.where(x[0] < 0, x[0] + depth, x[0]).unsqueeze(axis)
    places = torch.arange(depth, device=x[0].device).reshape(-1, *(1,) * (x[0].ndim - axis))
    return torch.where(index == places, on, off)


def _scatter_elements(call: Call, x: Inputs) -> Outputs:
    if call.get("reduction", "none") != "none":
        raise UnsupportedForm("a reduction")
    axis = axis_index(x[0], call.get("axis", 0))
    index = x[1].to(torch.int64)
    return torch.scatter(x[0], axis, torch.where(index < 0, index + x[0].shape[axis], index), x[2])


def _scatter_nd(call: Call, x: Inputs) -> Outputs:
    reduction = call.get("reduction", "none")
    if reduction not in ("none", "add"):
        raise UnsupportedForm(f"reduction={reduction}")
    places = x[1].to(torch.int64).unbind(-1)
    return torch.index_put(x[0], places, x[2], accumulate=reduction == "add")


def _arg(function: Callable[..., Any]) -> Operator:
    def operator(call: Call, x: Inputs) -> Outputs:
        if call.get("select_last_index", 0):
            raise UnsupportedForm("select_last_index")
        return function(x[0], call.get("axis", 0), bool(call.get("keepdims", 1)))

    return operator


def _top_k(call: Call, x: Inputs) -> Outputs:
    largest = bool(call.get("largest", 1))
    found = torch.topk(x[0], int(x[1].item()), call.get("axis", -1), largest, True)
    return tuple(found)


def _selu(call: Call, x: Inputs) -> Outputs:
    alpha, gamma = call.get("alpha", 1.6732632), call.get("gamma", 1.0507009)
    return gamma * functional.elu(x[0], alpha)


def _unsqueeze(call: Call, x: Inputs) -> Outputs:
    axes = integers(x[1])
    rank = x[0].ndim + len(axes)
    result = x[0]
    for axis in sorted(axis % rank for axis in axes):
        result = result.unsqueeze(axis)
    return result


def _squeeze(call: Call, x: Inputs) -> Outputs:
    axes = optional(x, 1)
    return torch.squeeze(x[0]) if axes is None else torch.squeeze(x[0], tuple(integers(axes)))


def _expand(call: Call, x: Inputs) -> Outputs:
    return x[0].expand(torch.broadcast_shapes(x[0].shape, tuple(integers(x[1]))))


def _constant_of_shape(call: Call, x: Inputs) -> Outputs:
    value = call.get("value", None)
    zero = torch.zeros((), dtype=call.float_type, device=call.device)
    fill = zero if value is None else value.reshape(())
    return fill.expand(integers(x[0])).clone()


def _constant(call: Call, x: Inputs) -> Outputs:
    attributes = call.attributes
    if "value" in attributes:
        return attributes["value"]
    for name, dtype in (("value_float", call.float_type), ("value_floats", call.float_type)):
        if name in attributes:
            return torch.tensor(attributes[name], dtype=dtype, device=call.device)
    for name in ("value_int", "value_ints"):
        if name in attributes:
            return torch.tensor(attributes[name], dtype=torch.int64, device=call.device)
    raise UnsupportedForm("a string or sparse value")


def _pad(call: Call, x: Inputs) -> Outputs:
    mode = call.get("mode", "constant")
    amounts = integers(x[1])
    axes = integers(x[3]) if optional(x, 3) is not None else list(range(x[0].ndim))
    axes = [axis % x[0].ndim for axis in axes]
    before = dict(zip(axes, amounts[: len(axes)], strict=True))
    after = dict(zip(axes, amounts[len(axes) :], strict=True))
    if mode == "constant":
        value = 0.0 if optional(x, 2) is None else x[2].item()
        flat = [
            n
            for axis in reversed(range(x[0].ndim))
            for n in (before.get(axis, 0), after.get(axis, 0))
        ]
        return functional.pad(x[0], flat, value=value)
    result = x[0]
    for axis in axes:
        result = _pad_by_index(result, axis, before[axis], after[axis], mode)
    return result


def _pad_by_index(tensor: Any, axis: int, before: int, after: int, mode: str) -> Any:
    """Pad one axis by repeating elements of the tensor itself."""
    if not before and not after:
        return tensor
    size = tensor.shape[axis]
    index = torch.arange(-before, size + after, device=tensor.device)
    if mode == "edge":
        index = index.clamp(0, size - 1)
    elif mode == "wrap":
        index = index % size
    elif mode == "reflect":
        period = max(2 * (size - 1), 1)
        index = index % period
        index = torch.where(index >= size, period - index, index)
    else:
        raise UnsupportedForm(f"mode={mode}")
    return tensor.index_select(axis, index)


def _trilu(call: Call, x: Inputs) -> Outputs:
    diagonal = 0 if optional(x, 1) is None else int(x[1].item())
    return torch.triu(x[0], diagonal) if call.get("upper", 1) else torch.tril(x[0], diagonal)


def _cumsum(call: Call, x: Inputs) -> Outputs:
    axis = int(x[1].item())
    source = x[0].flip(axis) if call.get("reverse", 0) else x[0]
    total = torch.cumsum(source, axis, dtype=x[0].dtype)
    if call.get("exclusive", 0):
        total = total - source
    return total.flip(axis) if call.get("reverse", 0) else total


# --- reductions
# ----------------------------------------------------------------------------------------------


def _reduce(function: Callable[[Any, tuple[int, ...], bool], Any]) -> Operator:
    def operator(call: Call, x: Inputs) -> Outputs:
        given = optional(x, 1)
        axes = call.get("axes", None) if given is None else integers(given)
        if not axes:
            if call.get("noop_with_empty_axes", 0):
                return x[0]
            axes = range(x[0].ndim)
        return function(x[0], tuple(axes), bool(call.get("keepdims", 1)))

    return operator


def _sum(x: Any, axes: tuple[int, ...], keep: bool) -> Any:
    return torch.sum(x, axes, keepdim=keep, dtype=x.dtype)


def _prod(x: Any, axes: tuple[int, ...], keep: bool) -> Any:
    for axis in sorted((a % x.ndim for a in axes), reverse=True):
        x = torch.prod(x, axis, keepdim=keep, dtype=x.dtype)
    return x


def _softmax(function: Callable[..., Any]) -> Operator:
    return lambda call, x: function(x[0], dim=call.get("axis", -1))


def _linear_map(call: Call, x: Inputs) -> Outputs:
    a = x[0].transpose(0, 1) if call.get("transA", 0) else x[0]
    b = x[1].transpose(0, 1) if call.get("transB", 0) else x[1]
    alpha, beta, bias = call.get("alpha", 1.0), call.get("beta", 1.0), optional(x, 2)
    if bias is None:
        return a @ b if alpha == 1.0 else alpha * (a @ b)
    return torch.addmm(bias, a, b, beta=beta, alpha=alpha)


BASIC: dict[str, Operator] = {
    "Abs": _unary(torch.abs),
    "Add": _binary(torch.add),
    "And": _binary(torch.logical_and),
    "ArgMax": _arg(torch.argmax),
    "ArgMin": _arg(torch.argmin),
    "Cast": lambda call, x: x[0].to(call.dtype(call.attributes["to"])),
    "CastLike": lambda call, x: x[0].to(x[1].dtype),
    "Ceil": _unary(torch.ceil),
    "Clip": _clip,
    "Concat": lambda call, x: torch.cat(list(x), call.attributes["axis"]),
    "Constant": _constant,
    "ConstantOfShape": _constant_of_shape,
    "Cos": _unary(torch.cos),
    "CumSum": _cumsum,
    "Div": _div,
    "Dropout": _unary(lambda x: x),
    "Einsum": lambda call, x: torch.einsum(call.attributes["equation"].replace(" ", ""), *x),
    "Elu": lambda call, x: functional.elu(x[0], call.get("alpha", 1.0)),
    "Equal": _binary(torch.eq),
    "Erf": _unary(torch.erf),
    "Exp": _unary(torch.exp),
    "Expand": _expand,
    "Flatten": _flatten,
    "Floor": _unary(torch.floor),
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "Gelu": lambda call, x: functional.gelu(x[0], approximate=call.get("approximate", "none")),
    "Gemm": _linear_map,
    "Greater": _binary(torch.gt),
    "GreaterOrEqual": _binary(torch.ge),
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": _unary(functional.hardswish),
    "Identity": _unary(lambda x: x),
    "IsNaN": _unary(torch.isnan),
    "LeakyRelu": lambda call, x: functional.leaky_relu(x[0], call.get("alpha", 0.01)),
    "Less": _binary(torch.lt),
    "LessOrEqual": _binary(torch.le),
    "Log": _unary(torch.log),
    "LogSoftmax": _softmax(torch.log_softmax),
    "MatMul": _binary(torch.matmul),
    "Max": _variadic(torch.maximum),
    "Mean": lambda call, x: reduce(torch.add, x) / len(x),
    "Min": _variadic(torch.minimum),
    "Mish": _unary(functional.mish),
    "Mod": _mod,
    "Mul": _binary(torch.mul),
    "Neg": _unary(torch.neg),
    "Not": _unary(torch.logical_not),
    "OneHot": _one_hot,
    "Or": _binary(torch.logical_or),
    "PRelu": lambda call, x: torch.where(x[0] < 0, x[0] * x[1], x[0]),
    "Pad": _pad,
    "Pow": lambda call, x: torch.pow(x[0], x[1]).to(x[0].dtype),
    "Range": lambda call, x: torch.arange(
        x[0].item(), x[1].item(), x[2].item(), dtype=x[0].dtype, device=call.device
    ),
    "Reciprocal": _unary(torch.reciprocal),
    "ReduceL1": _reduce(lambda x, axes, keep: _sum(x.abs(), axes, keep)),
    "ReduceL2": _reduce(lambda x, axes, keep: torch.linalg.vector_norm(x, dim=axes, keepdim=keep)),
    "ReduceLogSumExp": _reduce(torch.logsumexp),
    "ReduceMax": _reduce(torch.amax),
    "ReduceMean": _reduce(torch.mean),
    "ReduceMin": _reduce(torch.amin),
    "ReduceProd": _reduce(_prod),
    "ReduceSum": _reduce(_sum),
    "ReduceSumSquare": _reduce(lambda x, axes, keep: _sum(x * x, axes, keep)),
    "Relu": _unary(torch.relu),
    "Reshape": _reshape,
    "Round": _unary(torch.round),
    "ScatterElements": _scatter_elements,
    "ScatterND": _scatter_nd,
    "Selu": _selu,
    "Shape": _shape,
    "Sigmoid": _unary(torch.sigmoid),
    "Sign": _unary(torch.sign),
    "Sin": _unary(torch.sin),
    "Size": lambda call, x: torch.tensor(x[0].numel(), dtype=torch.int64),
    "Slice": _slice,
    "Softmax": _softmax(torch.softmax),
    "Softplus": _unary(lambda x: functional.softplus(x, threshold=80.0)),
    "Softsign": _unary(functional.softsign),
    "Split": _split,
    "Sqrt": _unary(torch.sqrt),
    "Squeeze": _squeeze,
    "Sub": _binary(torch.sub),
    "Sum": _variadic(torch.add),
    "Swish": lambda call, x: x[0] * torch.sigmoid(call.get("alpha", 1.0) * x[0]),
    "Tanh": _unary(torch.tanh),
    "Tile": lambda call, x: x[0].repeat(integers(x[1])),
    "TopK": _top_k,
    "Transpose": lambda call, x: x[0].permute(call.get("perm", tuple(reversed(range(x[0].ndim))))),
    "Trilu": _trilu,
    "Unsqueeze": _unsqueeze,
    "Where": lambda call, x: torch.where(x[0], x[1], x[2]),
    "Xor": _binary(torch.logical_xor),
}
