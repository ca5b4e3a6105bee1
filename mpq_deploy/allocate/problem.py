"""An allocation problem: the costs of each (layer, scheme), the limits and the objective.

A plan is layer -> scheme. Bytes and nanoseconds are integers; a plan's bytes are exactly those of
the constants in the quantized file.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from mpq_deploy.errors import UsageError, nearest
from mpq_deploy.formats.scheme import SCHEMES
from mpq_deploy.formats.sizes import ACTIVATION_SCALE_BYTES

Plan = Mapping[str, str]


@dataclass(frozen=True)
class LayerChoice:
    """One layer, or several tied ones: its input tensors, and bytes and predicted loss per scheme.

    ``input_bytes``: scheme -> bytes of the quantizer of one input, where they are more than a
    scale; ``scale_bytes``: those of them that remain where the input's producer takes the channel
    factors. ``latency_ns``: scheme -> nanoseconds of one call, without the inputs' quantizers;
    empty where unknown. ``members``: the tied layers (``allocate.ties``), whose costs are summed.
    ``scope``: a prefix of the quantizers' names, where the problem has layers of several models.
    """

    name: str
    inputs: tuple[str, ...]
    bytes: Mapping[str, int]
    loss: Mapping[str, float]
    input_bytes: Mapping[str, int] = field(default_factory=dict)
    latency_ns: Mapping[str, int] = field(default_factory=dict)
    scale_bytes: Mapping[str, int] = field(default_factory=dict)
    members: tuple[str, ...] = ()
    scope: str = ""

    @property
    def layers(self) -> tuple[str, ...]:
        """The names of the layers that take the chosen scheme."""
        return self.members or (self.name,)

    def kernels(self, scheme: str) -> int:
        """Return how many kernels the branch of ``scheme`` adds over all members; 0 without one."""
        return SCHEMES[scheme].branch.kernels * len(self.layers)

    def only(self, schemes: Iterable[str]) -> LayerChoice:
        """Return the layer with only ``schemes`` to choose from."""
        names = list(schemes)
        sizes, losses = {s: self.bytes[s] for s in names}, {s: self.loss[s] for s in names}
        return replace(self, bytes=sizes, loss=losses)

    def quantizers(self, scheme: str) -> dict[str, int]:
        """Return the activation quantizers that the layer reads under ``scheme``: name -> bytes.

        The result includes the constants that quantizers share, such as the ramps of ranges by
        timestep. Layers share entries of equal names. Channel factors count even where a producer
        may take them.
        """
        form = SCHEMES[scheme]
        if form.activation is None:
            return {}
        size = self.input_bytes.get(scheme, ACTIVATION_SCALE_BYTES)
        own = {tensor + form.activation_form: size for tensor in self.inputs}
        read = {**own, **form.range.shared_bytes()}
        return {self.scope + name: count for name, count in read.items()} if self.scope else read


@dataclass(frozen=True)
class Problem:
    """The layers to decide and the limits: ``budget_bytes``, and optionally latency and loss.

    ``fixed_bytes`` and ``fixed_ns``: costs of everything that is not a layer. ``foldable``: input
    tensor whose producer can take the channel factors -> the layers that read the tensor.
    ``quantizer_ns``: name of an activation quantizer -> nanoseconds, once for all its readers.
    ``max_loss``: limit on the sum of the layers' losses. ``start``: a known plan within all limits.
    """

    layers: Sequence[LayerChoice]
    fixed_bytes: int
    budget_bytes: int
    foldable: Mapping[str, frozenset[str]] = field(default_factory=dict)
    quantizer_ns: Mapping[str, int] = field(default_factory=dict)
    fixed_ns: int = 0
    max_latency_ns: int | None = None
    max_loss: float | None = None
    start: Plan | None = None

    def plan_bytes(self, plan: Plan) -> int:
        """Return the bytes of all constants under ``plan``; shared scales count once."""
        total = self.fixed_bytes
        quantized: dict[str, int] = {}
        for layer in self.layers:
            scheme = plan[layer.name]
            total += layer.bytes[scheme]
            quantized.update(layer.quantizers(scheme))
        by_name = {layer.name: layer for layer in self.layers}
        first = {member: layer.name for layer in self.layers for member in layer.layers}
        for tensor, names in self.foldable.items():
            readers = {first[name] for name in names}
            forms = {SCHEMES[plan[name]].activation_form: name for name in readers}
            if len(forms) == 1 and all(SCHEMES[plan[n]].branch.rescales for n in readers):
                ((form, reader),) = forms.items()
                left = by_name[reader].scale_bytes.get(plan[reader], ACTIVATION_SCALE_BYTES)
                quantized[tensor + form] = left
        return total + sum(quantized.values())

    def plan_ns(self, plan: Plan) -> int:
        """Return the nanoseconds of one call under ``plan``; shared quantizers count once."""
        shared = {name for layer in self.layers for name in layer.quantizers(plan[layer.name])}
        return (
            self.fixed_ns
            + sum(layer.latency_ns.get(plan[layer.name], 0) for layer in self.layers)
            + sum(self.quantizer_ns.get(name, 0) for name in shared)
        )

    def spread(self, plan: Plan) -> dict[str, str]:
        """Return ``plan`` with an entry for every layer, tied ones included."""
        return {name: plan[layer.name] for layer in self.layers for name in layer.layers}

    def plan_loss(self, plan: Plan) -> float:
        """Return the sum of the layers' losses under ``plan``, without cross terms."""
        return sum(layer.loss[plan[layer.name]] for layer in self.layers)

    def fits(self, plan: Plan) -> bool:
        """Return whether ``plan`` is within the budget and the latency limit."""
        in_time = self.max_latency_ns is None or self.plan_ns(plan) <= self.max_latency_ns
        return in_time and self.plan_bytes(plan) <= self.budget_bytes

    def smallest_plan(self) -> dict[str, str]:
        """Return each layer's smallest scheme: nearly the plan of the smallest feasible budget.

        Shared activation scales count for each of their readers. Ties go to the smaller loss.
        """

        def smallest(layer: LayerChoice) -> str:
            sizes = {s: layer.bytes[s] + sum(layer.quantizers(s).values()) for s in layer.bytes}
            return min(sizes, key=lambda s: (sizes[s], layer.loss[s]))

        return {layer.name: smallest(layer) for layer in self.layers}

    def without_branches(self) -> Problem:
        """Return the problem without branches, except for layers that have no other scheme."""
        plain = [[s for s in n.bytes if not SCHEMES[s].branch] or n.bytes for n in self.layers]
        return replace(self, layers=[n.only(schemes) for n, schemes in zip(self.layers, plain)])

    def with_losses(self, losses: Mapping[str, Mapping[str, float]]) -> Problem:
        """Return the problem with other losses: layer -> scheme -> loss."""
        return replace(
            self,
            layers=[
                replace(n, loss={s: sum(losses[one][s] for one in n.layers) for s in n.bytes})
                for n in self.layers
            ],
        )


