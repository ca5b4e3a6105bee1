"""What a metric needs to know about a layer's candidates and the layer's node."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from mpq_deploy.calibrate.stats import ActivationStats, CalibrationStats
from mpq_deploy.errors import ModelError
from mpq_deploy.formats.interfaces import ActivationGrid
from mpq_deploy.formats.ranges import STATIC, ActivationRange
from mpq_deploy.formats.scheme import Scheme
from mpq_deploy.graph.layers import Layer, LayerGraph, LayerUse
from mpq_deploy.models.spec import Array


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

        "fp16" is the weight rounded to FP16. A Conv's weight is reshaped, that of a product has
        outputs first.
        """

    def promoted(self, form: str) -> Array:
        """Return the output channels that ``form``, of a ``rows`` branch, takes from INT8: int [m]."""


@dataclass(frozen=True)
class Promotion:
    """What the ``rows`` schemes of one body change: more and more of the same channels to INT8.

    ``channels`` int [m], those that the smallest branch promotes first; ``differences`` float32 [m,
    reduction]: INT8 minus the body for them; ``counts``: scheme -> how many of them it promotes.
    """

    body: str
    channels: Array
    differences: Array
    counts: dict[str, int]


@dataclass(frozen=True)
class FormStack:
    """The weight errors of a layer's candidates, ready for one product with all of them.

    ``differences`` float32 [F, out_channels, reduction]: dequantized minus float weight, one per
    distinct form. ``weights_only``, ``with_activation``: scheme -> row of ``differences``, for
    schemes whose activation stays float and for those whose activation is INT8. Their rows are
    consecutive: ``[:split_end]`` and ``[split_start:kept_start]``. ``with_kept``: activation form
    -> scheme -> row, for schemes that leave some channels of the activation in float, rescale them
    or have a range that moves; their rows follow, or are the same. Schemes with a ``rows`` branch
    are in ``promotions``.
    """

    weight: Array
    differences: Array
    weights_only: dict[str, int]
    with_activation: dict[str, int]
    split_start: int
    split_end: int
    kept_start: int
    with_kept: dict[str, dict[str, int]]
    promotions: tuple[Promotion, ...] = ()

    @property
    def bytes(self) -> int:
        """Memory held by the arrays."""
        more = sum(p.differences.nbytes for p in self.promotions)
        return int(self.weight.nbytes + self.differences.nbytes + more)

    def difference(self, scheme: str) -> Array:
        """Return the weight error of any scheme, float32 [out_channels, reduction]."""
        for promotion in self.promotions:
            if scheme in promotion.counts:
                count = promotion.counts[scheme]
                whole: Array = self.difference(promotion.body).copy()
                whole[promotion.channels[:count]] += promotion.differences[:count]
                return whole
        groups = (self.weights_only, self.with_activation, *self.with_kept.values())
        return np.asarray(
            self.differences[next(names[scheme] for names in groups if scheme in names)]
        )


def float_matrix(graph: LayerGraph, layer: Layer) -> Array:
    """Return the float weight of ``layer``, float32 [out_channels, reduction]."""
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
    """Stack the weight forms of ``candidate``: weights-only ones first, shared ones in the middle."""
    plain = dict.fromkeys(s.weight_form for s in _weights_only(candidate))
    quantized = dict.fromkeys(s.weight_form for s in _rounding_all(candidate))
    kept: dict[str, list[Scheme]] = {}
    for scheme in candidate.schemes:
        if scheme.activation_form:
            kept.setdefault(scheme.activation_form, []).append(scheme)
    order = [
        *(f for f in plain if f not in quantized),
        *(f for f in plain if f in quantized),
        *(f for f in quantized if f not in plain),
    ]
    kept_start = len(order)
    row = {form: i for i, form in enumerate(order)}
    starts, behind = _rows_apart(kept, tuple(quantized), kept_start)
    differences = np.empty((kept_start + len(behind), *weight.shape), np.float32)
    rows_of_form: dict[str, list[int]] = {form: [i] for form, i in row.items()}
    for i, form in enumerate(behind, kept_start):
        rows_of_form.setdefault(form, []).append(i)
    for form, rows in rows_of_form.items():
        error = candidate.weight_matrix(form) - weight
        for i in rows:
            differences[i] = error
    return FormStack(
        weight,
        differences,
        {s.name: row[s.weight_form] for s in _weights_only(candidate)},
        {s.name: row[s.weight_form] for s in _rounding_all(candidate)},
        kept_start - len(quantized),
        len(plain),
        kept_start,
        {
            form: {s.name: starts[form] + _distinct(schemes).index(s.weight_form) for s in schemes}
            for form, schemes in kept.items()
        },
        _promotions(candidate),
    )


