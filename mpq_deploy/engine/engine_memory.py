"""The memory that an engine will take on its device, estimated from the graph.

In: the deployment graph, its inputs' shapes at the largest batch, the bytes of its constants. Out:
a ``MemoryEstimate``. The builder fuses operators (less) and keeps copies (more): TensorRT-RTX 1.7's
own figure of activations was 0.35 to 2 times it on six models (docs/devices.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import onnx
import onnx_ir as ir

from mpq_deploy.device.generate.residency import RUNTIME_BYTES
from mpq_deploy.engine.target import Target
from mpq_deploy.errors import UsageError
from mpq_deploy.graph.attention import plain_attention
from mpq_deploy.graph.shapes import inferred_graph

# Activations: what TensorRT-RTX 1.7 takes for the smallest graph, and for each byte that lives at
# once (read off its builds of the bundled models: 8.7 MB for 0.36 MB alive, 28.6 MB for 6.8 MB).
WORKSPACE_BYTES, COPIES = 8_400_000, 3
# On the host, the child process that builds: the library with its compiler, per node of the graph,
# and copies of the weights (fitted to peaks).
BUILDER_BYTES, BUILDER_NODE_BYTES, BUILDER_COPIES = 220 << 20, 265_000, 3
# Channels of a head whose attention is one kernel.
FUSED_HEADS = (32, 128)
WEIGHT_FORMS = (
    *("DequantizeLinear", "QuantizeLinear", "Reshape", "Transpose", "Cast", "Identity"),
    *("Concat", "Gather"),
)


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes: constants as stored, activations alive at once, the largest unpacked weight, runtime."""

    weights_bytes: int
    activation_bytes: int
    unpacked_bytes: int
    runtime_bytes: int = RUNTIME_BYTES

    @property
    def total_bytes(self) -> int:
        """What the device must have free."""
        return self.weights_bytes + self.activation_bytes + self.unpacked_bytes + self.runtime_bytes


def estimate_memory(
    model: Path, shapes: Mapping[str, tuple[int, ...]], weights_bytes: int
) -> MemoryEstimate:
    """Estimate for ``model`` at inputs of ``shapes``; tensors live until their last reader.

    Tensors whose shape cannot be inferred count nothing, so the estimate is then too low.
    """
    proto = onnx.load(model, load_external_data=False)
    graph = inferred_graph(proto, shapes)
    sizes = {
        value.name: _bytes(value) for value in (*graph.input, *graph.value_info, *graph.output)
    }
    constant = {tensor.name for tensor in graph.initializer}
    unpacked = 0
    for node in graph.node:
        if node.op_type in WEIGHT_FORMS and all(
            name in constant or not name for name in node.input
        ):
            constant.update(node.output)
            unpacked = max(unpacked, *(sizes.get(name, 0) for name in node.output))
    nowhere = constant | _scores(proto, graph)
    activations = WORKSPACE_BYTES + COPIES * peak_alive(graph, sizes, nowhere)
    return MemoryEstimate(weights_bytes, activations, unpacked)


def refuse_too_large(estimate: MemoryEstimate, target: Target, batch: int) -> None:
    """Raise UsageError when the estimate is more than the target's memory, where that is known."""
    if target.memory_bytes is None or estimate.total_bytes <= target.memory_bytes.value:
        return
    whose = f" ({target.figures_of})" if target.figures_of else ""
    raise UsageError(
        f"The engine is estimated to take {_gb(estimate.total_bytes)} at batch {batch} (constants "
        f"{_gb(estimate.weights_bytes)}, activations {_gb(estimate.activation_bytes)}, runtime "
        f"{_gb(estimate.runtime_bytes)}), but {target.name} has {_gb(target.memory_bytes.value)}{whose}.",
        "Lower the budget or engine.batch_max; for a device with more memory give its memory_bytes in a YAML.",
    )


def peak_alive(graph: onnx.GraphProto, sizes: Mapping[str, int], constant: set[str]) -> int:
    """The maximum over nodes, in graph order, of the bytes of activations alive there."""
    last = {name: index for index, node in enumerate(graph.node) for name in node.input}
    last.update({value.name: len(graph.node) for value in graph.output})
    live = {value.name: sizes.get(value.name, 0) for value in graph.input}
    nowhere = constant | _pieces(graph)
    peak = 0
    for index, node in enumerate(graph.node):
        live.update(
            {name: sizes.get(name, 0) for name in node.output if name and name not in nowhere}
        )
        peak = max(peak, sum(live.values()))
        for name in {*node.input, *node.output}:
            if last.get(name, index) <= index:
                live.pop(name, None)
    return peak


def _scores(proto: onnx.ModelProto, graph: onnx.GraphProto) -> set[str]:
    """Scores and probabilities of attentions that one kernel computes, which never holds them all (engine-forms.md)."""
    channels = {
        value.name: value.type.tensor_type.shape.dim[-1].dim_value
        for value in (*graph.input, *graph.value_info)
        if value.type.tensor_type.shape.dim
    }
    least, most = FUSED_HEADS
    found = [plain_attention(node) for node in ir.from_proto(proto).graph]
    return {
        value.name or ""
        for one in found
        if one is not None and least <= channels.get(one.queries.name or "", 0) <= most
        for node in one.dropped
        for value in node.outputs
    }


def _pieces(graph: onnx.GraphProto) -> set[str]:
    """Slices that Concats alone read: one kernel writes them where they are joined (engine-forms.md)."""
    cut = {name for node in graph.node if node.op_type == "Slice" for name in node.output}
    for node in graph.node:
        if node.op_type != "Concat":
            cut.difference_update(node.input)
    return cut - {value.name for value in graph.output}


def _bytes(value: onnx.ValueInfoProto) -> int:
    tensor = value.type.tensor_type
    if not all(dim.HasField("dim_value") for dim in tensor.shape.dim) or not tensor.elem_type:
        return 0
    elements = prod(dim.dim_value for dim in tensor.shape.dim)
    # Half a byte for INT4 is rounded up: such tensors are small.
    return int(elements * max(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).itemsize, 1))


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB"
