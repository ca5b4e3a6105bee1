"""KID, the kernel distance between two sets of features, by torchmetrics."""

from __future__ import annotations

import importlib.util

import numpy as np

from mpq_deploy.models.spec import Array

# The paper's block size: beyond it the mean over seeded subsets stands for the quadratic whole.
SUBSET = 1000
SUBSETS = 100
SEED = 0


def kernel_distance(a: Array, b: Array) -> float | None:
    """Return the unbiased squared MMD of ``a`` [N, D] and ``b`` [M, D] with a cubic kernel.

    Binkowski et al. 2018 (arXiv 1801.01401), section 4. Up to ``SUBSET`` images all are taken at
    once, so that nothing is drawn. Unbiased, so it may lie below zero; it needs no covariance.
    """
    if any(importlib.util.find_spec(name) is None for name in ("torch", "torchmetrics")):
        return None
    import warnings

    import torch
    from torchmetrics.image.kid import KernelInceptionDistance

    size = min(len(a), len(b), SUBSET)
    everything = len(a) == len(b) == size
    # torchmetrics takes a network for its images: here the features are given, and the network is
    # the identity.
    identity = torch.nn.Identity()
    identity.num_features = a.shape[1]
    with warnings.catch_warnings():
        # It warns that it keeps the features, which are held here anyway.
        warnings.filterwarnings(
            "ignore", message=".*will save all extracted features in buffer", category=UserWarning
        )
        metric = KernelInceptionDistance(
            feature=identity, subsets=1 if everything else SUBSETS, subset_size=size
        )
    metric.update(torch.from_numpy(np.asarray(a, np.float64)), real=True)
    metric.update(torch.from_numpy(np.asarray(b, np.float64)), real=False)
    # It draws subsets from the global generator; what others draw from it stays as it was.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return float(metric.compute()[0])
