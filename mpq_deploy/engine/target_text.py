"""A target as text of 80 columns: what it is, what it takes, what not and why, what is proven."""

from __future__ import annotations

from textwrap import wrap

from mpq_deploy.engine.target import Figure, Rule, Target
from mpq_deploy.formats.scheme import FAMILIES, NEW_FAMILIES
from mpq_deploy.graph.layers import LAYER_OPS

WIDTH = 80
LABEL = 12


def describe_target(target: Target) -> str:
    """Return the whole text, without a line end at its end."""
    lines = [*_hanging(target.name, target.title, len(target.name) + 2), ""]
    lines += _entry("dialect", target.dialect)
    lines += _entry("builder", _builder(target))
    if target.jetpack:
        lines += _entry("JetPack", target.jetpack)
    if target.compute_capabilities:
        lines += _entry("GPU", ", ".join(target.compute_capabilities))
    lines += ["", *_figures(target), "", *_schemes(target)]
    if target.protected:
        lines += _entry("stay FP16", ", ".join(target.protected))
    # What a shipped target refuses, one that extends it may list.
    rules = [rule for rule in target.rules if rule.when != "always" or _refuses(target, rule)]
    if rules:
        lines += ["", "what it does not take, and why"]
        for rule in rules:
            lines += _hanging("  -", f"{_subject(rule)}: {rule.reason}", 4)
    if target.proven:
        lines += ["", "what is proven, and by what"]
        for one in target.proven:
            lines += _hanging("  -", f"[{one.proof}] {one.what} ({one.by})", 4)
    return "\n".join(lines)


def figure_text(figure: Figure | None, unit: str, scale: float) -> str:
    """Return a figure with its unit and source; ``not given`` for None."""
    if figure is None:
        return "not given"
    doubt = "" if figure.confirmed else " (unconfirmed)"
    return f"{figure.value / scale:,.1f} {unit}{doubt}: {figure.source}"


def _builder(target: Target) -> str:
    if target.builder == "none":
        return "none: ONNX Runtime runs the graph itself"
    versions = ", ".join(f"{version.rstrip('.')}.x" for version in target.versions) or "any version"
    where = ", on the device" if target.builder == "trtexec" else ""
    return f"{target.builder} {versions}{where}"


def _figures(target: Target) -> list[str]:
    rows = (
        ("memory", target.memory_bytes, "GB", 1e9),
        ("bandwidth", target.bandwidth_bytes_per_s, "GB/s", 1e9),
        ("INT8", target.int8_ops_per_s, "TOPS dense", 1e12),
        ("FP16", target.fp16_ops_per_s, "TFLOPS dense", 1e12),
        *(
            (name, figure, "TFLOPS dense", 1e12)
            for name, figure in (("FP8", target.fp8_ops_per_s), ("FP4", target.fp4_ops_per_s))
            if figure is not None
        ),
    )
    of = _entry("figures of", target.figures_of) if target.figures_of else []
    return of + [
        line
        for name, figure, unit, scale in rows
        for line in _entry(name, figure_text(figure, unit, scale))
    ]


def _schemes(target: Target) -> list[str]:
    """A table: one row per operator, one column per family, branches at the end."""
    lines = [" " * LABEL + "".join(f"{family:<7}" for family in FAMILIES) + "branches"]
    for op in LAYER_OPS:
        marks = "".join(
            f"{'yes' if family in target.schemes[op] else '-':<7}" for family in FAMILIES
        )
        lines += [f"{op:<{LABEL}}{marks}{', '.join(target.branches.get(op, ())) or 'none'}"]
    newer = {op: [f for f in NEW_FAMILIES if f in target.schemes[op]] for op in LAYER_OPS}
    if any(newer.values()):
        listed = (f"{op} {', '.join(families) or 'none'}" for op, families in newer.items())
        lines += _entry("FP8, FP4", "; ".join(listed))
    return lines


def _refuses(target: Target, rule: Rule) -> bool:
    return any(f not in target.schemes[op] for op in rule.ops for f in rule.families)


def _subject(rule: Rule) -> str:
    ops = "every layer" if set(rule.ops) == set(LAYER_OPS) else ", ".join(rule.ops)
    when = "" if rule.when == "always" else f" ({rule.when})"
    return f"{', '.join(rule.families)} of {ops}{when}"


def _entry(name: str, text: str) -> list[str]:
    return _hanging(name, text, LABEL)


def _hanging(head: str, text: str, indent: int) -> list[str]:
    """Wrap ``text`` after ``head``; every line after the first is indented to the same column."""
    lines = wrap(text, WIDTH - indent, break_long_words=True) or [""]
    return [f"{head:<{indent}}{lines[0]}", *(" " * indent + line for line in lines[1:])]
