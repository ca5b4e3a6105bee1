"""MPQ-Diff's layer importance from Gram matrices (arXiv 2412.00144; OMPQ, arXiv 2109.07865).

In: for every layer i the Gram matrix of its outputs over the N calls of a batch, G_i = F_i F_i^T
with F_i of shape [N, d_i]. Out: at each timestep the orthogonality matrix ORM [L, L] (linear
centred kernel alignment, CKA) and each layer's importance theta; and the weight of each timestep.

Sources: ORM, theta = exp(-beta gamma) and the mean of theta over a layer and all later layers are
as in OMPQ's published code. MPQ-Diff weights uniformly sampled timesteps exponentially but gives no
formula: both aggregations here are our readings. Dividing gamma by L - 1 is our choice. The
debiased estimator is HSIC_1 of Song et al. 2012; averaging it over batches is from Nguyen et al.
2021 (arXiv 2010.15327).
"""

from __future__ import annotations

import numpy as np

from mpq_deploy.errors import UsageError
from mpq_deploy.models.spec import Array
from mpq_deploy.recipe import Aggregation, Estimator, Reach

# HSIC_1 divides by N (N - 3). With two calls every biased ORM is 1, whatever the layers compute.
MIN_CALLS = {"biased": 3, "debiased": 4}
# With fewer calls the biased estimator is near 1 even for unrelated layers, and the debiased one is
# mostly noise.
ENOUGH_CALLS = 8


def centred(grams: Array) -> Array:
    """Return H G H with H = I - 11^T / N, for Gram matrices float64 [..., N, N]."""
    rows = grams - grams.mean(axis=-2, keepdims=True)
    return np.asarray(rows - rows.mean(axis=-1, keepdims=True))


def u_centred(grams: Array) -> Array:
    """Return the U-centred Gram matrices [..., N, N] (Székely and Rizzo 2014).

    The diagonal is set to 0, and the rest is centred so that every row sums to 0. HSIC_1 is the
    inner product of two such matrices over N (N - 3). Raises ValueError for N below 4.
    """
    count = grams.shape[-1]
    if count < MIN_CALLS["debiased"]:
        raise ValueError(f"The debiased estimator needs 4 calls or more, not {count}.")
    off = ~np.eye(count, dtype=bool)
    bare = np.where(off, grams, 0.0)
    rows = bare.sum(axis=-1, keepdims=True) / (count - 2)
    columns = bare.sum(axis=-2, keepdims=True) / (count - 2)
    total = bare.sum(axis=(-2, -1), keepdims=True) / ((count - 1) * (count - 2))
    return np.asarray(np.where(off, bare - rows - columns + total, 0.0))


def dependence(grams: Array, estimator: Estimator) -> Array:
    """Return the HSIC of all pairs of layers, float64 [L, L], from their Gram matrices [L, N, N].

    "biased": <H G_i H, H G_j H> / (N - 1)^2. "debiased": HSIC_1, whose expectation is 0 for
    independent layers. HSIC may be summed over batches before ``orthogonality`` takes the ratio.
    """
    count = grams.shape[-1]
    biased = estimator == "biased"
    flat = (centred(grams) if biased else u_centred(grams)).reshape(len(grams), -1)
    return np.asarray(flat @ flat.T / ((count - 1) ** 2 if biased else count * (count - 3)))


def orthogonality(hsic: Array) -> Array:
    """Return ORM [..., L, L], symmetric with 1 on the diagonal, from (sums of) HSIC [..., L, L].

    ORM_ij = HSIC_ij / sqrt(HSIC_ii HSIC_jj): in [0, 1] when biased, in [-1, 1] when debiased. A
    layer whose outputs do not differ between calls (HSIC_ii = 0) is orthogonal to all others: 0
    (our choice).
    """
    norms = np.sqrt(np.clip(np.diagonal(hsic, axis1=-2, axis2=-1), 0, None))
    scale = norms[..., :, None] * norms[..., None, :]
    # HSIC_ij and HSIC_ji may round differently; their mean is exactly symmetric.
    even = (hsic + np.swapaxes(hsic, -2, -1)) / 2
    orm = np.clip(np.divide(even, scale, out=np.zeros_like(even), where=scale > 0), -1, 1)
    return np.asarray(np.where(np.eye(hsic.shape[-1], dtype=bool), 1.0, orm))


def gamma(orm: Array) -> Array:
    """Return gamma [..., L]: the mean of ORM_ij over the L - 1 other layers j (0 for L = 1).

    OMPQ takes the sum. With the mean, one beta suits networks of any depth (our choice).
    """
    others = orm.shape[-1] - 1
    return np.asarray((orm.sum(axis=-1) - 1) / max(others, 1))


def importances(gammas: Array, beta: float, reach: Reach = "layer") -> Array:
    """Return theta = exp(-beta gamma), [..., L]; "later": its mean over a layer and all after it.

    ``gammas`` [..., L] with the layers in graph order. Raises UsageError when beta is so large that
    every theta is 0.
    """
    theta = np.asarray(np.exp(-beta * gammas))
    if not np.all(theta.max(axis=-1) > 0):
        raise UsageError(
            f"With measure.orm.beta {beta:g} every layer's importance is 0.",
            f"Choose a beta below {700 / max(float(gammas.max()), 1e-3):.0f}.",
        )
    if reach == "layer":
        return theta
    reverse = np.cumsum(theta[..., ::-1], axis=-1)[..., ::-1]
    return np.asarray(reverse / np.arange(theta.shape[-1], 0, -1))


def timestep_weights(shares: Array, aggregation: Aggregation, eta: float) -> Array:
    """Return the weight of each sampled timestep, float64 [K], of sum 1.

    ``shares`` [K]: the part of the trajectory that each timestep stands for, in denoising order;
    1 / K when they are sampled uniformly. "mean": the shares themselves. "exponential": the shares
    times exp(eta p), where p in [0, 1] is the middle of the timestep's share in denoising order;
    with equal shares that is exp(eta k / K) up to a constant. Both are our readings of MPQ-Diff.
    """
    parts = np.asarray(np.asarray(shares, np.float64) / np.sum(shares))
    if aggregation == "mean":
        return parts
    position = np.cumsum(parts) - parts / 2
    # The largest exponent is 0: no eta overflows.
    weights = parts * np.exp(eta * position - np.max(eta * position))
    return np.asarray(weights / weights.sum())
