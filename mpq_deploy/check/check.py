"""Check an ONNX file against a target: every rule, over every node.

In: the path of any ONNX file, a target. Out: a ``CheckResult``, as text in 80 columns or as JSON.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from mpq_deploy.check.graph_view import open_view, read_known
from mpq_deploy.check.rule import EFFECTS, ERRORS, WARNINGS, Context, Finding, findings_of
from mpq_deploy.check.rules_activations import ACTIVATION_RULES
from mpq_deploy.check.rules_graph import GRAPH_RULES
from mpq_deploy.check.rules_types import TYPE_RULES
from mpq_deploy.check.rules_weights import WEIGHT_RULES
from mpq_deploy.engine.target import Target
from mpq_deploy.errors import ModelError
from mpq_deploy.graph.sound import checker_problem

if TYPE_CHECKING:
    from mpq_deploy.run.view import Run

RULES = (*GRAPH_RULES, *TYPE_RULES, *WEIGHT_RULES, *ACTIVATION_RULES)
# No plan changes these: what they find in the exported graph, they find in the quantized one too.
OPERATOR_RULES = (
    "operator-unknown",
    "operator-unsupported",
    "operator-form",
    "operator-foreign",
    "operator-plugin",
)
INVALID_FIX = "fix what onnx.checker reports, or export the model again"
WIDTH = 80
NAMED = 6
WORDS = {
    "refused": "is refused",
    "wrong": "gives wrong numbers",
    "fp16": "runs in FP16",
    "slow": "runs slowly",
    "doubtful": "may fail",
    "note": "note",
}


@dataclass(frozen=True)
class CheckResult:
    """The findings in a model, the most severe first."""

    model: str
    target: str
    dialect: str
    nodes: int
    findings: tuple[Finding, ...]

    @property
    def counts(self) -> dict[str, int]:
        """Findings by effect."""
        counts = Counter(finding.effect for finding in self.findings)
        return {effect: counts[effect] for effect in EFFECTS}

    def passes(self, strict: bool) -> bool:
        """Whether CI should go on: no errors, and with ``strict`` no warnings either."""
        bad = (*ERRORS, *WARNINGS) if strict else ERRORS
        return not any(finding.effect in bad for finding in self.findings)

    def as_json(self, strict: bool) -> dict[str, Any]:
        """Return plain values for scripts."""
        return {**asdict(self), "passes": self.passes(strict), "counts": self.counts}

    def text(self) -> str:
        """Return the findings for people: grouped by rule, no line over 80 columns."""
        target = f"{self.target} (dialect {self.dialect})"
        lines = _wrapped(f"{self.model}: {self.nodes} nodes, for {target}", "")
        # A rule has one effect on a target, and the findings are ordered by effect.
        for rule in dict.fromkeys(finding.rule for finding in self.findings):
            lines += ["", *_group([finding for finding in self.findings if finding.rule == rule])]
        parts = [f"{count} {effect}" for effect, count in self.counts.items() if count]
        return "\n".join([*lines, "", "found: " + (", ".join(parts) or "no findings")])


def check_model(path: Path, target: Target) -> CheckResult:
    """Apply every rule to the model at ``path``. Raises ModelError when it cannot be read.

    What onnx.checker refuses, strict shape inference included, is a finding; it is the only one if
    the structure is unsound, since the rules rely on that.
    """
    proto = read_known(path)
    dialect = target.forms
    nodes, findings = len(proto.graph.node), []
    unsound = checker_problem(proto, strict=False)
    problem = unsound or checker_problem(proto, strict=True)
    if problem is not None:
        findings.append(Finding("onnx-invalid", "refused", "documented", *problem, INVALID_FIX))
    if unsound is not None:
        return CheckResult(str(path), target.name, dialect.name, nodes, tuple(findings))
    view = open_view(proto, path)
    capabilities = tuple(int(name.removeprefix("SM")) for name in target.compute_capabilities)
    context = Context(view, dialect, capabilities)
    findings += [finding for rule in RULES for finding in findings_of(rule, context)]
    ordered = sorted(findings, key=lambda finding: EFFECTS.index(finding.effect))
    return CheckResult(str(path), target.name, dialect.name, len(view.nodes), tuple(ordered))


def check_dialect(run: Run, model: Path, rules: Collection[str] = ()) -> None:
    """Raise ModelError when ``model`` has a form that the target's TensorRT refuses or gets wrong.

    ``rules``: only these, by name; none named: all.
    """
    result = check_model(model, run.target)
    errors = [one for one in result.findings if one.effect in ERRORS]
    if rules:
        errors = [one for one in errors if one.rule in rules]
    if not errors:
        return
    first = errors[0]
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    where = f"The node '{first.node}' ({first.op})" if first.node else "The model"
    raise ModelError(
        f"{where} cannot be deployed on {result.target}: {first.message}{more}.",
        f"{first.fix[:1].upper()}{first.fix[1:]}.",
    )


def _group(findings: list[Finding]) -> list[str]:
    """The findings of one rule: what happens at which nodes, and how to change it."""
    first = findings[0]
    lines = [f"{WORDS[first.effect]}: {first.rule} [{first.proof}]"]
    for message in dict.fromkeys(finding.message for finding in findings):
        alike = [one for one in findings if one.message == message and one.node]
        nodes = [f"{one.node} ({one.op})" for one in alike]
        more = [f"and {len(nodes) - NAMED} more (see --json)"] if len(nodes) > NAMED else []
        where = ", ".join([*nodes[:NAMED], *more])
        lines += _wrapped(f"{where}: {message}" if where else message, "  ")
    return [*lines, *_wrapped(f"-> {first.fix}", "  ")]


def _wrapped(text: str, indent: str) -> list[str]:
    return wrap(text, WIDTH, initial_indent=indent, subsequent_indent=indent + "  ") or [indent]
