"""What a metric reads of a layer: weight errors of its candidates, input rounding, attributes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol, TypeVar, overload

import numpy as np

from mpq_deploy.calibrate.stats import ActivationStats, CalibrationStats
from mpq_deploy.errors import ModelError
from mpq_deploy.formats.interfaces import ActivationGrid
from mpq_deploy.formats.ranges import STATIC, ActivationRange
from mpq_deploy.formats.scheme import Scheme
from mpq_deploy.graph.layers import Layer, LayerGraph, LayerUse
from mpq_deploy.models.spec import Array
from mpq_deploy.sensitivity.measured_calls import LARGE_STACK_BYTES


class CandidateWeights(Protocol):
    """A layer and the schemes it may take, with the dequantized weight of each weight form."""

    @property
    def layer(self) -> Layer:
        """The layer."""

    @property
    def schemes(self) -> tuple[Scheme, ...]:
        """The schemes that the layer may take."""

    def weight_matrix(self, form: str) -> Array:
        """Return the dequantized weight of a weight ``form``, float32 [out_channels, reduction].

        "fp16" is the weight rounded to FP16. The reduction of a Conv is its input channels per
        group times its kernel; the weight of a MatMul is transposed where outputs are not first.
        """

    def promoted(self, form: str) -> Array:
        """Return the output channels that the ``rows`` branch of ``form`` has in INT8: int [m]."""


@dataclass(frozen=True)
class Promotion:
    """The ``rows`` schemes of one body, which store nested sets of output channels in INT8.

    ``channels`` int [m]: every promoted channel, those of the smallest branch first.
    ``differences`` float32 [m, reduction]: INT8 weight minus body weight of these channels.
    ``counts``: scheme -> n, where the scheme promotes the first n of ``channels``.
    """

    body: str
    channels: Array
    differences: Array
    counts: dict[str, int]


@dataclass(frozen=True)
class FormsInTurn(Sequence[Array]):
    """The weight errors of a layer's ``forms``, float32 [out_channels, reduction] each.

    Each one is computed when it is indexed and not kept.
    """

    weight: Array
    candidate: CandidateWeights
    forms: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.forms)

    @overload
    def __getitem__(self, row: int) -> Array: ...

    @overload
    def __getitem__(self, row: slice) -> Sequence[Array]: ...

    def __getitem__(self, row: int | slice) -> Array | Sequence[Array]:
        if isinstance(row, slice):
            return replace(self, forms=self.forms[row])
        return np.subtract(self.candidate.weight_matrix(self.forms[row]), self.weight)

    @property
    def nbytes(self) -> int:
        """Bytes that are held: none."""
        return 0


@dataclass(frozen=True)
class FormStack:
    """The weight errors of a layer's candidates, stacked for one product with all of them.

    ``differences`` float32 [F, out_channels, reduction]: dequantized minus float weight per weight
    form; a ``FormsInTurn`` where the stack would take more than ``LARGE_STACK_BYTES``. ``rows``:
    scheme -> its row of ``differences``. Schemes with a ``rows`` branch are in ``promotions``
    instead. ``inputs``: scheme -> its activation form, None where the input stays float.
    """

    weight: Array
    differences: Array | FormsInTurn
    rows: dict[str, int]
    inputs: dict[str, str | None]
    promotions: tuple[Promotion, ...] = ()

    @property
    def bytes(self) -> int:
        """Memory held by the arrays."""
        more = sum(p.differences.nbytes for p in self.promotions)
        return int(self.weight.nbytes + self.differences.nbytes + more)

    @property
    def forms(self) -> tuple[str, ...]:
        """The distinct activation forms of the schemes."""
        return tuple(dict.fromkeys(form for form in self.inputs.values() if form is not None))

    def difference(self, scheme: str) -> Array:
        """Return the weight error of any scheme, float32 [out_channels, reduction]."""
        for promotion in self.promotions:
            if scheme in promotion.counts:
                count = promotion.counts[scheme]
                whole: Array = self.difference(promotion.body).copy()
                whole[promotion.channels[:count]] += promotion.differences[:count]
                return whole
        return np.asarray(self.differences[self.rows[scheme]])


def float_matrix(graph: LayerGraph, layer: Layer) -> Array:
    """Return the float weight of ``layer``, float32 [out_channels, reduction].

    Raises ModelError when the graph has no data for it.
    """
    tensor = graph.model.graph.initializers[layer.weight].const_value
    if tensor is None:
        raise ModelError(f"The weight '{layer.weight}' has no data.", "Export the model again.")
    array = tensor.numpy()
    if layer.op != "Conv" and layer.out_axis == 1:
        array = array.T
    return np.ascontiguousarray(
        array.reshape(layer.out_channels, layer.reduction), dtype=np.float32
    )


def form_stack(weight: Array, candidate: CandidateWeights) -> FormStack:
    """Return the weight errors of ``candidate``; ``weight`` float32 [out_channels, reduction]."""
    stacked = [s for s in candidate.schemes if not s.branch.promotes]
    forms = {form: row for row, form in enumerate(dict.fromkeys(s.weight_form for s in stacked))}
    made = FormsInTurn(weight, candidate, tuple(forms))
    differences: Array | FormsInTurn = made
    if len(forms) * weight.nbytes <= LARGE_STACK_BYTES:
        differences = np.empty((len(forms), *weight.shape), np.float32)
        for row, difference in enumerate(made):
            differences[row] = difference
    return FormStack(
        weight,
        differences,
        {s.name: forms[s.weight_form] for s in stacked},
        {s.name: None if s.activation is None else s.activation_form for s in candidate.schemes},
        _promotions(candidate),
    )


def _promotions(candidate: CandidateWeights) -> tuple[Promotion, ...]:
    """Group the ``rows`` schemes by body; a larger branch includes a smaller one's channels."""
    by_body: dict[str, list[Scheme]] = {}
    for scheme in candidate.schemes:
        if scheme.branch.promotes:
            by_body.setdefault(scheme.body.name, []).append(scheme)
    found = []
    for body, schemes in by_body.items():
        counts: dict[str, int] = {}
        channels = np.empty(0, np.int64)
        for scheme in sorted(schemes, key=lambda s: len(candidate.promoted(s.weight_form))):
            more = np.setdiff1d(candidate.promoted(scheme.weight_form), channels)
            channels = np.concatenate([channels, more])
            counts[scheme.name] = len(channels)
        largest = candidate.weight_matrix(schemes[-1].weight_form)
        assert len(candidate.promoted(schemes[-1].weight_form)) == len(channels)
        differences = (largest - candidate.weight_matrix(schemes[-1].body.weight_form))[channels]
        found.append(Promotion(body, channels, np.asarray(differences, np.float32), counts))
    return tuple(found)


