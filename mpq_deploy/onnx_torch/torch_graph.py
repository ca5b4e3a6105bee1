"""Evaluate the deployed ONNX graph in torch, with autograd."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from mpq_deploy.errors import ModelError
from mpq_deploy.graph.layers import STANDARD_DOMAINS
from mpq_deploy.onnx_torch.basic_operators import DOUBLE, FLOATS, Call, Operator, UnsupportedForm
from mpq_deploy.onnx_torch.host_values import SIZES, host_inputs, host_nodes
from mpq_deploy.onnx_torch.merged_nodes import merged_nodes
from mpq_deploy.onnx_torch.operators import OPERATORS
from mpq_deploy.system.compute import computing_on, out_of_memory

Tensor = torch.Tensor
Rewire = Callable[[list[Any]], list[Any]]
# What torch's allocator says, in an error of no type of its own on the CPU.
OUT_OF_MEMORY = "allocate memory"
CPU = torch.device("cpu")


class UnsupportedOperator(ModelError):  # noqa: N818 - what callers name it
    """An operator, or a form of it, is outside the table. ``op`` and ``node`` name it."""

    def __init__(self, op: str, node: str, form: str = "") -> None:
        what = f" with {form}" if form else ""
        super().__init__(
            f"The torch evaluator has no operator {op}{what} (node '{node}').",
            "Measure with the gain metric, which runs the graph in ONNX Runtime; it cannot be trained (recover).",
        )
        self.op = op
        self.node = node


class FailedOperator(UnsupportedOperator):
    """An operator of the table failed in torch, on a node that ONNX Runtime may well run."""

    def __init__(self, op: str, node: str, said: str) -> None:
        super().__init__(op, node)
        self.message = f"The node '{node}' ({op}) failed in torch: {said}."


@dataclass(frozen=True)
class _Step:
    """One node: its function, inputs and outputs, and the values that nothing later needs.

    ``devices``: where each input is read; None where only its sizes are.
    """

    node: str
    op: str
    function: Operator
    call: Call
    inputs: tuple[str | None, ...]
    outputs: tuple[str, ...]
    last_uses: tuple[str, ...]
    devices: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Footprint:
    """Bytes that each node makes, views of its inputs left out, that are alive after it, and of its outputs."""

    made: tuple[int, ...]
    alive: tuple[int, ...]
    outputs: tuple[Mapping[str, int], ...]

    def parts(self, taken: Sequence[int], most: int) -> tuple[slice, ...]:
        """Cut the nodes, which take ``taken`` bytes, into parts of at most ``most`` each, or of one node.

        Cuts lie at the minimum of live bytes, in the later half of what fits.
        """
        parts, start, total = [], 0, 0
        for number, size in enumerate(taken):
            total += size
            while total > most and number > start:
                last = min(range((start + number) // 2, number), key=lambda i: self.alive[i])
                parts.append(slice(start, last + 1))
                start = last + 1
                total = sum(taken[start : number + 1])
        return (*parts, slice(start, len(taken)))


def _storages(values: Mapping[str, Any]) -> dict[int, int]:
    """Return the bytes of each piece of memory that holds some of ``values``, by its place."""
    pieces = (value.untyped_storage() for value in values.values())
    return {piece.data_ptr(): piece.nbytes() for piece in pieces}


class TorchGraph:
    """An ONNX model (opset 13 or later) as a function in torch.

    All floats but DOUBLE are evaluated in ``float_type``, on torch's device where this process
    computes; sizes and indices in the making stay on the CPU (see ``host_values``). ``constants``
    are on the CPU, where those of that type share memory with the model's file; on a GPU each has a
    copy from its first use on. ``apart``: nodes that are evaluated without being merged with those
    before them, so that all values in between are there. Raises UnsupportedOperator for a node outside the table.
    """

    def __init__(
        self,
        model: ir.Model,
        float_type: torch.dtype = torch.float32,
        apart: Collection[str] = (),
    ) -> None:
        graph = model.graph
        opset = model.opset_imports.get("", model.opset_imports.get("ai.onnx", 13))
        self.float_type, self.device = float_type, computing_on().torch_device()
        self.inputs = tuple(v.name or "" for v in graph.inputs if not v.is_initializer())
        self.outputs = tuple(v.name or "" for v in graph.outputs)
        self.constants: dict[str, Any] = {
            name: torch_from_constant(value.const_value, float_type)
            for name, value in graph.initializers.items()
            if value.const_value is not None and any(True for _ in value.uses())
        }
        self._copies: dict[str, Any] = {}
        steps = _steps(graph, opset, float_type, apart)
        on_host, self.read_on_host = host_nodes(steps, self.inputs)
        self._steps = tuple(
            _placed(step, CPU if number in on_host else self.device)
            for number, step in enumerate(steps)
        )

    def feed(self, arrays: Mapping[str, Any]) -> dict[str, Any]:
        """Turn NumPy inputs into tensors of ``float_type`` on the graph's device.

        Raises ModelError for a missing one.
        """
        missing = [name for name in self.inputs if name not in arrays]
        if missing:
            raise ModelError(
                f"The graph's input '{missing[0]}' was given no value.",
                f"Given were: {', '.join(arrays)}. Check the denoiser's specification.",
            )
        return {
            name: _converted(arrays[name], self.float_type).to(self.device, non_blocking=True)
            for name in self.inputs
        }

    def run(
        self,
        feeds: Mapping[str, Any],
        keep: Collection[str] = (),
        differentiate: Collection[str] = (),
        rewire: Mapping[str, Rewire] | None = None,
        known: Mapping[str, Any] | None = None,
        segments: int = 1,
    ) -> dict[str, Any]:
        """Evaluate and return the graph's outputs and the values named in ``keep``, by name.

        A value is dropped after its last use. Values in ``differentiate`` require a gradient from
        there on. ``rewire`` replaces the inputs of single nodes, by the node's name. ``known``
        holds values that need not be computed again; nodes whose outputs are all known are not run.
        With ``segments`` above 1 the backward pass computes each stretch of nodes again from what
        it began with, instead of holding every value (gradient checkpointing).
        """
        rewire = rewire or {}
        known = known or {}
        needed = {*keep, *self.outputs, *feeds}
        values: dict[str, Any] = {**feeds, **known}
        length = max(1, -(-len(self._steps) // segments))
        for start in range(0, len(self._steps), length):
            part = partial(
                self._run_steps, slice(start, start + length), needed, differentiate, rewire, known
            )
            values = checkpoint(part, values, use_reentrant=False) if segments > 1 else part(values)
        return {name: self._value(values, name) for name in dict.fromkeys((*self.outputs, *keep))}

    def run_part(
        self,
        part: slice,
        values: Mapping[str, Any],
        keep: Collection[str] = (),
        differentiate: Collection[str] = (),
        rewire: Mapping[str, Rewire] | None = None,
    ) -> dict[str, Any]:
        """Evaluate the nodes ``part`` on the ``values`` that those before them left.

        Returns what those after them need, the outputs and the values named in ``keep``, by name.
        """
        return self._run_steps(
            part, {*keep, *self.outputs}, differentiate, rewire or {}, {}, values
        )

    def made_by(self, part: slice) -> set[str]:
        """Return the names of the values that the nodes ``part`` compute."""
        return {name for step in self._steps[part] for name in step.outputs}

    def footprint(
        self, feeds: Mapping[str, Any], see: Callable[[str, Any], None]
    ) -> tuple[Footprint, dict[str, Any]]:
        """Evaluate node by node, holding no more than is needed, and show each value to ``see``.

        Returns what each node takes, and the graph's outputs.
        """
        values, made, alive, outputs = dict(feeds), [], [], []
        for number, step in enumerate(self._steps):
            before = _storages(values)
            values = self.run_part(slice(number, number + 1), values, step.outputs)
            for name in step.outputs:
                see(name, values[name])
            outputs.append({name: values[name].nbytes for name in step.outputs})
            made.append(
                sum(size for place, size in _storages(values).items() if place not in before)
            )
            for name in step.outputs:
                if name in step.last_uses and name not in self.outputs:
                    del values[name]
            alive.append(sum(_storages(values).values()))
        return Footprint(tuple(made), tuple(alive), tuple(outputs)), values

    def apply(self, node: str, inputs: list[Any]) -> Any:
        """Return the first output of one node, by its name, for other inputs."""
        return _evaluate(next(step for step in self._steps if step.node == node), inputs)[0]

    def _run_steps(
        self,
        steps: slice,
        kept: Collection[str],
        differentiate: Collection[str],
        rewire: Mapping[str, Rewire],
        known: Mapping[str, Any],
        before: Mapping[str, Any],
    ) -> dict[str, Any]:
        values = dict(before)
        for step in self._steps[steps]:
            if known and all(name in known for name in step.outputs):
                continue
            inputs = [
                self._value(values, name, device)
                for name, device in zip(step.inputs, step.devices, strict=True)
            ]
            if step.node in rewire:
                inputs = rewire[step.node](inputs)
            for name, value in zip(step.outputs, _evaluate(step, inputs)):
                if name in differentiate and not value.requires_grad:
                    value.requires_grad_(True)
                values[name] = value
            for name in step.last_uses:
                if name not in kept:
                    values.pop(name, None)
        return values

    def affected_by(self, nodes: Iterable[str]) -> set[str]:
        """Return the names of all values that depend on the outputs of ``nodes``."""
        changed = set(nodes)
        dirty: set[str] = set()
        for step in self._steps:
            if step.node in changed or any(name in dirty for name in step.inputs):
                dirty.update(step.outputs)
        return dirty

    @property
    def values(self) -> tuple[str, ...]:
        """The names of all values that nodes compute, in order."""
        return tuple(name for step in self._steps for name in step.outputs)

    def _value(self, values: Mapping[str, Any], name: str | None, device: Any = None) -> Any:
        """Return a value or constant, on ``device`` where one is given."""
        if name is None:
            return None
        value = values[name] if name in values else self.constants[name]
        if device is None or value.device == device:
            return value
        if name in values:
            return value.to(device, non_blocking=device != CPU)
        if name not in self._copies:
            self._copies[name] = value.to(device)
        return self._copies[name]


def torch_from_constant(tensor: Any, float_type: torch.dtype) -> Any:
    """Return an ``onnx_ir`` tensor or NumPy array as a torch tensor, without a copy if possible."""
    array = tensor if isinstance(tensor, np.ndarray) else tensor.numpy()
    return _converted(array, float_type)


def _converted(array: Any, float_type: torch.dtype) -> Any:
    if isinstance(array, torch.Tensor):
        return array
    array = np.asarray(array)
    if array.dtype.name == "bfloat16":  # an ml_dtypes type that torch cannot read from NumPy
        array = array.astype(np.float32)
    with warnings.catch_warnings():
        # A memory-mapped file is read-only; nothing here writes to it.
        warnings.filterwarnings("ignore", message=".*not writable.*")
        tensor = (
            torch.from_numpy(array) if array.flags.c_contiguous else torch.from_numpy(array.copy())
        )
    return tensor.to(float_type) if tensor.dtype in (torch.float32, torch.float16) else tensor


def _steps(
    graph: ir.Graph, opset: int, float_type: torch.dtype, apart: Collection[str]
) -> tuple[_Step, ...]:
    merged = merged_nodes(node for node in graph if node.name not in apart)
    dropped = {id(node) for operation in merged.values() for node in operation.dropped}
    nodes = [node for node in graph if id(node) not in dropped]
    last: dict[str, int] = {}
    for number, node in enumerate(nodes):
        read = merged[id(node)].inputs if id(node) in merged else node.inputs
        for value in (*read, *node.outputs):
            if value is not None and value.name:
                last[value.name] = number
    ends: dict[int, list[str]] = {}
    for name, number in last.items():
        ends.setdefault(number, []).append(name)
    steps = [
        _step(node, n, opset, float_type, tuple(ends.get(n, ()))) for n, node in enumerate(nodes)
    ]
    for number, node in enumerate(nodes):
        if id(node) in merged:
            operation = merged[id(node)]
            inputs = tuple(value.name for value in operation.inputs)
            steps[number] = replace(steps[number], function=MERGED[operation.kind], inputs=inputs)
    return tuple(steps)


def _silu(call: Call, x: Sequence[Any]) -> Any:
    # About half of the time of its two nodes, and in half precision rounded once.
    return functional.silu(x[0])


def _attend(call: Call, x: Sequence[Any]) -> Any:
    queries, keys, values = x
    # The kernel that holds no scores [..., queries, keys], which grow with the fourth power of an
    # image's side, is for [batch, heads, tokens, channels].
    lead = queries.shape[:-2]
    if len(lead) > 2 or keys.shape[:-2] != lead or values.shape[:-2] != lead:
        return torch.matmul(torch.softmax(torch.matmul(queries, keys), -1), values)
    four = [
        part.reshape(*(1,) * (2 - len(lead)), *part.shape)
        for part in (queries, keys.transpose(-2, -1), values)
    ]
    attended = functional.scaled_dot_product_attention(four[0], four[1], four[2], scale=1.0)
    return attended.reshape(*lead, *attended.shape[-2:])


# What stands for the last of the nodes that ``merged_nodes`` finds.
MERGED: dict[str, Operator] = {"silu": _silu, "attention": _attend}


def _placed(step: _Step, device: Any) -> _Step:
    """Return ``step`` evaluated on ``device``, the tensors among its attributes included."""
    attributes = {
        key: value.to(device) if isinstance(value, torch.Tensor) else value
        for key, value in step.call.attributes.items()
    }
    numbers = host_inputs(step.op)
    devices = tuple(
        None if step.op in SIZES else CPU if place in numbers else device
        for place in range(len(step.inputs))
    )
    return replace(
        step, call=replace(step.call, attributes=attributes, device=device), devices=devices
    )


def _step(
    node: ir.Node, number: int, opset: int, float_type: torch.dtype, last_uses: tuple[str, ...]
) -> _Step:
    name = node.name or f"{node.op_type}#{number}"
    standard = node.domain in STANDARD_DOMAINS
    if not standard or node.op_type not in OPERATORS:
        raise UnsupportedOperator(
            node.op_type if standard else f"{node.domain}::{node.op_type}", name
        )
    attributes = {}
    for key, attribute in node.attributes.items():
        if attribute.type == ir.AttributeType.TENSOR:
            attributes[key] = torch_from_constant(attribute.value, float_type)
        else:
            attributes[key] = attribute.value
    names = tuple(None if v is None else v.name for v in node.inputs)
    outputs = tuple(v.name or "" for v in node.outputs)
    # Optional outputs that nothing reads have no name or no use; only the last one needed counts.
    used = max((i + 1 for i, v in enumerate(node.outputs) if v.name and _is_read(v)), default=1)
    split = len(outputs) if node.op_type == "Split" else used
    call = Call(attributes, opset, split, float_type)
    return _Step(
        name, node.op_type, OPERATORS[node.op_type], call, names, outputs[:split], last_uses
    )


def _is_read(value: ir.Value) -> bool:
    return value.is_graph_output() or any(True for _ in value.uses())


def _evaluate(step: _Step, inputs: list[Any]) -> tuple[Any, ...]:
    try:
        result = step.function(step.call, inputs)
    except UnsupportedForm as form:
        raise UnsupportedOperator(step.op, step.node, str(form)) from form
    except (RuntimeError, IndexError, TypeError, ValueError, AttributeError) as error:
        if out_of_memory(error):
            raise
        said = " ".join(str(error).split())
        if OUT_OF_MEMORY in said:
            raise ModelError(
                f"The node '{step.node}' ({step.op}) ran out of memory in torch: {said}.",
                "Lower measure.batch_size, close other programs, or measure with the gain metric.",
            ) from error
        raise FailedOperator(step.op, step.node, said) from error
    return result if isinstance(result, tuple) else (result,)


__all__ = [
    "DOUBLE",
    "FLOATS",
    "FailedOperator",
    "Footprint",
    "TorchGraph",
    "UnsupportedOperator",
    "torch_from_constant",
]
