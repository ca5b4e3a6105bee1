"""How well one set of losses orders and predicts another: rank correlation, its error, calibration.

In: losses of the same (layer, scheme) pairs by the truth and by a metric. Out: Spearman's rank
correlation over the layers of a scheme, pooled over schemes, with a bootstrap interval; and the
spread of prediction over truth.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from mpq_deploy.formats.scheme import SCHEMES
from mpq_deploy.models.spec import Array

# Fewer layers have no order worth a correlation.
FEWEST = 3
RESAMPLES = 1000
INTERVAL = (2.5, 97.5)


@dataclass(frozen=True)
class Correlation:
    """Spearman's ``rho`` of ``pairs`` with its 95 % interval; None where losses do not differ."""

    pairs: int
    rho: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Calibration:
    """Prediction over truth: median, 10th and 90th percentile (1 is perfect)."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Compared:
    """Losses of P pairs (``layers``, ``schemes``): ``true`` (above 0) and ``found`` float64 [P]."""

    layers: tuple[str, ...]
    schemes: tuple[str, ...]
    true: Array
    found: Array

    @classmethod
    def of(
        cls,
        pairs: Collection[tuple[str, str]],
        truth: dict[str, dict[str, float]],
        found: dict[str, dict[str, float]],
    ) -> Compared:
        """Take pairs of quantized weights that the metric has a loss for and whose truth is not 0."""
        quantized = [(n, s) for n, s in pairs if SCHEMES[s].quantized]
        kept = [(n, s) for n, s in quantized if truth[n].get(s, 0.0) > 0 and s in found.get(n, {})]
        return cls(
            tuple(n for n, _ in kept),
            tuple(s for _, s in kept),
            np.array([truth[n][s] for n, s in kept], np.float64),
            np.array([found[n][s] for n, s in kept], np.float64),
        )

    def calibration(self) -> Calibration | None:
        """Return the spread of found over true; None without pairs."""
        if not len(self.true):
            return None
        low, middle, high = np.percentile(self.found / self.true, [10, 50, 90])
        return Calibration(float(middle), float(low), float(high))


def ranks(values: Array) -> Array:
    """Return the rank of each value, 1 for the minimum, ties their mean: float64 [N]."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(counts) - (counts - 1) / 2)[inverse.reshape(-1)], np.float64)


def moments(true: Array, found: Array) -> Array:
    """Return the products of centred ranks, float64 [3]: cross, true, found; zeros for too few.

    Ranks are divided by N, so that summed over schemes each counts by its number of layers.
    """
    count = len(true)
    if count < FEWEST:
        return np.zeros(3)
    a, b = (ranks(values) / count - (count + 1) / (2 * count) for values in (true, found))
    return np.array([a @ b, a @ a, b @ b])


def rho_of(total: Array) -> Array:
    """Return the correlation from sums of ``moments`` [..., 3]; NaN where one side does not vary."""
    norm = np.sqrt(total[..., 1] * total[..., 2])
    return np.asarray(
        np.divide(total[..., 0], norm, out=np.full(norm.shape, np.nan), where=norm > 1e-12)
    )


def correlations(
    compared: Compared, classes: dict[str, Collection[str]], seed: int, resamples: int = RESAMPLES
) -> dict[str, Correlation]:
    """Return the rank correlation of each class (name -> schemes), ranked within schemes.

    The interval is a percentile bootstrap over layers: pairs of one layer err together, so a layer
    is drawn with all its pairs. Schemes of fewer than ``FEWEST`` layers do not count.
    """
    schemes = list(dict.fromkeys(compared.schemes))
    layers = {name: number for number, name in enumerate(dict.fromkeys(compared.layers))}
    members = [np.flatnonzero(np.array(compared.schemes) == scheme) for scheme in schemes]
    owner = np.array([layers[name] for name in compared.layers], np.int64)
    plain = np.array(
        [moments(compared.true[rows], compared.found[rows]) for rows in members]
    ).reshape(-1, 3)
    drawn = _resampled(compared, members, owner, len(layers), seed, resamples)
    result = {}
    for name, of_class in classes.items():
        chosen = [
            i
            for i, scheme in enumerate(schemes)
            if scheme in of_class and len(members[i]) >= FEWEST
        ]
        pairs = sum(len(members[i]) for i in chosen)
        rho = float(rho_of(plain[chosen].sum(axis=0)))
        if np.isnan(rho):
            result[name] = Correlation(pairs, None)
            continue
        spread = rho_of(drawn[:, chosen].sum(axis=1))
        low, high = (
            np.percentile(spread[~np.isnan(spread)], INTERVAL)
            if (~np.isnan(spread)).any()
            else (rho, rho)
        )
        result[name] = Correlation(pairs, rho, float(low), float(high))
    return result


def _resampled(
    compared: Compared,
    members: Sequence[Array],
    owner: Array,
    layers: int,
    seed: int,
    resamples: int,
) -> Array:
    """Return the moments of each scheme in every resample, float64 [resamples, schemes, 3]."""
    random = np.random.default_rng(seed)
    drawn = np.zeros((resamples, len(members), 3))
    for number in range(resamples):
        times = (
            np.bincount(random.integers(0, layers, layers), minlength=layers)
            if layers
            else np.zeros(0, int)
        )
        for index, rows in enumerate(members):
            again = np.repeat(rows, times[owner[rows]])
            drawn[number, index] = moments(compared.true[again], compared.found[again])
    return drawn


def scheme_classes(schemes: Collection[str]) -> dict[str, Collection[str]]:
    """Return family -> its schemes among ``schemes``, families in their order."""
    classes: dict[str, list[str]] = {}
    for name, scheme in SCHEMES.items():
        if name in schemes:
            classes.setdefault(scheme.family, []).append(name)
    return dict(classes)
