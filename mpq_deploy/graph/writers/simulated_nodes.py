"""Write simulated schemes as Q/DQ for ONNX Runtime, and count their nominal bytes from the file that was written.

- Weights: UINT8 codes and zero points -> DequantizeLinear per output channel; each binary residual is a tensor of signs
  behind a DequantizeLinear of its own, and Add joins them.
- Activations: Clip to the range of so many bits, then a UINT8 QuantizeLinear/DequantizeLinear pair.

What each channel's codes may be is recorded in the model's metadata; ``nominal_bytes`` believes nothing of it that the
codes in the file do not show.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from mpq_deploy.calibrate.scales import ActivationGrid
from mpq_deploy.errors import MpqError
from mpq_deploy.formats.scheme import SCHEMES, Scheme
from mpq_deploy.formats.simulated import SimulatedMatrix
from mpq_deploy.formats.sizes import FP16_BYTES, weight_bytes
from mpq_deploy.graph.layers import Layer
from mpq_deploy.graph.save import constant_bytes
from mpq_deploy.models.spec import Array

# Of the model, as JSON: layer -> scheme, and of each output channel the bits of its grid and its residuals; and the
# activations' quantizers, by name, with their bits.
WEIGHTS_KEY, ACTIVATIONS_KEY = "mpq_deploy.simulated_weights", "mpq_deploy.simulated_activations"


class SimulatedWriter:
    """Writes the constants and nodes of one simulated weight; tensors are shared by all its uses."""

    def __init__(self, model: ir.Model, layer: Layer, scheme: Scheme, matrix: SimulatedMatrix) -> None:
        self.model, self.layer = model, layer
        grids = matrix.grids
        codes = (matrix.codes.astype(np.int16) - grids.low[:, None]).astype(np.uint8)
        self.codes = ir.Tensor(self._folded(codes))
        self.zero_point = ir.Tensor((-grids.low).astype(np.uint8))
        self.scale = ir.Tensor(grids.scale.astype(np.float32))
        self.residuals = [
            (ir.Tensor(self._folded(signs)), ir.Tensor(sizes.astype(np.float32)))
            for signs, sizes in zip(matrix.signs, grids.residual)
            if sizes.any()
        ]
        channels = {"grid_bits": matrix.grid_bits.tolist(), "orders": matrix.orders.tolist()}
        _record(model, WEIGHTS_KEY, layer.name, {"scheme": scheme.name, **channels})

    def _folded(self, matrix: Array) -> Array:
        return np.ascontiguousarray((matrix if self.layer.out_axis == 0 else matrix.T).reshape(self.layer.weight_shape))

    def write(self, node: ir.Node, number: int) -> ir.Value:
        """Insert the nodes in front of ``node``; return the dequantized weight."""
        suffix = f"//use{number}" if number else ""
        name = f"{self.layer.name}/weight_dequantize"
        weight = self._dequantize(node, ("codes", "scale", "zero_point"), suffix, name)
        for order in range(len(self.residuals)):
            more = self._dequantize(node, (f"signs{order}", f"residual{order}"), suffix, f"{name}{order}")
            weight = _inserted(node, "Add", [weight, more], {}, f"{name}{order}_add{suffix}")
        return weight

    def _dequantize(self, node: ir.Node, parts: tuple[str, ...], suffix: str, name: str) -> ir.Value:
        inputs = [_constant(self.model, f"{self.layer.weight}//{part}{suffix}", self._tensor(part)) for part in parts]
        return _inserted(node, "DequantizeLinear", inputs, {"axis": self.layer.out_axis}, f"{name}{suffix}")

    def _tensor(self, part: str) -> ir.Tensor[Any]:
        for order, (signs, sizes) in enumerate(self.residuals):
            found = {f"signs{order}": signs, f"residual{order}": sizes}.get(part)
            if found is not None:
                return found
        return {"codes": self.codes, "scale": self.scale, "zero_point": self.zero_point}[part]


def write_activation(model: ir.Model, value: ir.Value, grid: ActivationGrid, form: str) -> list[ir.Node]:
    """Return the nodes, not yet inserted, that round ``value`` to ``grid``; the last gives the rounded value."""
    base = f"{value.name}//sim{form}"
    scale = _constant(model, f"{base}/scale", ir.Tensor(np.asarray(grid.scale, np.float32)))
    zero_point = _constant(model, f"{base}/zero_point", ir.Tensor(np.asarray(-grid.quant_min, np.uint8)))
    bits = int(np.log2(grid.quant_max - grid.quant_min + 1))
    _record(model, ACTIVATIONS_KEY, base, bits)
    nodes = []
    clipped = value
    if bits < 8:
        limits = (np.asarray(code * grid.scale, np.float32) for code in (grid.quant_min, grid.quant_max))
        bounds = [_constant(model, f"{base}/{end}", ir.Tensor(limit)) for end, limit in zip(("low", "high"), limits)]
        nodes.append(ir.node("Clip", [value, *bounds], name=f"{base}/clip", num_outputs=1))
        clipped = nodes[-1].outputs[0]
    nodes.append(ir.node("QuantizeLinear", [clipped, scale, zero_point], name=f"{base}/quantize", num_outputs=1))
    inputs = [nodes[-1].outputs[0], scale, zero_point]
    nodes.append(ir.node("DequantizeLinear", inputs, name=f"{base}/dequantize", num_outputs=1))
    for node in nodes:
        node.outputs[0].name = f"{node.name}_output"
        node.outputs[0].shape = value.shape
        dtype = ir.DataType.UINT8 if node.op_type == "QuantizeLinear" else ir.DataType.FLOAT
        node.outputs[0].type = ir.TensorType(dtype)
    return nodes


def nominal_bytes(path: Path, layers: Iterable[Layer]) -> int:
    """Return the bytes of the graph in ``path``: of all constants as stored, but nominal ones for what is simulated.

    Raises MpqError when codes leave the range of their bits, or weights and bits do not make up what the scheme says.
    """
    model = ir.load(path)
    weights: dict[str, Any] = json.loads(model.metadata_props.get(WEIGHTS_KEY, "{}"))
    activations: dict[str, int] = json.loads(model.metadata_props.get(ACTIVATIONS_KEY, "{}"))
    total = 0
    skipped = {name for name in model.graph.initializers if name.rpartition("/")[0] in activations}
    for layer in layers:
        if layer.name in weights:
            _check_channels(model, layer, weights[layer.name])
            total += weight_bytes(layer, SCHEMES[weights[layer.name]["scheme"]])
            skipped |= {name for name in model.graph.initializers if name.startswith(f"{layer.weight}//")}
    # Their zero points are counted with the layers that read them.
    return total + FP16_BYTES * len(activations) + constant_bytes(path, skipped)


def _check_channels(model: ir.Model, layer: Layer, recorded: dict[str, Any]) -> None:
    scheme = SCHEMES[recorded["scheme"]]
    grid_bits, orders = np.array(recorded["grid_bits"]), np.array(recorded["orders"])
    codes = _rows(model, layer, "codes").astype(np.int64)
    if (codes.max(axis=1) >= 2**grid_bits).any():
        worst = int(np.argmax(codes.max(axis=1) - 2**grid_bits))
        raise _defect(layer, f"code {codes[worst].max()} in a channel of {grid_bits[worst]} bits")
    there = np.zeros_like(orders)
    for order in range(int(orders.max(initial=0))):
        signs, sizes = _rows(model, layer, f"signs{order}"), _array(model, layer, f"residual{order}") > 0
        if (np.abs(signs).min(axis=1) != sizes).any() or (np.abs(signs).max(axis=1) != sizes).any():
            raise _defect(layer, f"signs of residual {order} that are not -1 and 1")
        there += sizes
    bits = int((grid_bits + orders).sum()) * layer.reduction
    if (there != orders).any() or bits != scheme.bits[0] * layer.weights:
        raise _defect(layer, f"{bits} bits in {layer.weights} weights of {scheme.bits[0]}")
    # Channels of one bit keep its size in place of a scale.
    room = layer.out_channels if scheme.branch and scheme.branch.kind == "zres" else 0
    if int((orders - (grid_bits == 0)).sum()) > room:
        raise _defect(layer, f"more residuals than the {room} that there is room for")


def _defect(layer: Layer, found: str) -> MpqError:
    return MpqError(
        f"The simulated weight of {layer.name} holds {found}.",
        "This is a defect: please report it with the model's structure.",
    )


def _array(model: ir.Model, layer: Layer, part: str) -> Array:
    tensor = model.graph.initializers[f"{layer.weight}//{part}"].const_value
    assert tensor is not None
    return tensor.numpy()


def _rows(model: ir.Model, layer: Layer, part: str) -> Array:
    array = _array(model, layer, part)
    return array.reshape(layer.out_channels, -1) if layer.out_axis == 0 else array.T


def _record(model: ir.Model, key: str, name: str, value: Any) -> None:
    known = json.loads(model.metadata_props.get(key, "{}"))
    model.metadata_props[key] = json.dumps({**known, name: value}, sort_keys=True)


def _constant(model: ir.Model, name: str, tensor: ir.Tensor[Any]) -> ir.Value:
    found = model.graph.initializers.get(name)
    if found is not None:
        return found
    value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    model.graph.register_initializer(value)
    return value


def _inserted(before: ir.Node, op: str, inputs: list[ir.Value], attributes: dict[str, int], name: str) -> ir.Value:
    node = ir.node(op, inputs, attributes, name=name, num_outputs=1)
    output = node.outputs[0]
    output.name, output.type = f"{name}_output", ir.TensorType(ir.DataType.FLOAT)
    assert before.graph is not None
    before.graph.insert_before(before, node)
    return output
