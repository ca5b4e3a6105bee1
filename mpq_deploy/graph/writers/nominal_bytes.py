"""Count the nominal bytes of simulated schemes from the file that was written.

What each channel's codes may be is recorded in the model's metadata; ``nominal_bytes`` believes
nothing of it that the codes in the file do not show.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from mpq_deploy.errors import MpqError
from mpq_deploy.formats.scheme import SCHEMES
from mpq_deploy.formats.simulated import ACTIVATIONS_KEY, WEIGHTS_KEY, residual_room
from mpq_deploy.formats.sizes import FP16_BYTES
from mpq_deploy.graph.layers import Layer
from mpq_deploy.graph.save import constant_bytes
from mpq_deploy.models.spec import Array


def nominal_bytes(path: Path, layers: Iterable[Layer]) -> int:
    """Return the bytes of all constants in ``path``, nominal for what is simulated.

    Raises MpqError when codes leave the range of their bits, or weights and bits do not make up
    what the scheme says.
    """
    model = ir.load(path)
    weights: dict[str, Any] = json.loads(model.metadata_props.get(WEIGHTS_KEY, "{}"))
    activations: dict[str, int] = json.loads(model.metadata_props.get(ACTIVATIONS_KEY, "{}"))
    total = 0
    skipped = {name for name in model.graph.initializers if name.rpartition("/")[0] in activations}
    for layer in layers:
        if layer.name in weights:
            _check_channels(model, layer, weights[layer.name])
            total += SCHEMES[weights[layer.name]["scheme"]].weight_bytes(layer)
            skipped |= {
                name for name in model.graph.initializers if name.startswith(f"{layer.weight}//")
            }
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
        signs, sizes = (
            _rows(model, layer, f"signs{order}"),
            _array(model, layer, f"residual{order}") > 0,
        )
        if (np.abs(signs).min(axis=1) != sizes).any() or (np.abs(signs).max(axis=1) != sizes).any():
            raise _defect(layer, f"signs of residual {order} that are not -1 and 1")
        there += sizes
    bits = int((grid_bits + orders).sum()) * layer.reduction
    if (there != orders).any() or bits != scheme.bits[0] * layer.weights:
        raise _defect(layer, f"{bits} bits in {layer.weights} weights of {scheme.bits[0]}")
    # Channels of one bit keep its size in place of a scale.
    room = residual_room(layer, scheme)
    if int((orders - (grid_bits == 0)).sum()) > room:
        raise _defect(layer, f"more residuals than the {room} that fit")


def _defect(layer: Layer, found: str) -> MpqError:
    return MpqError(
        f"The simulated weight of {layer.name} holds {found}.",
        "This is a bug: please report it with the model's structure.",
    )


def _array(model: ir.Model, layer: Layer, part: str) -> Array:
    tensor = model.graph.initializers[f"{layer.weight}//{part}"].const_value
    assert tensor is not None
    return tensor.numpy()


def _rows(model: ir.Model, layer: Layer, part: str) -> Array:
    array = _array(model, layer, part)
    return array.reshape(layer.out_channels, -1) if layer.out_axis == 0 else array.T