class Stack(Protocol):
    """A FormStack, or what a metric's ``prepare`` makes of one."""

    @property
    def bytes(self) -> int:
        """Memory held."""


Value = TypeVar("Value")
StackType = TypeVar("StackType", bound=Stack)


class Kept(Generic[Value]):
    """A cache of values by layer, made on demand; it keeps at most ``limit`` bytes."""

    def __init__(
        self, make: Callable[[Layer], Value], size: Callable[[Value], int], limit: int
    ) -> None:
        self._make, self._size, self._limit = make, size, limit
        self._held: dict[str, Value] = {}
        self._bytes = 0

    def __getitem__(self, layer: Layer) -> Value:
        held = self._held.get(layer.name)
        if held is not None:
            return held
        value = self._make(layer)
        size = self._size(value)
        if self._bytes + size <= self._limit:
            self._held[layer.name] = value
            self._bytes += size
        return value


class StackStore(Kept[StackType]):
    """A cache of stacks by layer, each passed through ``prepare``."""

    def __init__(
        self,
        graph: LayerGraph,
        candidates: Mapping[str, CandidateWeights],
        prepare: Callable[[FormStack], StackType],
        limit: int,
    ) -> None:
        def make(layer: Layer) -> StackType:
            return prepare(form_stack(float_matrix(graph, layer), candidates[layer.name]))

        super().__init__(make, lambda stack: stack.bytes, limit)


