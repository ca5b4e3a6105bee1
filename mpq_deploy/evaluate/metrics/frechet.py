"""The Frechet distance between two sets of features, its interval and its extrapolation.

In: features float64 [N, D] of a network, or the moments of such features. Out: distances, float.
The numerics are our own because the kept libraries (torchmetrics, torch-fidelity) take images
alone: neither shipped statistics nor draws of a bootstrap. They need NumPy only; the tests hold
them against torchmetrics and SciPy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from mpq_deploy.errors import UsageError
from mpq_deploy.models.spec import Array
from mpq_deploy.system.threads import available_cores

# Our choices: draws of the bootstrap for networks up to that many features and beyond (a draw takes
# O(D^3)), its seed.
DRAWS = 200
WIDE_FEATURES = 256
DRAWS_WIDE = 40
SEED = 0
# Images that a condition must have for draws to keep to it, our choice: fewer have no spread of
# their own to speak of.
LEAST_OF_CONDITION = 10
# Two-sided 95 % of the normal distribution.
NORMAL_95 = 1.959964
# Our choices: counts that the extrapolation fits, random subsets of each, and the smallest as a
# share of all images.
COUNTS = 6
SUBSETS = 6
SMALLEST_SHARE = 0.5
# Draws worked on at once, our choice: each holds half a dozen matrices of D x D.
MOST_AT_ONCE = 8
Task = TypeVar("Task")
Made = TypeVar("Made")


@dataclass(frozen=True)
class Moments:
    """Mean [D] and covariance [D, D] (unbiased) of the features of ``count`` images."""

    mean: Array
    covariance: Array
    count: int

    @classmethod
    def of(cls, features: Array) -> Moments:
        """Take them of ``features`` [N, D]; N must be at least 2."""
        found = np.asarray(features, np.float64)
        mean = found.mean(axis=0)
        centred = found - mean
        return cls(mean, centred.T @ centred / (len(found) - 1), len(found))


def minimum_images(width: int) -> int:
    """Return the fewest images whose covariance of ``width`` features has full rank: one more than features."""
    return width + 1


def check_count(count: int, width: int, what: str, network: str) -> None:
    """Refuse fewer images than a covariance takes: a UsageError that says the minimum."""
    minimum = minimum_images(width)
    if count < minimum:
        fewer = (
            ", or use a network with fewer features (demo: 64, for the bundled models)"
            if width > 64
            else ""
        )
        raise UsageError(
            f"{count:,} {what} are too few for the covariance of the {width:,} features of '{network}'.",
            f"Give at least {minimum:,}{fewer}.",
        )


def frechet_distance(a: Moments, b: Moments) -> float:
    """Return |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) (Dowson and Landau 1982), by symmetric eigenvalues."""
    return _distance(a, b, _root(b.covariance))


def _distance(a: Moments, b: Moments, root_of_b: Array) -> float:
    product = np.linalg.eigvalsh(root_of_b @ a.covariance @ root_of_b)
    shared = float(np.sqrt(np.maximum(product, 0)).sum())
    apart = float(np.square(a.mean - b.mean).sum())
    # Rounding may leave a little below zero for equal sets.
    return max(apart + float(np.trace(a.covariance) + np.trace(b.covariance)) - 2 * shared, 0.0)


def _root(covariance: Array) -> Array:
    values, vectors = np.linalg.eigh(covariance)
    return np.asarray((vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T)


@dataclass(frozen=True)
class Spread:
    """Standard errors at this number of images: of the distance, and of what it has above the reference's."""

    distance: float
    increase: float

    @staticmethod
    def around(value: float, error: float) -> tuple[float, float]:
        """Return the 95 % interval around ``value``: the standard normal interval (Efron and Tibshirani 1993, 12)."""
        return value - NORMAL_95 * error, value + NORMAL_95 * error


def strata_of(rows: Array) -> list[Array]:
    """Return the images [n] of each condition in ``rows`` [N], for proportional draws.

    Samples are dealt out to the conditions, not drawn: a draw that mixed the proportions would say
    more spread than other noise brings. Where a condition has fewer than ``LEAST_OF_CONDITION``
    images all are one group.
    """
    groups = [np.flatnonzero(rows == row) for row in np.unique(rows)]
    return groups if min(map(len, groups)) >= LEAST_OF_CONDITION else [np.arange(len(rows))]


def spread_to_reference(
    features: Array, reference: Array, strata: list[Array], real: Moments | None = None
) -> Spread:
    """Bootstrap the distance of ``features`` [N, D] to ``real`` beside that of ``reference``.

    Without ``real`` the distance is that to ``reference`` itself. Images are drawn in pairs, for
    both sets come from the same noise, and within ``strata``; the real images stay as they are.
    Only the spread of the draws is used: their centre is shifted upwards, since a draw with
    repetitions has fewer different images (Efron 1979; draws and seed are our choice). For the same
    reason the spread is too wide rather than too narrow: by a fifth to a half at four images per
    feature, in simulation.
    """
    generator = np.random.default_rng(SEED)
    root = None if real is None else _root(real.covariance)
    draws = [
        np.concatenate([group[generator.integers(0, len(group), len(group))] for group in strata])
        for _ in range(DRAWS if features.shape[1] <= WIDE_FEATURES else DRAWS_WIDE)
    ]

    def measured(drawn: Array) -> tuple[float, float]:
        ours, others = Moments.of(features[drawn]), Moments.of(reference[drawn])
        if real is None or root is None:
            distance = frechet_distance(ours, others)
            return distance, distance
        distance = _distance(ours, real, root)
        return distance, distance - _distance(others, real, root)

    distances, increases = np.std(np.array(_side_by_side(measured, draws)), axis=0, ddof=1)
    return Spread(float(distances), float(increases))


def _side_by_side(work: Callable[[Task], Made], tasks: Iterable[Task]) -> list[Made]:
    """Return ``work`` of each task, in their order, a core each.

    BLAS has one thread meanwhile: its threads wait for each other at every step of an eigenvalue
    problem, so that small ones took eighty times as long on a machine with other work. Nor do
    values then depend on the number of cores.
    """
    from threadpoolctl import ThreadpoolController

    with (
        ThreadpoolController().limit(limits=1, user_api="blas"),
        ThreadPoolExecutor(min(available_cores(), MOST_AT_ONCE)) as pool,
    ):
        return list(pool.map(work, tasks))


def extrapolated(features: Array, strata: list[Array], real: Moments) -> float | None:
    """Return the distance extrapolated to infinitely many images; None for too few images.

    The bias of a Frechet distance falls as 1/N: a straight line through the distances at several
    counts, at 1/N = 0 (Chong and Forsyth 2020, arXiv 1911.07023). Subsets keep the proportions of
    ``strata``. The real images keep their number, and so their share of the bias. Can fall below
    zero, as fits do.
    """
    count, width = features.shape
    smallest = int(SMALLEST_SHARE * count)
    if smallest < minimum_images(width):
        return None
    generator = np.random.default_rng(SEED)
    root = _root(real.covariance)
    subsets = []
    for inverse in np.linspace(1 / smallest, 1 / count, COUNTS):
        share = 1 / inverse / count
        for _ in range(SUBSETS if share < 1 else 1):
            subsets.append(
                np.concatenate(
                    [generator.permutation(group)[: round(share * len(group))] for group in strata]
                )
            )
    distances = _side_by_side(
        lambda taken: _distance(Moments.of(features[taken]), real, root), subsets
    )
    return float(np.polyfit([1 / len(taken) for taken in subsets], distances, 1)[1])
