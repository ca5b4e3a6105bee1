"""MPQ-Diff's metric and its two controls as tables for the allocation (arXiv 2412.00144; METHODS marks in brackets).

The loss of scheme s of layer i is c_i (16 - b_s): the bits that it does not give, weighted by the layer's importance.
Over plans with one scheme per layer, the sum of losses is 16 sum_i c_i less sum_i c_i b_{s_i}; so the MILP, which
minimises it within the bytes (n_i b_i, scales and all), maximises sum_i c_i b_i over the real schemes. The number of
weights n_i stands in the budget and not in the benefit, as in the linear program that the papers solve.

Nothing in such a loss knows how large an error is: it ranks layers and predicts no error of the output. Two controls
show what the ranking is worth: ``size-only`` gives every layer the importance 1, so that only sizes decide (the
published OMPQ allocations can be reproduced like that), ``random`` an importance drawn from the seed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from mpq_deploy.calibrate.activation_shapes import activation_shapes
from mpq_deploy.calibrate.gram import GramGraph
from mpq_deploy.calls.feeds import RecordedCalls
from mpq_deploy.calls.timesteps import adaptive_steps, sampled_steps
from mpq_deploy.errors import UsageError
from mpq_deploy.formats.scheme import Scheme
from mpq_deploy.graph.layers import Layer, LayerGraph
from mpq_deploy.models.spec import Array
from mpq_deploy.recipe import Bits, OrmSettings
from mpq_deploy.sensitivity.bit_program import chosen_bits
from mpq_deploy.sensitivity.layer_weights import CandidateWeights
from mpq_deploy.sensitivity.measured_calls import Calls, MeasureOptions
from mpq_deploy.sensitivity.orthogonality import (
    ENOUGH_CALLS,
    LEAST_CALLS,
    dependence,
    gamma,
    importances,
    orthogonality,
    timestep_weights,
)
from mpq_deploy.sensitivity.subject import Subject
from mpq_deploy.sensitivity.table import Importance, SensitivityTable, table_from_losses
from mpq_deploy.system.progress import Talk
from mpq_deploy.system.sessions import open_session

FULL_BITS = 16
INT8_BITS = 8
# Calls behind a Gram matrix where the options leave the batch to us.
DEFAULT_CALLS = 16


def measure_orm(subject: Subject) -> SensitivityTable:
    """Weigh bits by orthogonality: theta of every layer at every timestep, from ``options.batch_size`` calls at once.

    With more samples than that, the dependence of several batches is averaged (Nguyen et al. 2021). ``stats`` are
    not used. Raises UsageError when the model or the options leave too few calls for one Gram matrix.
    """
    layers = subject.layers
    seen = observe_orthogonality(subject.graph, layers, subject.recorded, subject.options, subject.talk)
    orm = orthogonality(seen.hsic)
    theta = importances(gamma(orm), subject.options.orm.beta, subject.options.orm.importance)
    notes = []
    if seen.calls < ENOUGH_CALLS:
        notes.append(
            f"ORM compares only {seen.calls} calls at a time: below {ENOUGH_CALLS} it says little (the biased "
            "estimator is large for unrelated layers, the debiased one noisy); raise measure.batch_size and "
            "measure.samples"
        )
        subject.talk.warn(notes[0])
    always = int(seen.constant.all(axis=0).sum())
    if always:
        notes.append(
            f"{always} of {len(layers)} layers give the same output for every call at a timestep (the timestep's "
            "embedding and the like): their ORM with every other layer is taken as 0 (our choice)"
        )
    parts = bit_losses(subject)
    return parts.table("orm", theta, tuple(notes), seen.constant, seen.calls, orm)


@dataclass(frozen=True)
class SeenOrthogonality:
    """Sums of HSIC float64 [K, L, L] over batches, which layers were ``constant`` bool [K, L], the least ``calls``."""

    hsic: Array
    constant: Array
    calls: int


def observe_orthogonality(
    graph: LayerGraph,
    layers: tuple[Layer, ...],
    recorded: RecordedCalls,
    options: MeasureOptions,
    talk: Talk,
) -> SeenOrthogonality:
    """Run the calls of every timestep through the graph with Gram observers and add up the dependence."""
    calls = Calls(graph, recorded.spec, recorded.recorded, recorded.conditions, options.samples)
    parts = _batches(calls, options)
    names = tuple(dict.fromkeys(use.output for layer in layers for use in layer.uses))
    shapes = activation_shapes(graph, recorded, talk, names=names)
    observed = GramGraph.of(graph, layers, shapes)
    steps = len(calls.timesteps)
    hsic = np.zeros((steps, len(layers), len(layers)))
    constant = np.ones((steps, len(layers)), bool)
    with open_session(observed.model, talk) as session, talk.bar("orthogonality", steps * calls.count) as advance:
        for step in range(steps):
            for part in parts:
                count = part.stop - part.start
                grams = observed.grams(session, calls.feeds(step, part), count, float(calls.timesteps[step]))
                hsic[step] += dependence(grams, options.orm.estimator)
                constant[step] &= ~grams.any(axis=(1, 2))
                advance(count)
    return SeenOrthogonality(hsic, constant, min(part.stop - part.start for part in parts))


def adapted_steps(
    graph: LayerGraph,
    recorded: RecordedCalls,
    options: MeasureOptions,
    talk: Talk,
    count: int,
    coarse: int,
) -> Array:
    """Choose ``count`` of the calibrated timesteps, denser where a ``coarse`` first pass sees importance change."""
    available = len(recorded.recorded.timesteps)
    first = sampled_steps(available, coarse)
    chosen = replace(recorded, recorded=recorded.recorded.at(first))
    seen = observe_orthogonality(graph, graph.layers, chosen, options, talk)
    curve = importances(gamma(orthogonality(seen.hsic)), options.orm.beta, options.orm.importance)
    return adaptive_steps(curve, first, available, count)


def scheme_bits(layer: Layer, scheme: Scheme, bits: Bits) -> float:
    """Return b of a scheme: its weights' nominal bits, or the deployed bits per weight, at most 16.

    Nominal bits are the mean over the weights: INT8 rows and FP16 columns of a branch count as such; a low-rank branch
    corrects weights without widening them, and counts as nothing (our choice).
    """
    if bits == "nominal" or not scheme.quantized:
        return scheme.branch.nominal_bits(layer, scheme.weight.bits)
    # Scales of a tiny reduction can take more than the weights: that is no more than FP16 in precision.
    return min(8 * scheme.weight_bytes(layer) / layer.weights, float(FULL_BITS))


def _batches(calls: Calls, options: MeasureOptions) -> list[slice]:
    """Split the calls into batches as even as can be, each of at most the batch size."""
    least = LEAST_CALLS[options.orm.estimator]
    size = calls.fixed_batch or min(options.batch_size or DEFAULT_CALLS, calls.count)
    # The debiased estimator of a small rest would be noise: 20 calls in batches of 16 are two of 10.
    bounds = np.linspace(0, calls.count, -(-calls.count // size) + 1).astype(int)
    parts = [slice(int(a), int(b)) for a, b in pairwise(bounds)]
    fewest = min(part.stop - part.start for part in parts)
    if fewest < least:
        fixed = f"the model takes {calls.fixed_batch} at once" if calls.fixed_batch else f"{calls.count} are measured"
        raise UsageError(
            f"ORM compares calls that run together: the {options.orm.estimator} estimator needs {least}, "
            f"here are {fewest} ({fixed}, measure.batch_size is {options.batch_size}).",
            "Export the model with a free batch axis, or take another sensitivity."
            if calls.fixed_batch
            else f"Raise measure.samples and measure.batch_size to {ENOUGH_CALLS} or more.",
        )
    return parts


def bit_losses(subject: Subject) -> BitLosses:
    """Return what turns importances of the subject's layers into a table; observes the shapes of their inputs."""
    shapes = activation_shapes(subject.graph, subject.recorded, subject.talk)
    elements = [sum(shapes[name].elements for name in layer.inputs) for layer in subject.layers]
    timesteps = subject.calibration.timesteps
    return BitLosses(subject.layers, subject.candidates, np.array(elements, np.float64), timesteps, subject.options)