def _distinct(schemes: list[Scheme]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(s.weight_form for s in schemes))


def _rows_apart(
    kept: Mapping[str, list[Scheme]], quantized: tuple[str, ...], start: int
) -> tuple[dict[str, int], list[str]]:
    """Return the first row of each activation form, and the weight forms of the rows from ``start`` on.

    Rows of one activation form are consecutive. Those of equal weight forms share theirs: ranges of
    the input change no weight. The forms ``quantized`` end before ``start``.
    """
    first: dict[tuple[str, ...], int] = {quantized: start - len(quantized)}
    behind: list[str] = []
    for schemes in kept.values():
        forms = _distinct(schemes)
        if forms not in first:
            first[forms] = start + len(behind)
            behind += forms
    return {form: first[_distinct(schemes)] for form, schemes in kept.items()}, behind


def _promotions(candidate: CandidateWeights) -> tuple[Promotion, ...]:
    """Group the ``rows`` schemes by body: larger branches promote the smaller ones' channels, too."""
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


def _weights_only(candidate: CandidateWeights) -> list[Scheme]:
    return [s for s in candidate.schemes if s.activation is None and not s.branch.promotes]


def _rounding_all(candidate: CandidateWeights) -> list[Scheme]:
    return [
        s
        for s in candidate.schemes
        if s.activation is not None and not s.activation_form and not s.branch.promotes
    ]


class Stack(Protocol):
    """A FormStack, or what a metric makes of it."""

    @property
    def bytes(self) -> int:
        """Memory held."""


Value = TypeVar("Value")
StackType = TypeVar("StackType", bound=Stack)


class Kept(Generic[Value]):
    """Values by layer, made on demand; up to ``limit`` bytes stay in memory."""

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
    """Stacks by layer, each passed through ``prepare``; up to ``limit`` bytes stay in memory."""

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
    """Return a store of FormStacks as they are."""
    return StackStore(graph, candidates, lambda stack: stack, limit)


@dataclass(frozen=True)
class InputRounding:
    """How schemes round the input of a layer: by ``grid``, with a range as ``range`` says.

    ``kept`` int32 [n]: the channels that stay in float. ``factors`` float [C]: by what the channels
    are multiplied before; the weight is divided by them. None for none. Grids whose levels are not
    uniform have neither factors nor a range that moves.
    """

    grid: ActivationGrid
    kept: Array
    factors: Array | None = None
    range: ActivationRange = STATIC

    def at(self, timestep: float | None) -> InputRounding:
        """Return the rounding at a value of the timestep's input."""
        return replace(self, grid=self.range.at(self.grid, timestep))

    @property
    def scale(self) -> float:
        """The scale at the widest range."""
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

    def kept_mask(self, layer: Layer, rank: int, channels: int) -> Array:
        """Return a mask of the kept channels, to broadcast against an input of ``rank``."""
        mask = np.zeros(channels, bool)
        mask[self.kept] = True
        return mask.reshape(1, -1, *(1,) * (rank - 2)) if layer.op == "Conv" else mask


def input_roundings(
    stats: CalibrationStats, use: LayerUse, schemes: Iterable[Scheme]
) -> dict[str, InputRounding]:
    """Return how ``schemes`` round the activation of ``use``, by activation form.

    Raises ModelError when it was not calibrated.
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
    """Return the layers with candidates, in graph order. Raises ModelError for a candidate of no
    layer.
    """
    names = {layer.name for layer in graph.layers}
    strangers = [name for name in candidates if name not in names]
    if strangers:
        raise ModelError(
            f"There are candidates for '{strangers[0]}', which is no layer of the graph.",
            "The candidates were made for another graph: make them again.",
        )
    return tuple(layer for layer in graph.layers if layer.name in candidates)
