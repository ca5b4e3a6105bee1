"""Simulated formats of 2 to 8 bits that no engine supports; their bytes are nominal.

Weights have a scale and a zero point per output channel (``rounding.row_grids``), activations per
tensor. ``SharedBits`` are branches that distribute a layer's bits over its output channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from mpq_deploy.formats.interfaces import (
    ActivationFormat,
    ActivationGrid,
    Branch,
    Rounder,
    Scheme,
    WeightFormat,
)
from mpq_deploy.formats.sizes import FP16_BYTES
from mpq_deploy.rounding.arrays import fetched, placed
from mpq_deploy.rounding.row_grids import (
    RowForm,
    SimulatedMatrix,
    plain,
    round_forms,
    row_errors,
    stacked,
)

if TYPE_CHECKING:
    import onnx_ir as ir

    from mpq_deploy.calibrate.stats import ActivationStats
    from mpq_deploy.formats.interfaces import DeployedMatrix
    from mpq_deploy.formats.layer_rounding import LayerRounding
    from mpq_deploy.graph.layers import Layer
    from mpq_deploy.graph.writers.node_writer import LayerWriter, NodeWriter
    from mpq_deploy.models.spec import Array
    from mpq_deploy.recover.trained_weights import LayerTwin, StartingWeight, TwinKit

SIMULATED_BITS = (2, 3, 4, 5, 6, 7, 8)
# Mean bits for which ``SharedBits`` exist: channels have {1, 2, 3} to {3, 4, 5} bits.
SHARED_OUT_BITS = (2, 3, 4)
# Nominal bytes of a zero point: one per output channel, and one per input of each layer (our
# choice).
ZERO_POINT_BYTES = 1
# Keys of the ONNX model's metadata (JSON). Weights: layer -> scheme, and the grid bits and number
# of residuals of each output channel. Activations: quantizer -> bits.
WEIGHTS_KEY = "mpq_deploy.simulated_weights"
ACTIVATIONS_KEY = "mpq_deploy.simulated_activations"


@dataclass(frozen=True)
class SimulatedWeight(WeightFormat):
    """UINT8 codes and zero points -> DequantizeLinear per output channel.

    Each binary residual is a tensor of signs with its own DequantizeLinear, and is added.
    """

    width: int = 8

    simulated = True

    @property
    def bits(self) -> int:  # type: ignore[override]
        """Bits per weight; with ``SharedBits`` the mean."""
        return self.width

    @property
    def form(self) -> str:
        return f"sim{self.width}"

    def bytes_of(self, layer: Layer) -> int:
        """Return the nominal bytes: packed codes, an FP16 scale and a zero point per channel."""
        return packed_bytes(self.width * layer.weights) + layer.out_channels * (
            FP16_BYTES + ZERO_POINT_BYTES
        )

    @property
    def rounder(self) -> Rounder:
        return round_simulated

    def read(self, arrays: Mapping[str, Array]) -> SimulatedMatrix:
        return SimulatedMatrix.of(arrays)

    def write(self, to: LayerWriter, matrix: SimulatedMatrix) -> ir.Value:
        grids = matrix.grids
        channels = {"grid_bits": matrix.grid_bits.tolist(), "orders": matrix.orders.tolist()}
        to.record(WEIGHTS_KEY, to.layer.name, {"scheme": to.scheme.name, **channels})
        codes = (matrix.codes.astype(np.int16) - grids.low[:, None]).astype(np.uint8)
        inputs = [
            to.constant("codes", to.folded(codes)),
            to.constant("scale", grids.scale.astype(np.float32)),
            to.constant("zero_point", (-grids.low).astype(np.uint8)),
        ]
        axis, name = {"axis": to.layer.out_axis}, "weight_dequantize"
        weight = to.insert("DequantizeLinear", inputs, axis, name)
        residuals = [(s, r) for s, r in zip(matrix.signs, grids.residual) if r.any()]
        for order, (signs, sizes) in enumerate(residuals):
            inputs = [
                to.constant(f"signs{order}", to.folded(signs)),
                to.constant(f"residual{order}", sizes.astype(np.float32)),
            ]
            more = to.insert("DequantizeLinear", inputs, axis, f"{name}{order}")
            weight = to.insert("Add", [weight, more], {}, f"{name}{order}_add")
        return weight

    def twin(self, start: StartingWeight, kit: TwinKit) -> LayerTwin:
        return kit.of(kit.levels(start.matrix, start.weight))


@dataclass(frozen=True)
class SimulatedActivation(ActivationFormat):
    """Clip to the range of ``width`` bits, then a UINT8 QuantizeLinear/DequantizeLinear pair."""

    width: int = 8

    simulated = True

    @property
    def bits(self) -> int:  # type: ignore[override]
        """Bits per value."""
        return self.width

    @property
    def form(self) -> str:
        return f"+a{self.width}"

    def grid(self, stats: ActivationStats, scale: float) -> ActivationGrid:
        return stats.simulated(self.width)

    def reader_bytes(self, layer: Layer) -> int:
        """Return the bytes of a zero point per input."""
        return ZERO_POINT_BYTES * len(layer.inputs)

    def write(
        self, to: NodeWriter, value: ir.Value, grid: ActivationGrid, key: tuple[str, str]
    ) -> list[ir.Node]:
        base = f"{key[0]}//sim{key[1]}"
        scale = to.named_constant(f"{base}/scale", np.asarray(grid.scale, np.float32))
        zero_point = to.named_constant(f"{base}/zero_point", np.asarray(-grid.quant_min, np.uint8))
        to.record(ACTIVATIONS_KEY, base, self.width)
        nodes = []
        if self.width < 8:
            ends = {"low": grid.quant_min, "high": grid.quant_max}
            limits = {end: np.asarray(code * grid.scale, np.float32) for end, code in ends.items()}
            bounds = [to.named_constant(f"{base}/{end}", limit) for end, limit in limits.items()]
            nodes.append(to.make("Clip", [value, *bounds], {}, f"{base}/clip", like=value))
        source = nodes[-1].outputs[0] if nodes else value
        inputs = [source, scale, zero_point]
        nodes.append(
            to.make("QuantizeLinear", inputs, {}, f"{base}/quantize", like=value, dtype="UINT8")
        )
        inputs = [nodes[-1].outputs[0], scale, zero_point]
        return [*nodes, to.make("DequantizeLinear", inputs, {}, f"{base}/dequantize", like=value)]


@dataclass(frozen=True)
class SharedBits(Branch):
    """Output channels have N - 1, N or N + 1 bits, N on average; ``amount`` is not used.

    ``form_bits``: bits per channel that store the channel's form. ``residuals``: number of FP16
    residual sizes per channel.
    """

    form_bits: ClassVar[int]
    residuals: ClassVar[int] = 0

    def suits(self, body: Scheme) -> bool:
        return body.simulated and body.weight.bits in SHARED_OUT_BITS

    def joining_bytes(self, layer: Layer) -> int:
        channels = layer.out_channels
        return packed_bytes(self.form_bits * channels) + FP16_BYTES * channels * self.residuals

    def rounds_first(self, scheme: Scheme) -> tuple[Scheme, ...]:
        """Return the scheme itself: its channels are rounded with all simulated schemes."""
        return (scheme,)

    def row_forms(self, bits: int) -> tuple[list[RowForm], list[RowForm], list[RowForm]]:
        """Return the possible forms of a channel at ``bits`` - 1, ``bits`` and ``bits`` + 1."""
        return [plain(bits - 1)], [plain(bits)], [plain(bits + 1)]

    def steps(self, errors: Sequence[Array], kurtosis: Array | None) -> Array:
        """Return each channel's change in bits, -1, 0 or 1, int64 [O].

        ``errors``: three arrays [O], the error of each channel's best form at -1, 0 and 1;
        ``kurtosis`` [O] of the channels, or None where the input's range is unknown.
        """
        raise NotImplementedError


def packed_bytes(bits: int) -> int:
    """Return the bytes of ``bits`` packed bits."""
    return (bits + 7) // 8


def residual_room(layer: Layer, scheme: Scheme) -> int:
    """Return how many residual sizes the nominal bytes of ``layer`` include."""
    return layer.out_channels * (
        scheme.branch.residuals if isinstance(scheme.branch, SharedBits) else 0
    )


def round_simulated(schemes: Sequence[Scheme], layer: LayerRounding) -> dict[str, DeployedMatrix]:
    """Round ``layer`` for all simulated ``schemes`` at once: weight form -> matrix."""
    distinct = {scheme.weight_form: scheme for scheme in schemes}
    wanted = needed_forms(list(distinct.values()))
    parts: dict[RowForm, list[SimulatedMatrix]] = {form: [] for form in wanted}
    errors: dict[RowForm, list[Array]] = {form: [] for form in wanted}
    for weight, blocks in layer.groups():
        there, seen = placed(weight), [placed(block) for block in blocks]
        for form, matrix in round_forms(there, wanted, seen, layer.how).items():
            errors[form].append(fetched(row_errors(there, matrix, seen)))
            parts[form].append(matrix.fetched())
    rounded = {form: stacked(pieces) for form, pieces in parts.items()}
    lost = {form: np.concatenate(pieces) for form, pieces in errors.items()}
    amax = layer.inputs.amax
    kurtosis = None if amax is None else row_kurtosis(layer.weight, amax)
    return {name: assemble(scheme, rounded, lost, kurtosis) for name, scheme in distinct.items()}


def needed_forms(schemes: Sequence[Scheme]) -> tuple[RowForm, ...]:
    """Return the distinct channel forms that simulated ``schemes`` consist of."""
    return tuple(dict.fromkeys(form for scheme in schemes for form in _forms_of(scheme)))


def _forms_of(scheme: Scheme) -> Iterator[RowForm]:
    if not isinstance(scheme.branch, SharedBits):
        yield plain(scheme.weight.bits)
        return
    choices = scheme.branch.row_forms(scheme.weight.bits)
    yield from (forms[0] for forms in choices)
    yield from (form for forms in choices for form in forms[1:])


def assemble(
    scheme: Scheme,
    rounded: Mapping[RowForm, SimulatedMatrix],
    errors: Mapping[RowForm, Array],
    kurtosis: Array | None,
) -> SimulatedMatrix:
    """Assemble the weight of a simulated ``scheme`` from rounded channels.

    ``rounded``: form -> all channels in that form; ``errors``: form -> ``row_errors`` [O];
    ``kurtosis`` [O]: for ``SharedBits.steps``.
    """
    if not isinstance(scheme.branch, SharedBits):
        return rounded[plain(scheme.weight.bits)]
    choices = scheme.branch.row_forms(scheme.weight.bits)
    least = [np.min([errors[form] for form in forms], axis=0) for forms in choices]
    steps = scheme.branch.steps(least, kurtosis)
    every = [form for forms in choices for form in forms]
    first = np.cumsum([0, *map(len, choices[:-1])])
    best = [
        np.argmin([errors[form] for form in forms], axis=0) + start
        for forms, start in zip(choices, first)
    ]
    rows = np.arange(len(steps))
    chosen = np.stack(best)[steps + 1, rows]
    return stacked([rounded[form] for form in every]).take(chosen * len(steps) + rows)


def row_kurtosis(weight: Array, input_amax: Array) -> Array:
    """Return the Pearson kurtosis of pre-scaled rows of ``weight`` [O, K], float64 [O].

    ``input_amax`` float [K]: the input's absolute maximum per column. The weight is divided by
    delta_k = sqrt(max|W_k| / max|X_k|); delta_k is 1 where a maximum is 0. A constant row has
    kurtosis 0. Source: MPQ-DM (arXiv 2412.11549) and its published code: mean((w - mu)^4) / std^4.
    """
    largest = np.abs(weight).max(axis=0)
    usable = (largest > 0) & (input_amax > 0)
    delta = np.sqrt(np.where(usable, largest, 1.0) / np.where(usable, input_amax, 1.0))
    scaled = weight.astype(np.float64) / delta
    centred = scaled - scaled.mean(axis=1, keepdims=True)
    variance = np.mean(np.square(centred), axis=1)
    fourth = np.mean(np.square(np.square(centred)), axis=1)
    return np.where(variance > 0, fourth / np.where(variance > 0, np.square(variance), 1.0), 0.0)


_WEIGHTS = {bits: SimulatedWeight(width=bits) for bits in SIMULATED_BITS}
_ACTIVATIONS = (*(SimulatedActivation(bits) for bits in SIMULATED_BITS), None)
# w2a2-sim to w8a8-sim, and w2a16-sim to w8a16-sim.
SIMULATED_BODIES = tuple(
    Scheme(
        f"w{bits}a{activation.width if activation else 16}-sim",
        weight,
        activation,
        meaning=f"simulated: {bits}-bit weights, {f'{activation.width}-bit' if activation else 'FP16'} activations",
    )
    for bits, weight in _WEIGHTS.items()
    for activation in _ACTIVATIONS
)
