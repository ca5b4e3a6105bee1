"""Metrics that weigh bits: make a sensitivity table from one importance per layer.

The loss of scheme s of layer i is c_i (16 - b_s), with the layer's importance c_i and the scheme's
bits per weight b_s. A plan has one scheme per layer, so its summed loss is 16 sum_i c_i minus
sum_i c_i b_{s_i}. The allocation MILP minimizes that sum within the exact bytes (scales included)
and thereby maximizes sum_i c_i b_{s_i}. The number of weights n_i enters the budget and not the
benefit, as in the papers' linear program (arXiv 2412.00144, 2109.07865).

These losses contain no quantization error: they rank layers and do not predict an output error.
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
    """Return the table whose losses, averaged over timesteps, are c_i (16 - b_s).

    ``theta`` [K, L]: importance of each layer at each timestep; c is its weighted mean over K.
    Schemes that the fixed activation bits rule out get no loss.
    """
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
    """Return b_s, the bits per weight of ``scheme``, at most 16.

    ``bits`` "nominal": the mean bit width of the weights, where a branch's INT8 rows and FP16
    columns count with 8 and 16 bits and a low-rank branch adds nothing (our choice). Otherwise the
    deployed bytes, scales included.
    """
    if bits == "nominal" or not scheme.quantized:
        return scheme.branch.nominal_bits(layer, scheme.weight.bits)
    # With a tiny reduction the scales can take more bytes than the weights.
    return min(8 * scheme.weight_bytes(layer) / layer.weights, float(FULL_BITS))


def activation_bits(
    schemes: Sequence[tuple[Scheme, ...]], importance: Array, elements: Array, options: OrmSettings
) -> Array:
    """Return the bits at which each layer's activations are fixed, int64 [L]; 0: no choice.

    A layer has a choice when it has quantized schemes with 8-bit and with float activations.
    "program" maximizes sum c_i a_i over those layers, with a_i in {8, 16}, subject to
    sum m_i a_i <= ``activation_budget`` sum m_i. c: ``importance`` [L]; m: ``elements`` [L] of each
    layer's inputs (our reading of the papers).
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
    """Return the schemes whose activations have ``bits`` (0: any), and the unquantized scheme."""
    if not bits:
        return schemes
    return tuple(
        s for s in schemes if not s.quantized or (s.activation is None) == (bits == FULL_BITS)
    )
