"""Explain the smallest feasible size: which layers need more than 4 bits, why, and what would help.

In: the schemes and bytes that each layer may take, and the reasons for the refused ones. Out:
sentences for the message of an infeasible budget.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mpq_deploy.allocate.problem import LayerChoice, Rules
from mpq_deploy.engine.target import Target, load_target
from mpq_deploy.formats.scheme import SCHEMES
from mpq_deploy.graph.census import Census

if TYPE_CHECKING:
    from mpq_deploy.graph.layers import Layer

# How many reasons the text names (those of most bytes), and how many layers of each.
TOLD, NAMED = 3, 2
# The target that takes the most schemes: the text recommends it where it takes 4 bits.
OTHER = "rtx"
# A scheme of 4 bits, to ask that target about; blocks of 128 stand for all block sizes.
SMALLEST = "w4a16-b128"


@dataclass(frozen=True)
class Cause:
    """The layers that need more than 4 bits for one ``reason``.

    ``bytes``: what they take beyond 4 bits; ``lift``: what would help, or "".
    """

    reason: str
    layers: tuple[str, ...]
    bytes: int
    lift: str


def floor_causes(
    layers: Sequence[Layer],
    choices: Sequence[LayerChoice],
    refused: Mapping[str, Mapping[str, str]],
    rules: tuple[Rules, Rules],
    target: Target,
) -> list[Cause]:
    """Return why layers need more than 4 bits, the reason with the most bytes first.

    ``refused``: layer -> scheme -> reason; ``rules``: protection by the target, and by the recipe.
    """
    groups: dict[tuple[str, str], list[tuple[str, int]]] = {}
    for layer, choice in zip(layers, choices):
        smallest = min(choice.bytes, key=lambda name: choice.bytes[name])
        if SCHEMES[smallest].weight.bits <= 4:
            continue
        beyond = choice.bytes[smallest] - layer.weights // 2
        cause = _cause(layer, smallest, refused[layer.name], rules, target)
        groups.setdefault(cause, []).append((layer.name, beyond))
    causes = [
        Cause(reason, tuple(name for name, _ in held), sum(size for _, size in held), lift)
        for (reason, lift), held in groups.items()
    ]
    return sorted(causes, key=lambda cause: -cause.bytes)


def floor_text(
    causes: Sequence[Cause], smallest_bytes: int, fixed_bytes: int, fp16_bytes: int, census: Census
) -> str:
    """Return what ``smallest_bytes`` consist of, as shares of the FP16 size, and what would help.

    ``census``: counts the products of the graph that are not layers; named if there are any.
    """
    rest = smallest_bytes - fixed_bytes - sum(cause.bytes for cause in causes)
    said = [
        f"{rest / fp16_bytes:.4f} are weights of 4 bits or fewer, with their scales",
        f"{fixed_bytes / fp16_bytes:.4f} constants that are not layers",
    ]
    for cause in causes[:TOLD]:
        names = ", ".join(cause.layers[:NAMED])
        more = f" and {len(cause.layers) - NAMED} more" if len(cause.layers) > NAMED else ""
        said.append(
            f"{cause.bytes / fp16_bytes:.4f} what {names}{more} take beyond 4 bits ({cause.reason})"
        )
    lifts = list(dict.fromkeys(cause.lift for cause in causes[:TOLD] if cause.lift))
    text = f"Of it {', '.join(said)}."
    if census.others:
        text = f"{text} {census.text()}"
    return f"{text} What would lower it: {'; '.join(lifts)}." if lifts else text


def _cause(
    layer: Layer,
    smallest: str,
    refused: Mapping[str, str],
    rules: tuple[Rules, Rules],
    target: Target,
) -> tuple[str, str]:
    for whose, rule, lift in (
        ("the recipe", rules[1], "other schemes in allocate.protect"),
        ("the target", rules[0], "a rule in allocate.protect, which overrides the target's"),
    ):
        if any(fnmatch.fnmatchcase(layer.name, pattern) for pattern, _ in rule):
            return f"protected by {whose}", lift
    reason = next((why for name, why in refused.items() if name.startswith("w4a16-")), "")
    reason = reason.partition("; nearest")[0]
    if not reason:
        return f"{smallest} is the smallest that allocate.schemes has", "more of allocate.schemes"
    if target.forms.int4_conv or load_target(OTHER).refusal(layer, SCHEMES[SMALLEST]):
        return reason, ""
    # A device's own TensorRT may take what TensorRT-RTX takes.
    shown = f", or a device that shows it (mpq-deploy probe --target {target.name})"
    return reason, f"--target {OTHER}, which takes it{shown if target.builder != 'none' else ''}"