@dataclass(frozen=True)
class BitLosses:
    """What turns importances into a table: the layers with their schemes and input ``elements`` [L]."""

    layers: tuple[Layer, ...]
    candidates: Mapping[str, CandidateWeights]
    elements: Array
    timesteps: Array
    options: MeasureOptions

    def table(
        self,
        metric: str,
        theta: Array,
        notes: tuple[str, ...] = (),
        constant: Array | None = None,
        calls: int = 0,
        orm: Array | None = None,
    ) -> SensitivityTable:
        """Return the table of ``theta`` [K, L]; the mean of its losses over timesteps is c_i (16 - b_s)."""
        options, steps = self.options.orm, len(self.timesteps)
        shares = np.full(steps, 1 / steps) if self.options.shares is None else np.asarray(self.options.shares)
        weights = timestep_weights(shares, options.aggregation, options.eta)
        schemes = [self.candidates[layer.name].schemes for layer in self.layers]
        fixed = activation_bits(schemes, weights @ theta, self.elements, options)
        flat = np.zeros((steps, len(self.layers)), bool)
        found = Importance(
            tuple(layer.name for layer in self.layers),
            self.timesteps,
            weights,
            theta,
            flat if constant is None else constant,
            fixed,
            calls,
            orm,
        )
        losses = {
            layer.name: {
                scheme.name: steps * weights * theta[:, i] * (FULL_BITS - scheme_bits(layer, scheme, options.bits))
                for scheme in kept_schemes(self.candidates[layer.name].schemes, int(fixed[i]))
            }
            for i, layer in enumerate(self.layers)
        }
        said = f"the metric '{metric}' weighs bits by the layers' importance: it does not predict an error"
        table = table_from_losses(metric, self.timesteps, losses, (said, *notes))
        return replace(table, importance=found)


def activation_bits(
    schemes: Sequence[tuple[Scheme, ...]], importance: Array, elements: Array, options: OrmSettings
) -> Array:
    """Return the bits at which each layer's activations are fixed, int64 [L]; 0 where its schemes leave no choice.

    A layer has the choice when some of its quantized schemes have INT8 activations and some have not. With
    "program": maximise sum c_i a_i over a_i in {8, 16} subject to sum m_i a_i <= ``activation_budget`` sum m_i,
    with m_i = ``elements`` of its inputs, over the layers that have the choice [our reading].
    """
    free = np.array([len({s.activation is None for s in row if s.quantized}) == 2 for row in schemes], bool)
    bits = np.zeros(len(schemes), np.int64)
    if options.activation_bits != "program":
        bits[free] = INT8_BITS if options.activation_bits == "int8" else FULL_BITS
        return bits
    if free.any():
        budget = options.activation_budget * float(elements[free].sum())
        choices = [(INT8_BITS, FULL_BITS)] * int(free.sum())
        bits[free] = chosen_bits(importance[free], elements[free], choices, budget).bits.astype(np.int64)
    return bits


def kept_schemes(schemes: tuple[Scheme, ...], fixed: int) -> tuple[Scheme, ...]:
    """Return the schemes whose activations are as ``fixed`` says (0: all); FP16 weights are always among them."""
    if not fixed:
        return schemes
    return tuple(s for s in schemes if not s.quantized or (s.activation is None) == (fixed == FULL_BITS))
