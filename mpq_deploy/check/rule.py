"""What a rule is, and what it finds.

A rule looks at a ``View`` for one form and yields the nodes that have it. ``verdicts`` says per
dialect what that form does there and how that is known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from mpq_deploy.check.graph_view import Node, View
from mpq_deploy.graph.dialects import DIALECTS, Dialect

# refused: the parser or builder fails. wrong: it builds, but computes other numbers. fp16:
# quantized, but computed in FP16. slow: more time or bytes than the form promises. doubtful: not
# shown to work by anyone. note: worth knowing.
Effect = Literal["refused", "wrong", "fp16", "slow", "doubtful", "note"]
EFFECTS: tuple[Effect, ...] = ("refused", "wrong", "fp16", "slow", "doubtful", "note")
ERRORS: tuple[Effect, ...] = ("refused", "wrong")
WARNINGS: tuple[Effect, ...] = ("fp16", "slow", "doubtful")
Proof = Literal["built here", "documented", "unproven"]


@dataclass(frozen=True)
class Verdict:
    """What a form does in a dialect, and how that is known."""

    effect: Effect
    proof: Proof


Verdicts = Mapping[str, Verdict]


@dataclass(frozen=True)
class Context:
    """What is checked, and for which compute capabilities of the target, such as 87."""

    view: View
    dialect: Dialect
    capabilities: tuple[int, ...] = ()

    @property
    def oldest(self) -> int | None:
        """The smallest compute capability that the engine must run on; None: not named."""
        return min(self.capabilities, default=None)


@dataclass(frozen=True)
class Match:
    """A node (None: the whole graph) that has a rule's form. ``message`` says what was found."""

    node: Node | None
    message: str


@dataclass(frozen=True)
class Rule:
    """One form: how to find and fix it, and what it does in each dialect (absent: nothing)."""

    name: str
    find: Callable[[Context], Iterator[Match]]
    fix: str
    verdicts: Verdicts


@dataclass(frozen=True)
class Finding:
    """One line of the result."""

    rule: str
    effect: Effect
    proof: Proof
    node: str
    op: str
    message: str
    fix: str


def findings_of(rule: Rule, context: Context) -> list[Finding]:
    """Apply one rule."""
    verdict = rule.verdicts.get(context.dialect.name)
    if verdict is None:
        return []
    findings = []
    for match in rule.find(context):
        label, op = (match.node.label, match.node.op) if match.node else ("", "")
        findings.append(
            Finding(rule.name, verdict.effect, verdict.proof, label, op, match.message, rule.fix)
        )
    return findings


TENSORRT = tuple(name for name, one in DIALECTS.items() if one.tensorrt)
PROPER = tuple(name for name, one in DIALECTS.items() if one.proper)


def built_here(effect: Effect, elsewhere: Proof = "unproven") -> Verdicts:
    """What TensorRT-RTX did here; TensorRT itself is assumed to do the same (``elsewhere``)."""
    proper = {name: Verdict(effect, elsewhere) for name in PROPER}
    return {**proper, "trt-rtx": Verdict(effect, "built here")}


def documented(effect: Effect, *names: str) -> Verdicts:
    """What documents or the parser's source say of the named dialects (default: every TensorRT)."""
    return {name: Verdict(effect, "documented") for name in names or TENSORRT}
