"""Metrics that weigh bits: from the importance of each layer to a table for the allocation.

The loss of scheme s of layer i is c_i (16 - b_s): the bits that it does not give, weighted by the
layer's importance. Over plans with one scheme per layer, the sum of losses is 16 sum_i c_i less
sum_i c_i b_{s_i}; so the MILP, which minimizes it within the bytes (n_i b_i, scales and all),
maximizes sum_i c_i b_i over the real schemes. The number of weights n_i stands in the budget and
not in the benefit, as in the linear program that the papers solve (arXiv 2412.00144, 2109.07865).

Nothing in such a loss knows how large an error is: it ranks layers and predicts no error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from mpq_deploy.calibrate.activation_shapes import activation_shapes
from mpq_deploy.formats.scheme import Scheme
from mpq_deploy.graph.layers import Layer
from mpq_deploy.models.spec import Array
from mpq_deploy.recipe import Bits, OrmSettings
from mpq_deploy.sensitivity.bit_program import chosen_bits
from mpq_deploy.sensitivity.orthogonality import timestep_weights
from mpq_deploy.sensitivity.subject import Subject
from mpq_deploy.sensitivity.table import Importance, SensitivityTable, table_from_losses

FULL_BITS = 16
INT8_BITS = 8


def table_from_importance(
    metric: str, subject: Subject, theta: Array, notes: tuple[str, ...] = ()
) -> SensitivityTable:
    """Return the table of ``theta`` [K, L]: losses whose mean over timesteps is c_i (16 - b_s)."""
    layers, options, timesteps = subject.layers, subject.settings.orm, subject.calibration.timesteps
    shapes = activation_shapes(subject.graph, subject.recorded, subject.talk)
    elements = np.array(
        [sum(shapes[name].elements for name in n.inputs) for n in layers], np.float64
    )
    steps = len(timesteps)
    shares = np.full(steps, 1 / steps) if subject.shares is None else np.asarray(subject.shares)
    weights = timestep_weights(shares, options.aggregation, options.eta)
    schemes = [subject.candidates[layer.name].schemes for layer in layers]
    fixed = activation_bits(schemes, weights @ theta, elements, options)
    losses = {}
    for i, layer in enumerate(layers):
        missing = {
            scheme.name: FULL_BITS - scheme_bits(layer, scheme, options.bits)
            for scheme in schemes_at(schemes[i], int(fixed[i]))
        }
        losses[layer.name] = {
            name: steps * weights * theta[:, i] * bits for name, bits in missing.items()
        }
    note = (
        f"the metric '{metric}' weighs bits by the layers' importance: it does not predict an error"
    )
    constant = np.zeros((steps, len(layers)), bool)
    importance = Importance(
        tuple(n.name for n in layers), timesteps, weights, theta, constant, fixed
    )
    return replace(
        table_from_losses(metric, timesteps, losses, (note, *notes)), importance=importance
    )


def scheme_bits(layer: Layer, scheme: Scheme, bits: Bits) -> float:
    """Return b of a scheme: its weights' nominal bits, or the deployed bits per weight, at most 16.

    Nominal bits are the mean over the weights: INT8 rows and FP16 columns of a branch count as
    such; a low-rank branch corrects weights without widening them, and counts as nothing (our
    choice).
    """
    if bits == "nominal" or not scheme.quantized:
        return scheme.branch.nominal_bits(layer, scheme.weight.bits)
    # Scales of a tiny reduction can take more than the weights: no more precision than FP16.
    return min(8 * scheme.weight_bytes(layer) / layer.weights, float(FULL_BITS))


def activation_bits(
    schemes: Sequence[tuple[Scheme, ...]], importance: Array, elements: Array, options: OrmSettings
) -> Array:
    """Return the bits that each layer's activations are fixed at, int64 [L]; 0: no choice.

    A layer has the choice when some of its quantized schemes have INT8 activations and some have
    not. With "program": maximize sum c_i a_i over a_i in {8, 16} subject to sum m_i a_i <=
    ``activation_budget`` sum m_i, with m_i = ``elements`` of its inputs, over the layers that have
    the choice (our reading).
    """
    free = np.array(
        [len({s.activation is None for s in row if s.quantized}) == 2 for row in schemes], bool
    )
    bits = np.zeros(len(schemes), np.int64)
    if options.activation_bits != "program":
        bits[free] = INT8_BITS if options.activation_bits == "int8" else FULL_BITS
    elif free.any():
        budget = options.activation_budget * float(elements[free].sum())
        choices = [(INT8_BITS, FULL_BITS)] * int(free.sum())
        bits[free] = chosen_bits(importance[free], elements[free], choices, budget).bits.astype(
            np.int64
        )
    return bits


def schemes_at(schemes: tuple[Scheme, ...], bits: int) -> tuple[Scheme, ...]:
    """Return the schemes whose activations have ``bits`` (0: all), and FP16 weights."""
    if not bits:
        return schemes
    return tuple(
        s for s in schemes if not s.quantized or (s.activation is None) == (bits == FULL_BITS)
    )
