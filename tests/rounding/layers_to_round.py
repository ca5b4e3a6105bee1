"""Layers with weights and second moments of their inputs, made up."""

from __future__ import annotations

import numpy as np

from mpq_deploy.formats.branches.prescaled import TENTHS
from mpq_deploy.formats.layer_rounding import InputMoments
from mpq_deploy.graph.layers import Layer

Work = tuple[Layer, np.ndarray, InputMoments]


def layer_to_round(layer: Layer, widths: tuple[int, ...], seed: int) -> Work:
    """Return ``layer`` with a weight [O, K] and correlated inputs, in diagonal blocks of ``widths``."""
    random = np.random.default_rng(seed)
    shape = layer.out_channels, layer.reduction
    size = np.exp(random.standard_normal((shape[0], 1)) / 2) / 10
    weight = (random.standard_normal(shape) * size).astype(np.float32)
    blocks = np.zeros((layer.group * len(widths), max(widths), max(widths)), np.float32)
    for block, width in zip(blocks, widths * layer.group, strict=True):
        mixed = random.standard_normal((width, width)) / 3 + np.diag(
            np.exp(random.standard_normal(width))
        )
        rows = random.standard_normal((3 * width, width)) @ mixed
        block[:width, :width] = rows.T @ rows / len(rows)
    channels = layer.reduction // layer.taps * layer.group
    factors = np.exp(random.standard_normal((len(TENTHS), channels)) / 3).astype(np.float16)
    outliers = random.permutation(channels).astype(np.int32)
    amax = np.exp(random.standard_normal(layer.reduction)) if layer.group == 1 else None
    return layer, weight, InputMoments(blocks, widths, outliers, factors, amax)


def hessian_error(work: Work, deployed: np.ndarray) -> float:
    """Return the sum of e H e^T over the rows, e being what ``deployed`` [O, K] differs by."""
    layer, weight, inputs = work
    error = (weight - deployed).astype(np.float64)
    total = 0.0
    for rows, blocks in zip(
        np.split(error, layer.group), np.split(inputs.blocks, layer.group), strict=True
    ):
        start = 0
        for block, width in zip(blocks, inputs.widths, strict=True):
            part = rows[:, start : start + width]
            total += float(np.einsum("ok,kj,oj->", part, block[:width, :width], part))
            start += width
    return total