def numpy_stacks(
    graph: LayerGraph, candidates: Mapping[str, CandidateWeights], limit: int
) -> StackStore[FormStack]:
    """Return a store of unchanged (NumPy) FormStacks."""
    return StackStore(graph, candidates, lambda stack: stack, limit)


@dataclass(frozen=True)
class InputRounding:
    """How one activation form rounds the input of a layer: to ``grid``, with the given ``range``.

    ``kept`` int32 [n]: the channels that stay in float. ``factors`` float [C]: multiply the
    channels before rounding (the weight is divided by them); None for none. Grids whose levels are
    not uniform have neither factors nor a range that moves.
    """

    grid: ActivationGrid
    kept: Array
    factors: Array | None = None
    range: ActivationRange = STATIC

    def at(self, timestep: float | None) -> InputRounding:
        """Return the rounding at ``timestep``, the value of the timestep input."""
        return replace(self, grid=self.range.at(self.grid, timestep))

    @property
    def scale(self) -> float:
        """The scale at the widest range that ``range`` takes."""
        return self.grid.scale

    @property
    def limits(self) -> tuple[int, int]:
        """The smallest and the largest code."""
        return self.grid.quant_min, self.grid.quant_max

    def by_channel(self, layer: Layer, rank: int) -> Array | None:
        """Return the factors, float32, to broadcast against an input of ``rank``."""
        if self.factors is None:
            return None
        factors = self.factors.astype(np.float32)
        return factors.reshape(1, -1, *(1,) * (rank - 2)) if layer.op == "Conv" else factors

    def zeros_by_channel(self, layer: Layer, rank: int) -> Array | float:
        """Return each channel's shift in codes, float32, broadcast as ``by_channel``; 0: none."""
        zeros = np.asarray(self.grid.zeros, np.float32)
        return zeros.reshape(1, -1, *(1,) * (rank - 2)) if len(zeros) else 0.0

    def kept_mask(self, layer: Layer, rank: int, channels: int) -> Array:
        """Return a mask of the kept channels, to broadcast against an input of ``rank``."""
        mask = np.zeros(channels, bool)
        mask[self.kept] = True
        return mask.reshape(1, -1, *(1,) * (rank - 2)) if layer.op == "Conv" else mask


def input_roundings(
    stats: CalibrationStats, use: LayerUse, schemes: Iterable[Scheme]
) -> dict[str, InputRounding]:
    """Return activation form -> how ``schemes`` round the input of ``use``.

    Raises ModelError when that input was not calibrated.
    """
    forms = {s.activation_form: s for s in schemes if s.activation is not None}
    if not forms:
        return {}
    found = _statistics(stats, use)
    return {form: _rounding(found, scheme) for form, scheme in forms.items()}


def _rounding(found: ActivationStats, scheme: Scheme) -> InputRounding:
    left_out, factors = scheme.branch.left_out(found), scheme.branch.factors(found)
    return InputRounding(scheme.input_grid(found), left_out, factors, scheme.range)


def _statistics(stats: CalibrationStats, use: LayerUse) -> ActivationStats:
    found = stats.activations.get(use.input)
    if found is None:
        raise ModelError(
            f"Calibration has no statistics of the activation '{use.input}', which node '{use.node}' reads.",
            "Calibrate this graph again.",
        )
    return found


def node_attributes(graph: LayerGraph) -> dict[str, dict[str, Any]]:
    """Return the attributes of every node that applies a layer, by node name."""
    wanted = {use.node for layer in graph.layers for use in layer.uses}
    return {
        node.name: {key: attribute.value for key, attribute in node.attributes.items()}
        for node in graph.model.graph
        if node.name in wanted
    }


def measured_layers(
    graph: LayerGraph, candidates: Mapping[str, CandidateWeights]
) -> tuple[Layer, ...]:
    """Return the layers that have candidates, in graph order.

    Raises ModelError when a candidate's name is not a layer of the graph.
    """
    names = {layer.name for layer in graph.layers}
    strangers = [name for name in candidates if name not in names]
    if strangers:
        raise ModelError(
            f"There are candidates for '{strangers[0]}', which is not a layer of the graph.",
            "The candidates were made for another graph: make them again.",
        )
    return tuple(layer for layer in graph.layers if layer.name in candidates)
