"""Choose the exponent of the channel factors of each activation, before the integer program.

Exponents change neither bytes nor kernels, only the loss, and layers that read one tensor can share
its quantizer only with the same exponent. So each tensor gets one exponent per body and range: the
one with the minimum loss summed over its readers. Our choice: it keeps the integer program small.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mpq_deploy.calibrate.stats import CalibrationStats
from mpq_deploy.engine.target import Target
from mpq_deploy.formats.scheme import SCHEMES, W8A8, Scheme
from mpq_deploy.graph.layers import Layer
from mpq_deploy.rounding.control_schemes import INT8_RULE, control_scheme

Names = Mapping[str, tuple[str, ...]]
Losses = Mapping[str, Mapping[str, float]]
Key = tuple[tuple[str, ...], str]


def one_exponent_each(
    layers: Sequence[Layer], allowed: Names, losses: Losses
) -> dict[str, tuple[str, ...]]:
    """Return ``allowed`` (layer -> schemes) with one exponent per body, the same for all readers.

    With a range that moves, "no factors" competes with the exponents. With a static range the
    scheme without factors always stays.
    """
    totals: dict[Key, dict[int, float]] = {}
    for layer in layers:
        for name in filter(_has_exponent, allowed[layer.name]):
            amounts = totals.setdefault(_key(layer, name), {})
            amount = SCHEMES[name].branch.amount
            amounts[amount] = amounts.get(amount, 0.0) + losses[layer.name][name]

    def chosen(layer: Layer) -> tuple[str, ...]:
        best: dict[Key, str] = {}
        for name in filter(_has_exponent, allowed[layer.name]):
            key = _key(layer, name)
            row = totals[key]
            least = min(best.get(key, name), name, key=lambda n: row[SCHEMES[n].branch.amount])
            best[key] = least
        kept = set(best.values())
        return tuple(n for n in allowed[layer.name] if not _has_exponent(n) or n in kept)

    return {layer.name: chosen(layer) for layer in layers}


def best_int8(
    layers: Sequence[Layer],
    target: Target,
    losses: Losses,
    predicts: bool,
    stats: CalibrationStats | None = None,
) -> dict[str, Scheme]:
    """Return the best plan with everything in INT8: layer -> scheme.

    Each activation takes the range and exponent with the minimum loss summed over its readers.
    ``predicts``: whether the metric's losses distinguish ranges; if not, or where ``losses`` has no
    alternative, ranges are static. ``stats``: leave inputs that are too large in FP16.
    """
    static = {layer.name: control_scheme(layer, INT8_RULE, target, stats) for layer in layers}
    if not predicts:
        return static
    totals: dict[tuple[str, ...], dict[str, float]] = {}
    for layer in layers:
        for name in _int8_variants(static[layer.name], losses[layer.name]):
            row = totals.setdefault(layer.inputs, {})
            row[name] = row.get(name, 0.0) + losses[layer.name][name]
    chosen = dict(static)
    for layer in layers:
        own = _int8_variants(static[layer.name], losses[layer.name])
        if own:
            row = totals[layer.inputs]
            chosen[layer.name] = SCHEMES[min(own, key=lambda name: (row[name], name))]
    return chosen


def _int8_variants(static: Scheme, losses: Mapping[str, float]) -> tuple[str, ...]:
    """Return the measured schemes that differ from W8A8 only in the input's range and factors."""
    if static != W8A8:
        return ()
    found = [SCHEMES[name] for name in losses]
    return tuple(s.name for s in found if s.static == W8A8 and (not s.branch or s.branch.rescales))


def _has_exponent(name: str) -> bool:
    scheme = SCHEMES[name]
    return scheme.branch.rescales or (scheme.range.moves and not scheme.branch)


def _key(layer: Layer, name: str) -> Key:
    return layer.inputs, SCHEMES[name].body.name
