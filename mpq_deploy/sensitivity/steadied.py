"""Losses of smaller variance from the same backward passes.

The square of one projection is a draw of a chi-squared variable with one degree of freedom times
the loss: from few entries a solver that chooses among dozens of schemes takes those that the noise
flatters. The sum B of the squares of the projection's parts (``torch_projection``) hardly varies,
but misses what the parts' errors do together. So the ratio r = A / B of both estimates is pooled
over the schemes of a layer, and each scheme's own ratio counts by how much ratios differ beyond
their noise (empirical Bayes, as James and Stein): with many entries A decides, with few B does.
Our choice.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from mpq_deploy.formats.scheme import SCHEMES
from mpq_deploy.models.spec import Array
from mpq_deploy.sensitivity.table import Nested, SensitivityTable


@dataclass(frozen=True)
class _Ratios:
    """The schemes of one layer of one kind: ratios r [S], and the variance of each one's noise [S]."""

    layer: str
    schemes: tuple[str, ...]
    ratios: Array
    noise: Array


def steadied(table: SensitivityTable) -> SensitivityTable:
    """Return the table with steadied losses, and projections scaled to them.

    The table itself where its parts were not measured, or it is steadied.
    """
    groups = [] if table.measured is not None else _groups(table)
    return _scaled(table, _pooled(groups)) if groups else table


def steadied_folds(
    table: SensitivityTable, count: int
) -> list[tuple[SensitivityTable, SensitivityTable]]:
    """Return ``SensitivityTable.folds`` of what was measured, both sides steadied by ratios of the first.

    So what is predicted on a fold's calls depends on no choice that was made by them.
    """
    return [_steadied_by_first(*parts) for parts in (table.measured or table).folds(count)]


def steadied_halves(table: SensitivityTable) -> list[tuple[SensitivityTable, SensitivityTable]]:
    """Return ``SensitivityTable.halves`` of what was measured, steadied as ``steadied_folds`` are."""
    return [_steadied_by_first(*parts) for parts in (table.measured or table).halves()]


def _steadied_by_first(
    seen: SensitivityTable, apart: SensitivityTable
) -> tuple[SensitivityTable, SensitivityTable]:
    groups = _groups(seen)
    if not groups:
        return seen, apart
    ratios = _pooled(groups)
    return _scaled(seen, ratios), _scaled(apart, ratios)


def _groups(table: SensitivityTable) -> list[_Ratios]:
    """Return the schemes whose parts are not zero, by layer and whether activations are rounded."""
    found: list[_Ratios] = []
    if table.partial is None or table.projections is None:
        return found
    for layer, row in table.projections.items():
        kinds: dict[bool, list[tuple[str, float, float]]] = {}
        for scheme, vector in row.items():
            squares = table.partial[layer][scheme].astype(np.float64)
            whole = squares.sum()
            if whole > 0:
                own = np.square(vector, dtype=np.float64).sum() / whole
                # Var(a^2) = 2 E(a^2)^2 for each entry, and the entries are independent.
                noise = 2 * np.square(squares).sum() / whole**2
                rounds = scheme in SCHEMES and SCHEMES[scheme].activation is not None
                kinds.setdefault(rounds, []).append((scheme, own, noise))
        for kind in kinds.values():
            names, ratios, noise = zip(*kind)
            found.append(_Ratios(layer, names, np.array(ratios), np.array(noise)))
    return found


def _pooled(groups: list[_Ratios]) -> dict[tuple[str, str], float]:
    """Return the pooled ratio of each (layer, scheme)."""
    # Relative to the layer's mean ratio c: the schemes' own spread, pooled over the layers.
    spread, noise, freedom = 0.0, 0.0, 0
    for one in groups:
        if len(one.ratios) > 1 and (mean := one.ratios.mean()) > 0:
            spread += float(np.square(one.ratios / mean - 1).sum())
            noise += float(one.noise.mean() * (len(one.ratios) - 1))
            freedom += len(one.ratios) - 1
    own = max(spread - noise, 0.0) / freedom if freedom else 0.0
    means = np.array([one.ratios.mean() for one in groups])
    centre = float(means.mean())
    of_means = np.array([(own + one.noise.mean()) / len(one.ratios) for one in groups])
    between = max(float(np.square(means / centre - 1).mean() - of_means.mean()), 0.0)
    found = {}
    for one, mean, uncertain in zip(groups, means, of_means, strict=True):
        layer = centre + between / max(between + uncertain, 1e-12) * (mean - centre)
        weight = own / np.maximum(own + one.noise, 1e-12)
        for scheme, ratio in zip(one.schemes, layer + weight * (one.ratios - layer), strict=True):
            found[one.layer, scheme] = float(ratio)
    return found


def _scaled(table: SensitivityTable, ratios: dict[tuple[str, str], float]) -> SensitivityTable:
    assert table.partial is not None and table.projections is not None
    steps = len(table.timesteps)
    losses = {layer: dict(row) for layer, row in table.losses.items()}
    rows: Nested = {layer: dict(row) for layer, row in table.losses_by_timestep.items()}
    vectors: Nested = {layer: dict(row) for layer, row in table.projections.items()}
    for (layer, scheme), ratio in ratios.items():
        by_step = table.partial[layer][scheme].astype(np.float64).reshape(steps, -1).sum(1)
        found = ratio * by_step.sum()
        measured = losses[layer][scheme]
        losses[layer][scheme] = float(found)
        rows[layer][scheme] = np.asarray(ratio * by_step * steps, np.float32)
        scale = np.sqrt(found / measured) if measured > 0 else 1.0
        vectors[layer][scheme] = np.asarray(vectors[layer][scheme] * scale, np.float32)
    return replace(
        table, losses=losses, losses_by_timestep=rows, projections=vectors, measured=table
    )
