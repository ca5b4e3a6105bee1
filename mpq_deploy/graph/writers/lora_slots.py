"""Slots for LoRAs: inputs that add a low-rank product beside a layer, nothing where they are zero.

In: an ONNX graph, its layers, a rank R. Out: the graph with two FP16 inputs per slot, in the names
and shapes of peft's files: ``MODULE.lora_A`` [R, in], ``MODULE.lora_B`` [out, R]. They are not one
packed input: TensorRT-RTX copies each piece of such a one by a kernel of its own, while it joins the
first products of layers that read one tensor where factors lie so.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from mpq_deploy.device.lora_inputs import DOWN, UP, WEIGHT_NORMS
from mpq_deploy.errors import UsageError
from mpq_deploy.formats.fp16 import FP16
from mpq_deploy.formats.sizes import FP16_BYTES, input_channels
from mpq_deploy.graph.layers import Layer, LayerGraph
from mpq_deploy.graph.load import load_model
from mpq_deploy.graph.writers.node_writer import LayerWriter
from mpq_deploy.models.spec import Array

# Beside the graphs of a plan, over the same weights.
SLOTTED, SLOTTED_SIMULATED = "model.lora.onnx", "model.lora.fp32.onnx"
# Blocks whose products LoRAs are trained for: of UNets, of transformers, of text encoders.
BLOCK = re.compile(r"(^|\.)(attentions|(single_)?transformer_blocks|blocks|layers)\.\d+\.")


def slotted_layers(graph: LayerGraph) -> tuple[Layer, ...]:
    """Return the layers that get slots: products in blocks that attend, and their 1 x 1 convolutions."""
    nodes = {node.name: node for node in graph.model.graph}
    return tuple(
        layer
        for layer in graph.layers
        if BLOCK.search(layer.name)
        and (layer.op != "Conv" or all(_only_mixes(layer, nodes[u.node]) for u in layer.uses))
    )


def _only_mixes(layer: Layer, node: ir.Node) -> bool:
    """Whether a convolution mixes the channels of each place alone, all with all."""
    moves = (*node.attributes.get_ints("strides", ()), *node.attributes.get_ints("pads", ()))
    return layer.taps == layer.group == 1 and all(step in (0, 1) for step in moves)


def require_slots(graph: LayerGraph) -> tuple[Layer, ...]:
    """Return ``slotted_layers``. Raises UsageError where there are none."""
    layers = slotted_layers(graph)
    if not layers:
        raise UsageError(
            "No layer of this model can have a slot for LoRAs: none is in a block that attends, "
            f"by names such as '{graph.layers[0].name}'.",
            "Give the model as a diffusers folder, or leave out --lora-slots.",
        )
    return layers


def slot_bytes(layers: Iterable[Layer], rank: int) -> int:
    """Bytes of the inputs of all slots: FP16 factors of both sides."""
    return sum(FP16_BYTES * rank * (input_channels(layer) + layer.out_channels) for layer in layers)


def norms_of(graph: LayerGraph, layers: Iterable[Layer]) -> dict[str, float]:
    """Return the Frobenius norm of each layer's weights."""
    initializers, norms = graph.model.graph.initializers, {}
    for layer in layers:
        tensor = initializers[layer.weight].const_value
        assert tensor is not None
        norms[layer.name] = float(np.linalg.norm(tensor.numpy().astype(np.float32).ravel()))
    return norms


def write_slotted(
    source: Path,
    name: str,
    layers: Sequence[Layer],
    rank: int,
    folded: Mapping[str, Array],
    norms: Mapping[str, float] | None = None,
) -> Path:
    """Write the graph at ``source`` with slots as ``name`` beside it, over the same weights.

    ``norms``: ``norms_of`` the layers, where quantized activations have ranges that a LoRA can leave.
    """
    model = load_model(source)
    add_slots(model, layers, rank, folded)
    if norms:
        rounded = {key: float(f"{value:.6g}") for key, value in norms.items()}
        model.metadata_props[WEIGHT_NORMS] = json.dumps(rounded, sort_keys=True)
    path = source.with_name(name)
    path.write_bytes(ir.serde.serialize_model(model).SerializeToString(deterministic=True))
    return path


def add_slots(
    model: ir.Model, layers: Sequence[Layer], rank: int, folded: Mapping[str, Array]
) -> None:
    """Give each of ``layers`` a slot of ``rank``, wherever their inputs and outputs are in ``model``.

    ``folded``: activation -> the factors float16 [C] that its producer multiplies its channels by.
    """
    values = {value.name: value for value in model.graph.inputs}
    values |= {value.name: value for node in model.graph for value in node.outputs}
    for layer in layers:
        shapes = ((DOWN, (rank, input_channels(layer))), (UP, (layer.out_channels, rank)))
        half = ir.TensorType(ir.DataType.FLOAT16)
        slot = [
            ir.Value(name=f"{layer.name}{end}", shape=ir.Shape(shape), type=half)
            for end, shape in shapes
        ]
        model.graph.inputs.extend(slot)
        for use in layer.uses:
            x, y = values[use.input], values[use.output]
            node = y.producer()
            assert node is not None
            writer = _SlotWriter(model, layer, FP16, node, x)
            values[use.output] = writer.join(slot, f"{use.node}/lora", folded.get(use.input))


class _SlotWriter(LayerWriter):
    """Writes the products of a slot; ``node``: what gives the layer's output."""

    def join(self, slot: Sequence[ir.Value], name: str, factors: Array | None) -> ir.Value:
        """Add x A^T B^T to the output; return the sum, which takes its name."""
        y, x, dtype = self.node.outputs[0], self.x, self.x.dtype or ir.DataType.FLOAT16
        nodes: list[ir.Node] = []

        def put(op: str, inputs: Sequence[ir.Value], label: str, **attributes: Any) -> ir.Value:
            kind = (ir.DataType(attributes["to"]) if op == "Cast" else dtype).name
            nodes.append(self.make(op, inputs, attributes, f"{name}/{label}", dtype=kind))
            return nodes[-1].outputs[0]

        down, up = slot
        if dtype != ir.DataType.FLOAT16:
            down, up = (
                put("Cast", [one], f"cast_{end}", to=int(dtype))
                for one, end in ((down, "down"), (up, "up"))
            )
        if factors is not None:
            # The producer's factors, undone where there are the fewest values.
            undone = (1 / factors.astype(np.float32)).astype(dtype.numpy())
            down = put("Mul", [down, self.named_constant(f"{name}/undone", undone)], "undo")
        rank = len(self.layer.kernel)
        if rank:
            x = put("Transpose", [x], "channels_last", perm=[0, *range(2, 2 + rank), 1])
        down, up = (
            put("Transpose", [one], f"turn_{end}", perm=[1, 0])
            for one, end in ((down, "down"), (up, "up"))
        )
        added = put("MatMul", [put("MatMul", [x, down], "down"), up], "up")
        if rank:
            first = [0, 1 + rank, *range(1, 1 + rank)]
            added = put("Transpose", [added], "channels_first", perm=first)
        if y.dtype not in (None, dtype):
            put("Cast", [added], "cast", to=int(y.dtype))
        found = self.add_output(nodes, "lora_add")
        # A branch may have called what it adds to by the usual name.
        y.name = f"{found.name}//whole"
        return found
