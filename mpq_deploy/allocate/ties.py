"""Tie the query, key and value projections of one input, so that they take one scheme.

In: groups of layers, and the schemes that each layer may take. Out: choices with each group as one,
and a note on groups that stay apart. TensorRT multiplies several weights of one input as one
product where all are FP16, or all INT8 with INT8 activations (docs/engine-forms.md).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from mpq_deploy.allocate.problem import LayerChoice

# How many groups the note names (our choice).
NAMED = 3


def tied_layers(
    groups: Sequence[Sequence[str]], allowed: Mapping[str, Collection[str]]
) -> tuple[tuple[tuple[str, ...], ...], str]:
    """Return the tied layers, group by group, and a note on groups that are not tied as a whole.

    ``allowed``: layer -> schemes. Layers of a group are tied if they may take the same schemes. So
    a recipe's rule for one layer unties it, and tying makes no budget infeasible.
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
    """Return ``choices`` with each tie as one choice, by name and in place of its first layer."""
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
