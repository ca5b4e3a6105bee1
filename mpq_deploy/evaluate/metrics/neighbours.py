"""Precision and recall of generated images by nearest neighbours in feature space."""

from __future__ import annotations

import numpy as np

from mpq_deploy.models.spec import Array

# Kynkaanniemi et al. 2019, "Improved precision and recall metric", section 3.1.
NEIGHBOURS = 3
CHUNK = 1024


def precision_recall(generated: Array, real: Array) -> tuple[float, float]:
    """Return precision and recall of ``generated`` [N, D] against ``real`` [M, D], each in [0, 1].

    Kynkaanniemi et al. 2019 (arXiv 1904.06991), equations 1 and 2: precision is the share of
    generated images within the radius of a real one, its distance to its third nearest neighbour
    among the real; recall the other way round. N and M must be above 3.
    """
    return _covered(generated, real), _covered(real, generated)


def _covered(points: Array, support: Array) -> float:
    """Return the share of ``points`` that lie within the radius of any of ``support``."""
    # A point is its own nearest neighbour, at distance zero.
    radii = np.concatenate(
        [
            np.partition(part, NEIGHBOURS, axis=1)[:, NEIGHBOURS]
            for part in _squares(support, support)
        ]
    )
    inside = [(part <= radii).any(axis=1) for part in _squares(points, support)]
    return float(np.concatenate(inside).mean())


def _squares(a: Array, b: Array) -> list[Array]:
    """Return the squared distances [<= CHUNK, M] between the rows of ``a`` and of ``b``, in parts."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    norms = np.square(b).sum(axis=1)
    parts = []
    for start in range(0, len(a), CHUNK):
        rows = a[start : start + CHUNK]
        squares = np.square(rows).sum(axis=1)[:, None] + norms - 2 * rows @ b.T
        parts.append(np.maximum(squares, 0))
    return parts
