"""Choose the channel shifts of INT8 activations (``formats.shifts``), and store who has them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mpq_deploy.calibrate.fp16_range import WIDE_FROM
from mpq_deploy.calibrate.observers import Observation
from mpq_deploy.calibrate.scales import QUANT_MAX, activation_scale, round_scale
from mpq_deploy.calibrate.stats import ActivationStats, CalibrationStats
from mpq_deploy.formats.shifts import FINER, SHIFT_FORMS, SHIFTABLE, centres, shift_codes
from mpq_deploy.graph.layers import Layer, LayerGraph
from mpq_deploy.graph.writers.quantize_layers import weight_array
from mpq_deploy.recipe import CalibrateSettings
from mpq_deploy.system.inputs import read_json_object
from mpq_deploy.system.mapped import drop_pages
from mpq_deploy.system.validated import model_of

SHIFTED = "shifted.json"


@dataclass(frozen=True)
class Noted:
    """What is stored of an activation: the ``forms`` with shifts, and its readers' ``pads``."""

    forms: tuple[str, ...]
    pads: tuple[int, ...]


def shiftable_inputs(graph: LayerGraph) -> dict[str, tuple[int, ...]]:
    """Return the activations that may be shifted: tensor -> the pads of all its readers.

    All readers must be convolutions of one group, with one use and the same explicit pads.
    """
    nodes = {node.name: node for node in graph.model.graph}
    found: dict[str, set[tuple[int, ...] | None]] = {}
    for layer in graph.layers:
        plain = layer.op == "Conv" and layer.group == 1 and len(layer.uses) == 1
        for use in layer.uses:
            attributes = nodes[use.node].attributes
            padding = attributes.get_string("auto_pad", "NOTSET")
            given = () if padding == "VALID" else tuple(attributes.get_ints("pads", ()))
            pads = given or (0,) * (2 * len(layer.kernel))
            allowed = plain and padding in ("NOTSET", "VALID")
            found.setdefault(use.input, set()).add(pads if allowed else None)
    same = {tensor: next(iter(pads)) for tensor, pads in found.items() if len(pads) == 1}
    return {tensor: pads for tensor, pads in same.items() if pads is not None}


def with_shifts(
    stats: ActivationStats, seen: Observation, number: int, settings: CalibrateSettings
) -> ActivationStats:
    """Return ``stats`` of activation ``number`` with shifts where they make the scale finer."""
    place = slice(seen.offsets[number], seen.offsets[number + 1])
    high, low = (
        rows[:, place].astype(np.float64) for rows in (seen.high_by_timestep, seen.low_by_timestep)
    )
    channels = high.shape[1]
    shifts = np.zeros((len(SHIFT_FORMS), channels), np.int16)
    scales = np.zeros((len(SHIFT_FORMS), 2))
    for row, (kind, exponent) in enumerate(SHIFTABLE.values()):
        factors = (
            np.ones(channels) if exponent is None else stats.factors[exponent].astype(np.float64)
        )
        middle, half, largest = centres(high * factors, low * factors, kind)
        if not largest:
            continue
        if kind.moves:
            before, scale = round_scale(largest / QUANT_MAX), round_scale(half / (QUANT_MAX - 0.5))
        else:
            assert exponent is not None
            own = seen.channels[number]
            sample = seen.values[number] * factors[own] - middle[own]
            before = float(stats.scales_rescaled[exponent])
            scale = activation_scale(settings.scale, sample, half, stats.count, settings.percentile)
        if scale <= FINER * before:
            shifts[row] = shift_codes(middle, scale)
            scales[row] = scale, largest / (QUANT_MAX * scale)
    return replace(stats, shifts=shifts, shift_scales=scales)


def shifts_within_fp16(stats: CalibrationStats, graph: LayerGraph) -> CalibrationStats:
    """Return ``stats`` without the shifts that the file cannot hold: it keeps them in FP16.

    A shift itself may pass FP16's range, where activations do, or what the weight makes of it, which
    is added to the product.
    """
    found = dict(stats.activations)
    for layer in graph.layers:
        for tensor in layer.inputs:
            one = found.get(tensor)
            if one is None or not one.shift_scales[:, 0].any():
                continue
            weight = np.abs(weight_array(graph.model, layer), dtype=np.float64)
            sums = weight.reshape(*weight.shape[:2], -1).sum(axis=-1)
            drop_pages(graph.model.graph.initializers[layer.weight].const_value)
            scales = one.shift_scales.copy()
            for row, (_, exponent) in enumerate(SHIFTABLE.values()):
                shift = np.abs(one.shifts[row] * scales[row, 0])
                factors = 1.0 if exponent is None else one.factors[exponent].astype(np.float64)
                if max(shift.max(), (sums @ (shift / factors)).max()) > WIDE_FROM:
                    scales[row] = 0
            shifts = np.where(scales[:, :1] > 0, one.shifts, 0).astype(np.int16)
            found[tensor] = replace(one, shifts=shifts, shift_scales=scales)
    return replace(stats, activations=found)


def save_shifted(stats: CalibrationStats, graph: LayerGraph, folder: Path) -> None:
    """Write which forms of which activations are shifted, as the layers' bytes depend on it."""
    pads = shiftable_inputs(graph)
    found = {
        tensor: {"forms": forms, "pads": pads[tensor]}
        for tensor, one in sorted(stats.activations.items())
        if (forms := [f for f, row in zip(SHIFT_FORMS, one.shift_scales) if row[0]])
    }
    (folder / SHIFTED).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def shifted_layers(graph: LayerGraph, folder: Path) -> LayerGraph:
    """Return ``graph`` with ``shifted`` and ``pads`` of its layers as stored in ``folder``."""
    path = folder / SHIFTED
    found = read_json_object(path) if path.is_file() else {}
    noted = model_of(dict[str, Noted], found, str(path))
    return replace(graph, layers=tuple(_shifted(layer, noted) for layer in graph.layers))


def _shifted(layer: Layer, noted: Mapping[str, Noted]) -> Layer:
    own = noted.get(layer.uses[0].input) if layer.op == "Conv" and layer.group == 1 else None
    if own is None:
        return layer
    return replace(layer, shifted=frozenset(own.forms), pads=own.pads)