@dataclass(frozen=True)
class Objective:
    """What a plan minimizes: the sum of ``costs`` (layer -> scheme -> cost) and of ``quantizers``.

    ``quantizers``: name of an activation quantizer -> cost, once for all its readers.
    """

    costs: Mapping[str, Mapping[str, float]]
    quantizers: Mapping[str, float] = field(default_factory=dict)

    def of(self, plan: Plan, layers: Sequence[LayerChoice]) -> float:
        """Return the cost of ``layers`` under ``plan``, without the quantizers' cost."""
        return sum(self.costs[layer.name][plan[layer.name]] for layer in layers)

    @classmethod
    def predicted_loss(cls, problem: Problem, kernel_penalty: float = 0.0) -> Objective:
        """Minimize the predicted loss, plus ``kernel_penalty`` for every branch kernel."""
        costs = {}
        for layer in problem.layers:
            costs[layer.name] = {
                s: loss + kernel_penalty * layer.kernels(s) for s, loss in layer.loss.items()
            }
        return cls(costs)

    @classmethod
    def size(cls, problem: Problem) -> Objective:
        """Minimize bytes."""
        shared: dict[str, int] = {}
        for layer in problem.layers:
            for scheme in layer.bytes:
                shared.update(layer.quantizers(scheme))
        return cls({layer.name: layer.bytes for layer in problem.layers}, shared)

    @classmethod
    def latency(cls, problem: Problem) -> Objective:
        """Minimize the nanoseconds of one call."""
        costs = {n.name: {s: n.latency_ns.get(s, 0) for s in n.bytes} for n in problem.layers}
        return cls(costs, problem.quantizer_ns)


# (Layer pattern, the schemes or families that matching layers may take), each.
Rules = Sequence[tuple[str, tuple[str, ...]]]


def protected_schemes(
    layers: Sequence[tuple[str, tuple[str, ...]]], rules: Rules
) -> dict[str, tuple[str, ...]]:
    """Apply protection rules (layer pattern, allowed schemes or families); later rules win.

    ``layers``: (name, candidate schemes). Raises UsageError when a pattern matches no layer, or
    leaves none of a layer's schemes.
    """
    candidates, choices = dict(layers), dict(layers)
    for pattern, allowed in rules:
        matching = [name for name in choices if fnmatch.fnmatchcase(name, pattern)]
        if not matching:
            hint = (
                nearest(pattern, choices) or f"Layers are named like '{next(iter(choices), '')}'."
            )
            raise UsageError(f"The protection rule '{pattern}' matches no layer.", hint)
        for name in matching:
            choices[name] = tuple(
                s for s in candidates[name] if s in allowed or SCHEMES[s].family in allowed
            )
            if not choices[name]:
                raise UsageError(
                    f"The protection rule '{pattern}' leaves no scheme for {name}.",
                    f"It may take {', '.join(candidates[name])}.",
                )
    return choices
