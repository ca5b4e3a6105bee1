"""The exporter's optimizer in time linear in the graph: rules are tried only where they may end.

In: an exported ``onnx_ir.Model``. Out: the same model, optimized in place as onnxscript does it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
import onnxscript.optimizer
from onnxscript.rewriter import MatchResult, _matcher


def optimize(model: ir.Model) -> None:
    """Run the optimizer of onnxscript on ``model``; the result is what it gives by itself."""
    with _rules_by_operator():
        onnxscript.optimizer.optimize_ir(model)


@contextmanager
def _rules_by_operator() -> Iterator[None]:
    """Refuse a rule at once at a node of another operator than the rule's pattern ends in.

    A pattern with several outputs is otherwise preceded by a pass over the whole graph at every
    node, which makes rewriting quadratic.
    """
    matcher: Any = _matcher.SimplePatternMatcher
    original = matcher.match

    def match(self: Any, model: Any, graph: Any, node: ir.Node, **options: Any) -> Any:
        last = self.pattern.output_nodes[0].op_identifier()
        # None: the pattern may end in several operators.
        if last is not None and last[:2] != (node.domain, node.op_type):
            return MatchResult().fail("another operator")
        return original(self, model, graph, node, **options)

    matcher.match = match
    try:
        yield
    finally:
        matcher.match = original
