"""Residual outlier branches: which part of a layer gets more precision, and the weights that body and branch hold.

``rows``: the salient output channels leave the INT4 body and are stored in INT8 (MPQ-DM promotes such channels by a
bit; the deployable form is ours). ``lowrank``: two FP16 factors beside the INT4 body take the largest part of what its
rounding destroys, as the layer's input sees it (after SVDQuant, which splits the weight before rounding; ours).
``cols``: the outlier input channels go through a Gather and a small FP16 product, so that the INT8 activation's scale
need not reach them. ``scale``: channels of the input are multiplied by factors that even out their ranges, and the
weight's divided by them (MPQ-DM's pre-scaling, as SmoothQuant's).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mpq_deploy.models.spec import Array
from mpq_deploy.rounding.quantizers import QuantizedMatrix, damped


@dataclass(frozen=True)
class RowsMatrix:
    """An INT4 body and INT8 rows for the output channels ``rows`` (int32 [m], rising).

    ``every_body`` and ``every_int8`` hold all O channels in either form, and are shared with other schemes: what is
    deployed is cut out of them when it is asked for.
    """

    every_body: QuantizedMatrix
    every_int8: QuantizedMatrix
    rows: Array

    @property
    def body(self) -> QuantizedMatrix:
        """The other channels in their order, [O - m, K]."""
        return _rows_of(self.every_body, self._others)

    @property
    def promoted(self) -> QuantizedMatrix:
        """The promoted channels, [m, K]."""
        return _rows_of(self.every_int8, self.rows)

    @property
    def order(self) -> Array:
        """Where each output channel lies when the promoted ones follow the body, int32 [O]."""
        return np.argsort(np.concatenate([self._others, self.rows])).astype(np.int32)

    @property
    def _others(self) -> Array:
        return np.setdiff1d(np.arange(len(self.every_body.codes)), self.rows)

    def dequantize(self) -> Array:
        """Return the deployed weight, float32 [O, K]."""
        whole = self.every_body.dequantize()
        whole[self.rows] = self.promoted.dequantize()
        return whole


@dataclass(frozen=True)
class ColsMatrix:
    """A body whose columns of the input channels ``columns`` (int32 [n], rising) are zero, and their FP16 weights.

    ``weight`` float16 [O, n * taps] holds those columns, ``taps`` of each channel together.
    """

    body: QuantizedMatrix
    weight: Array
    columns: Array

    def dequantize(self) -> Array:
        """Return the deployed weight, float32 [O, K]."""
        whole = self.body.dequantize()
        taps = self.weight.shape[1] // len(self.columns)
        whole[:, columns_of(self.columns, taps)] = self.weight.astype(np.float32)
        return whole


@dataclass(frozen=True)
class ScaledMatrix:
    """A body: the weight divided by the ``factors`` float16 [C] by which the input's channels are multiplied."""

    body: QuantizedMatrix
    factors: Array

    def dequantize(self) -> Array:
        """Return the weight that acts on the input as it was, float32 [O, K]."""
        taps = self.body.codes.shape[1] // len(self.factors)
        return np.asarray(self.body.dequantize() * by_column(self.factors, taps), np.float32)


def by_column(factors: Array, taps: int) -> Array:
    """Return the factors of the input channels for each column of the weight matrix, float32 [C * taps]."""
    return np.repeat(factors.astype(np.float32), taps)


def rescaled(weight: Array, moments: list[Array], columns: Array) -> tuple[Array, list[Array]]:
    """Return the weight [O, K] and the Hessian's diagonal blocks once the input is multiplied by ``columns`` [K]."""
    scaled, start = [], 0
    for block in moments:
        part = columns[start : start + len(block)]
        scaled.append(block * np.outer(part, part).astype(block.dtype))
        start += len(block)
    return weight / columns, scaled


def scale_factors(weight_amax: Array, input_amax: Array, share: float) -> Array:
    """Return by what to multiply each input channel so that its range and that of its weights meet, float16 [C].

    With ``share`` a in [0, 1] the factors are max|W_c|^(1-a) / max|X_c|^a, brought to a geometric mean of 1: for
    a = 0.5 MPQ-DM's delta = sqrt(max|W_c| / max|X_c|) (arXiv 2412.11549 and its published code) but for that mean,
    which the scales take up. Channels that are zero on either side keep 1. Bounded to 2^-10 .. 2^10, so that FP16
    holds both the factors and what they make (our choice).
    """
    usable = (weight_amax > 0) & (input_amax > 0)
    logs = np.zeros(len(usable))
    logs[usable] = (1 - share) * np.log2(weight_amax[usable]) - share * np.log2(input_amax[usable])
    logs[usable] -= logs[usable].mean() if usable.any() else 0.0
    return np.asarray(np.exp2(np.clip(logs, -10, 10)), np.float16)


