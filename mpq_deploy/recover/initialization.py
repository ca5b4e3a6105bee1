"""Initialize adapters: at zero, or from the plan's quantization error.

Our reading of MPQ-DMv2's "object-oriented low-rank initialization ... use prior quantization
error": with E = W - Q(W) ~ U S V^T the adapter starts as g U_r S_r V_r^T. The adapter is inside the
quantizer, so the best gain g is not known beforehand: it is the one of {0, 0.5, 1, -0.5, -1} with
the minimum error of the layer's output. 0 is EfficientDM's start, so no layer gets worse.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from mpq_deploy.recover.student import Student
from mpq_deploy.recover.trained_weights import LayerWeight

Tensor = Any  # torch.Tensor; torch is not followed by mypy here
GAINS = (0.0, 0.5, 1.0, -0.5, -1.0)


def initialize_from_error(
    student: Student, calls: Sequence[Mapping[str, Tensor]]
) -> Counter[float]:
    """Start adapters from their layer's quantization error if that helps; count layers by gain.

    ``calls``: feeds of the float model; each layer's output error is measured on its float inputs.
    """
    factors = [_factors(weight) for weight in student.layer_weights]
    errors = np.zeros((len(factors), len(GAINS)))
    for feeds in calls:
        student.observe(
            feeds, partial(_add_errors, student, factors, (errors, student.timesteps(feeds)))
        )
    chosen: Counter[float] = Counter()
    for weight, pair, row in zip(student.layer_weights, factors, errors, strict=True):
        # Of equal errors the first gain, 0.
        gain = GAINS[int(np.argmin(row))] if np.isfinite(row).all() else 0.0
        chosen[gain] += 1
        if gain:
            weight.adapter.start_from(gain * pair[0], pair[1])
    return chosen


def _factors(weight: LayerWeight) -> tuple[Tensor, Tensor]:
    """Return U sqrt(S) [O, r] and sqrt(S) V^T [r, K] of the layer's quantization error."""
    rank = (
        weight.adapter.up.shape[1] if weight.adapter.down is not None else min(weight.target.shape)
    )
    with torch.no_grad():
        error = (
            torch.from_numpy(weight.target)
            - weight.through(torch.zeros_like(weight.adapter())).cpu()
        )
        u, s, v = torch.linalg.svd(error, full_matrices=False)
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * v[:rank]


def _add_errors(
    student: Student,
    factors: list[tuple[Tensor, Tensor]],
    totals: tuple[Any, Tensor | None],
    number: int,
    node: str,
    inputs: list[Any],
) -> None:
    """Add the squared output error of layer ``number`` under every gain to its row of errors.

    ``totals``: the errors [layers, gains] and the timesteps of the calls.
    """
    errors, timesteps = totals
    weight = student.layer_weights[number]
    up, down = (factor.to(inputs[1].device) for factor in factors[number])
    exact = student.graph.apply(node, inputs)
    found = []
    for gain in GAINS:
        quantized = weight.folded(weight.through(gain * (up @ down)))
        read = student.rewired(node, quantized, inputs, True, timesteps)
        output = student.graph.apply(node, read)
        found.append((output - exact).double().square().sum())
    errors[number] += torch.stack(found).cpu().numpy()
