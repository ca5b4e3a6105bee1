"""Layers that take one scheme together: the queries', keys' and values' projections of one input.

In: groups of layers, and what each may take. Out: the same choices with each group as one, and why
a group is left apart. TensorRT multiplies several weights of one input as one product where all are
FP16, or all INT8 with INT8 activations (docs/engine-forms.md).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from mpq_deploy.allocate.problem import LayerChoice

# Groups that a note names (our choice).
NAMED = 3


def tied_layers(
    groups: Sequence[Sequence[str]], allowed: Mapping[str, Collection[str]]
) -> tuple[tuple[tuple[str, ...], ...], str]:
    """Return the layers that are tied, group by group, and a note on those that are not; else "".

    ``allowed``: layer -> schemes. Tied are those of a group that may take the same schemes: a rule
    of the recipe for one of them takes it out, and no budget becomes too small by tying.
    """
    ties: list[tuple[str, ...]] = []
    apart: list[str] = []
    for group in groups:
        alike: dict[frozenset[str], list[str]] = {}
        for name in group:
            alike.setdefault(frozenset(allowed[name]), []).append(name)
        ties += [tuple(names) for names in alike.values() if len(names) > 1]
        if len(alike) > 1:
            apart.append(" and ".join(names[0] for names in alike.values()))
    if not apart:
        return tuple(ties), ""
    more = f" and {len(apart) - NAMED} more" if len(apart) > NAMED else ""
    return tuple(ties), (
        f"{len(apart)} groups of queries, keys and values are not tied as a whole, since their layers may take "
        f"different schemes: {'; '.join(apart[:NAMED])}{more}"
    )


def tie(choices: Sequence[LayerChoice], ties: Sequence[Sequence[str]]) -> list[LayerChoice]:
    """Return ``choices`` with those of each tie as one, which has the name and the place of its first layer."""
    by_name = {choice.name: choice for choice in choices}
    firsts = {names[0]: names for names in ties}
    later = {name for names in ties for name in names[1:]}
    return [
        _together([by_name[name] for name in firsts.get(choice.name, (choice.name,))])
        for choice in choices
        if choice.name not in later
    ]


def _together(members: Sequence[LayerChoice]) -> LayerChoice:
    first = members[0]
    if len(members) == 1:
        return first

    return replace(
        first,
        bytes={s: sum(one.bytes[s] for one in members) for s in first.bytes},
        loss={s: sum(one.loss[s] for one in members) for s in first.loss},
        latency_ns={s: sum(one.latency_ns[s] for one in members) for s in first.latency_ns},
        members=tuple(one.name for one in members),
    )