def columns_of(channels: Array, taps: int) -> Array:
    """Return the columns of the weight matrix that multiply the input ``channels``, ``taps`` for each."""
    return np.asarray((channels[:, None] * taps + np.arange(taps)).reshape(-1))


def without_columns(weight: Array, moments: list[Array], columns: Array) -> tuple[Array, list[Array]]:
    """Return the weight [O, K] and the Hessian's diagonal blocks as the body sees them when ``columns`` are taken out.

    The branch leaves no error in those columns, so the others must not be rounded to make up for one.
    """
    rest = weight.copy()
    rest[:, columns] = 0
    kept, start = [], 0
    for block in moments:
        inside = columns[(columns >= start) & (columns < start + len(block))] - start
        cut = np.array(block)
        cut[inside], cut[:, inside] = 0, 0
        kept.append(cut)
        start += len(block)
    return rest, kept


def beside_body(body: QuantizedMatrix, weight: Array, channels: Array, taps: int) -> ColsMatrix:
    """Put the FP16 columns of ``weight`` [O, K] for the input ``channels`` (rising) beside a ``body`` without them."""
    return ColsMatrix(body, weight[:, columns_of(channels, taps)].astype(np.float16), channels)


@dataclass(frozen=True)
class LowRankMatrix:
    """An INT4 body beside two FP16 factors: ``up`` float16 [O, r] times ``down`` float16 [r, K]."""

    body: QuantizedMatrix
    down: Array
    up: Array

    def dequantize(self) -> Array:
        """Return the deployed weight, float32 [O, K]."""
        product = self.up.astype(np.float32) @ self.down.astype(np.float32)
        return np.asarray(self.body.dequantize() + product, np.float32)


def promote_rows(body: QuantizedMatrix, int8: QuantizedMatrix, rows: Array) -> RowsMatrix:
    """Take the output channels ``rows`` from ``int8`` and the others from ``body``; both hold the whole weight."""
    return RowsMatrix(body, int8, np.sort(np.asarray(rows, np.int32)))


def _rows_of(matrix: QuantizedMatrix, rows: Array) -> QuantizedMatrix:
    channel = None if matrix.channel_scale is None else matrix.channel_scale[rows]
    return QuantizedMatrix(matrix.codes[rows], matrix.scale[rows], channel)


def low_rank_factors(error: Array, moments: list[Array], damping: float, rank: int) -> tuple[Array, Array]:
    """Return FP16 factors (down [r, K], up [O, r]) whose product is nearest to ``error`` float32 [O, K].

    Nearest in the error of the layer's output: with H = L L^T (the mean of x x^T, damped, given as its diagonal blocks
    ``moments``) the singular vectors are those of error L, so that |(error - up down) L| is least for this rank.
    """
    roots = [np.linalg.cholesky(damped(block, damping)) for block in moments]
    cuts = np.cumsum([len(root) for root in roots])[:-1]
    parts = np.split(error.astype(np.float64), cuts, axis=1)
    seen = np.concatenate([part @ root for part, root in zip(parts, roots)], axis=1)
    # The left singular vectors from the small Gram matrix; projecting on them is the best factorisation.
    _, vectors = np.linalg.eigh(seen @ seen.T)
    up = vectors[:, ::-1][:, :rank]
    # Signs of eigenvectors are free: fixed here, so that equal inputs give equal bytes.
    up = up * np.where(up[np.abs(up).argmax(axis=0), np.arange(up.shape[1])] < 0, -1.0, 1.0)
    down = up.T @ error.astype(np.float64)
    # Both factors of equal size: FP16 keeps the same precision of either.
    size = np.sqrt(np.maximum(np.linalg.norm(down, axis=1), np.finfo(np.float16).tiny))
    return (down / size[:, None]).astype(np.float16), (up * size).astype(np.float16)


def row_kurtosis(weight: Array, input_amax: Array) -> Array:
    """Return the Pearson kurtosis of each row of ``weight`` [O, K] after MPQ-DM's pre-scaling, float64 [O].

    ``input_amax`` float [K]: the input's absolute maximum per column. The weight is divided by
    delta_k = sqrt(max|W_k| / max|X_k|); columns that are zero on either side keep their scale. A constant row has
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
