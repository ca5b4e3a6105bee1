"""Whether the target takes a graph: asked of the exported operators before any work, and of what was written."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from mpq_deploy.errors import ModelError

if TYPE_CHECKING:
    from mpq_deploy.run.view import Run

# No plan changes these: what they find in the exported graph they would find in the quantized one.
OPERATOR_RULES = ("operator-unknown", "operator-unsupported", "operator-foreign")


def check_dialect(run: Run, model: Path, rules: Collection[str] = ()) -> None:
    """Raise ModelError when ``model`` has a form that the target's TensorRT refuses or gets wrong.

    ``rules``: only these, by name; none named: all.
    """
    from mpq_deploy.check.check import check_model
    from mpq_deploy.check.rule import ERRORS

    result = check_model(model, run.target)
    bad = [finding for finding in result.findings if finding.effect in ERRORS and (not rules or finding.rule in rules)]
    if bad:
        more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        where = f"The node '{bad[0].node}' ({bad[0].op})" if bad[0].node else "The model"
        raise ModelError(
            f"{where} cannot be deployed on {result.target}: {bad[0].message}{more}.",
            f"{bad[0].fix[:1].upper()}{bad[0].fix[1:]}.",
        )
