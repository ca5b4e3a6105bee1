"""The nanoseconds of every (layer, scheme) on a target: measured by a table, or estimated.

In: the graph, the shapes of its activations at the deployed batch, the target, a latency table if
there is one. Out: ``LatencyCosts``, which the solver's problem and the plan's ``PlanLatency`` are
filled from.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import ceil, prod

from mpq_deploy.engine.target import Target
from mpq_deploy.errors import UsageError
from mpq_deploy.formats.branches.lowrank import LowRank
from mpq_deploy.formats.fp8 import FP8_SCHEME
from mpq_deploy.formats.scheme import FP16, Scheme
from mpq_deploy.graph.attention import Operands
from mpq_deploy.graph.layers import Layer, LayerGraph, LayerUse
from mpq_deploy.latency.joins import Joins
from mpq_deploy.latency.latency_table import LatencyTable, LayerShape
from mpq_deploy.latency.others import node_seconds, others_seconds, weighed_nodes
from mpq_deploy.latency.roofline import (
    LAUNCH_SECONDS,
    Rates,
    Traffic,
    layer_seconds,
    quantizer_seconds,
)

NANOSECONDS = 1e9
# How many names a warning gives.
NAMED = 4


@dataclass(frozen=True)
class PlanLatency:
    """Milliseconds per call of a plan, beside everything FP16, INT8 and INT4.

    All are sums over single layers and of ``others_ms``, what is not a layer: nothing here was
    measured as a whole. ``source``: estimated, measured, or "measured and estimated" for the
    layers; ``basis`` says in words on what. ``measured`` and ``estimated`` count the solver's
    (layer, scheme) entries. ``fusion``: on what products of one input count as one kernel, in words.
    ``slower_in_int8``: layers that are expected to be slower in INT8 than
    in FP16; ``taken``: those among them that the plan has in INT8 all the same. ``int4_ms``: with
    INT4 weights wherever a layer may have them; None where a table lacks layers and nothing is
    known to estimate them from. ``controls_ms``: of the further controls that the target takes (FP8,
    FP4), by name. Only where the plan is slower than FP16: ``fastest_ms`` of the
    fastest plan found within the budget with its predicted ``fastest_loss``, and ``as_fast_at``, the
    share of FP16's size from which a plan within the slack is as fast as FP16.
    """

    ours_ms: float
    fp16_ms: float
    int8_ms: float
    others_ms: float
    batch: int
    source: str
    basis: str
    measured: int
    estimated: int
    slower_in_int8: tuple[str, ...]
    taken: tuple[str, ...]
    objective: str
    limit_ms: float | None
    int4_ms: float | None = None
    controls_ms: dict[str, float] = field(default_factory=dict)
    fastest_ms: float | None = None
    fastest_loss: float | None = None
    as_fast_at: float | None = None
    fusion: str = ""


class LatencyCosts:
    """Nanoseconds of layers, of shared quantizers, and of what is not a layer.

    ``shapes``: activation -> shape with the batch in it, of all that layers read and write (and of
    the others). ``joins``: which products of one input are one kernel. Raises UsageError where a
    layer has neither a row in ``table`` nor figures of ``target`` to estimate it from.
    """

    def __init__(
        self,
        graph: LayerGraph,
        shapes: Mapping[str, tuple[int, ...]],
        target: Target,
        batch: int,
        table: LatencyTable | None = None,
        joins: Joins | None = None,
    ) -> None:
        self.shapes, self.target, self.batch, self.table = shapes, target, batch, table
        self.graph, self.joins = graph, joins or Joins(graph)
        self.rates = Rates.of(target)
        if table is not None:
            table.require(target.name, batch)
        self.others_ns = _ns(others_seconds(graph, shapes, self.rates)) if self.rates else 0
        self.estimated: set[tuple[str, str]] = set()
        self.measured: set[tuple[str, str]] = set()

    def layer_ns(self, layer: Layer, scheme: Scheme) -> int:
        """Return what all uses of ``layer`` take under ``scheme``, without the quantizers that it may share."""
        return sum(self._use_ns(layer, use, scheme) for use in layer.uses)

    def joined_ns(self, layers: Sequence[Layer], scheme: Scheme) -> int:
        """Estimate what ``layers`` of one input save where they are one product: they read it once.

        Of a kernel that holds others too they save their share.
        """
        shares = self.joins.shares(layers, scheme)[0]
        return int(NANOSECONDS * sum(share * self._saved(all_, scheme) for all_, share in shares))

    def _saved(self, layers: Sequence[Layer], scheme: Scheme) -> float:
        """Estimate the seconds that one kernel of ``layers`` saves; 0 without figures."""
        if self.rates is None:
            return 0.0
        first, saved = layers[0], 0.0
        shape = list(first.weight_shape)
        shape[first.out_axis] = sum(layer.out_channels for layer in layers)
        whole = replace(first, weight_shape=tuple(shape))
        for uses in zip(*(layer.uses for layer in layers)):
            read = prod(self.shapes[uses[0].input])
            written = [prod(self.shapes[use.output]) for use in uses]
            saved -= layer_seconds(whole, scheme, Traffic(read, sum(written)), self.rates)
            for layer, values in zip(layers, written):
                saved += layer_seconds(layer, scheme, Traffic(read, values), self.rates)
        return saved

    def attention_ns(self, one: Operands) -> dict[str, int]:
        """Estimate both products of an attention, in FP16 and in FP8; 0 without figures."""
        nodes = [n for n in weighed_nodes(self.graph) if n.name in (one.name, one.scores)]
        found = dict.fromkeys(("fp16", FP8_SCHEME), 0)
        if self.rates is not None:
            for name in found:
                fp8 = name == FP8_SCHEME
                found[name] = _ns(sum(node_seconds(n, self.shapes, self.rates, fp8) for n in nodes))
        return found

    def slots_ns(self, layers: Iterable[Layer], rank: int) -> int | None:
        """Estimate what slots of ``rank`` for LoRAs add to ``layers``; None without figures.

        They are a branch of two FP16 factors, beside a body of any form.
        """
        if self.rates is None:
            return None
        slotted, total = FP16.with_branch(LowRank(rank)), 0.0
        for layer, use in ((one, use) for one in layers for use in one.uses):
            traffic = Traffic(prod(self.shapes[use.input]), prod(self.shapes[use.output]))
            total += layer_seconds(layer, slotted, traffic, self.rates)
            total -= layer_seconds(layer, FP16, traffic, self.rates)
        return _ns(total)

    def quantizer_ns(self, tensor: str, scheme: Scheme, product: bool) -> int:
        """Estimate quantizing the activation ``tensor`` under ``scheme``, once for all readers.

        ``product``: these are not convolutions. 0 without figures: then each reader's own row holds
        it.
        """
        if self.rates is None:
            return 0
        return _ns(quantizer_seconds(prod(self.shapes[tensor]), scheme, self.rates, product))

    def quantizers_ns(self, layer: Layer, scheme: Scheme) -> dict[str, int]:
        """Estimate what ``layer`` may share with others under ``scheme``: its inputs' quantizers, and
        what those of a whole graph have in common; by name.
        """
        if scheme.activation is None:
            return {}
        form, product = scheme.activation_form, layer.op != "Conv"
        own = {t + form: self.quantizer_ns(t, scheme, product) for t in layer.inputs}
        launches = _ns(scheme.range.shared_kernels() * LAUNCH_SECONDS) if self.rates else 0
        return {**own, **dict.fromkeys(scheme.range.shared_bytes(), launches)}

    def alone_ns(self, layer: Layer, scheme: Scheme) -> int:
        """Return what ``layer`` takes when it shares no quantizer."""
        product = layer.op != "Conv"
        return self.layer_ns(layer, scheme) + sum(
            self.quantizer_ns(tensor, scheme, product) for tensor in layer.inputs
        )

    def shape(self, layer: Layer, use: LayerUse) -> LayerShape:
        """Return the key of one use of ``layer`` in latency tables."""
        return LayerShape(
            layer.op,
            self.shapes[use.input],
            self.shapes[use.output],
            layer.weight_shape,
            layer.group,
        )

    def plan_ns(self, layers: Iterable[Layer], schemes: Mapping[str, Scheme]) -> int:
        """Return what a plan (layer -> scheme) takes, what is not a layer included."""
        total, shared = self.others_ns, dict[str, int]()
        for layer in layers:
            scheme = schemes[layer.name]
            total += self.layer_ns(layer, scheme)
            shared.update(self.quantizers_ns(layer, scheme))
        saved = sum(self.joined_ns(*together) for together in self.joins.of_plan(schemes))
        return total - saved + sum(shared.values())

    def slower_in_int8(
        self, layers: Iterable[Layer], int8: Mapping[str, Scheme]
    ) -> tuple[str, ...]:
        """Return the layers that alone are slower under ``int8`` (layer -> scheme) than in FP16."""
        return tuple(
            n.name for n in layers if self.alone_ns(n, int8[n.name]) > self.alone_ns(n, FP16)
        )

    def source(self) -> str:
        """Say in a word where the layers' times come from, as far as they were asked for."""
        if not self.measured:
            return "estimated"
        return "measured and estimated" if self.estimated else "measured"

    def basis(self) -> str:
        """Say what the times are based on."""
        said = []
        if self.measured and self.table is not None:
            rows = len(self.measured)
            of = f" of {rows + len(self.estimated):,}" if self.estimated else ""
            said.append(
                f"{rows:,}{of} (layer, scheme) times measured on {self.table.device} ({self.table.builder})"
            )
        if self.table is not None and self.table.source == "estimated":
            said.append(f"the table given is itself an estimate, of {self.table.device}")
        if self.rates is not None:
            doubt = (
                f"; not confirmed: {', '.join(self.rates.unconfirmed)}"
                if self.rates.unconfirmed
                else ""
            )
            all_or_rest = "the rest estimated" if self.measured else "estimated"
            said.append(f"{all_or_rest} by a roofline of peak figures ({self.rates.device}{doubt})")
        return "; ".join(said)

    def _use_ns(self, layer: Layer, use: LayerUse, scheme: Scheme) -> int:
        row = self.shape(layer, use), scheme.timeless.name
        found = self.table.entries.get(row) if self.table else None
        if found is not None:
            assert self.table is not None
            (self.measured if self.table.source == "measured" else self.estimated).add(
                (layer.name, scheme.name)
            )
            # A row is of the layer alone, its quantizer included; that counts apart, once for all
            # readers.
            own = self.quantizer_ns(use.input, scheme, layer.op != "Conv")
            return max(ceil(found * 1e6) - own, 0)
        if self.rates is None:
            raise UsageError(
                f"The time of {layer.name} under {scheme.name} on {self.target.name} is unknown: "
                "the target has no figures to estimate it from"
                + (", and the latency table has no such row." if self.table else "."),
                "Give --latency-table with every layer's rows (mpq-deploy profile), or a target with its figures.",
            )
        self.estimated.add((layer.name, scheme.name))
        traffic = Traffic(prod(self.shapes[use.input]), prod(self.shapes[use.output]))
        return _ns(layer_seconds(layer, scheme, traffic, self.rates))


def int8_warning(latency: PlanLatency, layers: int) -> str:
    """Say which layers are expected to be slower in INT8 than in FP16; empty when none is."""
    slower = latency.slower_in_int8
    if not slower:
        return ""
    word = "measured" if latency.source == "measured" else "estimated"
    more = f" and {len(slower) - NAMED} more" if len(slower) > NAMED else ""
    said = (
        f"INT8 is expected to be slower than FP16 ({word}) for {len(slower)} of {layers} layers: "
        f"{', '.join(slower[:NAMED])}{more}"
    )
    if not latency.taken:
        return f"{said}; the plan has none of them in INT8"
    return f"{said}; the plan has {len(latency.taken)} of them in INT8 for its bytes (--objective latency weighs this)"


def _ns(seconds: float) -> int:
    return ceil(seconds * NANOSECONDS)
