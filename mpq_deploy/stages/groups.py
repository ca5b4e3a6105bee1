"""MixDQ's groups within the stage allocate: what is measured for them, and which split of the budget is kept."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mpq_deploy.allocate.cross_terms import Solved
from mpq_deploy.allocate.groups import Split, content_bytes, split_plans
from mpq_deploy.allocate.milp import Problem, plan_bytes
from mpq_deploy.errors import UsageError
from mpq_deploy.graph.content_groups import content_layers
from mpq_deploy.graph.writers.deployed_graphs import SIMULATED
from mpq_deploy.run.common import Exported, version_of
from mpq_deploy.sensitivity.table import PREDICTING, SensitivityTable

if TYPE_CHECKING:
    from mpq_deploy.recipe import Recipe
    from mpq_deploy.run.pipeline import Pipeline
    from mpq_deploy.sensitivity.subject import Subject

MIXDQ = "mixdq"
# Splits whose plans are written and run: those of the least predicted loss (our choice).
MEASURED = 4


def check_groups(recipe: Recipe) -> None:
    """Refuse groups beside what they do not go with. Raises UsageError."""
    section, method = recipe.allocate, recipe.measure.method
    if section.groups != MIXDQ:
        return
    if section.max_latency is not None or section.objective != "loss":
        raise UsageError(
            "allocate.groups is mixdq beside a limit on latency or objective latency.",
            "MixDQ splits a budget of bytes alone: set allocate.groups to none, or leave latency out.",
        )
    if method not in PREDICTING:
        raise UsageError(
            f"allocate.groups is mixdq, whose second group goes by the output's error; {method} does not predict one.",
            f"Set measure.method to one of {', '.join(PREDICTING)}.",
        )


def allocate_groups(
    pipeline: Pipeline, table: SensitivityTable, problem: Problem, joint: Solved, solve: Callable[[Problem], Solved]
) -> tuple[Solved, dict[str, Any]]:
    """Return the split plan whose model has the least error, and what came of all splits.

    ``joint``: the plan without groups, which is measured beside them.
    """
    from mpq_deploy.stages.measure import stage_subject

    exported = Exported(pipeline)
    texts = [item.name for item in exported.spec.conditions if len(item.shape) == 2]
    content = content_layers(exported.graph, exported.spec.sample.name, texts)
    if not content:
        raise UsageError(
            "allocate.groups is mixdq, but the model has no cross-attention: no product of a text with the sample.",
            "Set allocate.groups to none.",
        )
    subject = stage_subject(pipeline)[0]
    losses = _structure_losses(pipeline, subject, content)
    splits = split_plans(problem, losses, solve, (content_bytes(problem, content, joint.schemes),))
    ranked = sorted(splits, key=lambda split: table.plan_loss(split.solved.schemes))
    measured = [plan_error(pipeline, subject, split.solved.schemes) for split in ranked[:MEASURED]]
    best = int(np.argmin(measured))
    whole = problem.budget_bytes - problem.fixed_bytes
    rows = [
        _row(split, whole, table, measured[place] if place < MEASURED else None) for place, split in enumerate(ranked)
    ]
    return ranked[best].solved, {
        "method": MIXDQ,
        "content": content,
        "chosen": rows[best],
        "splits": sorted(rows, key=lambda row: row["content_bytes"]),
        "without_groups": {
            "content_share": content_bytes(problem, content, joint.schemes) / whole,
            "measured_nmse": plan_error(pipeline, subject, joint.schemes),
            "size_bytes": plan_bytes(problem, joint.schemes),
        },
    }


def groups_note(groups: Mapping[str, Any]) -> str:
    """Say what came of the groups, for the reports."""
    chosen, joint = groups["chosen"], groups["without_groups"]
    content, count = groups["content"], len(groups["splits"])
    return (
        f"MixDQ's groups: {len(content)} layers of cross-attention and the feed-forward behind it, allocated by SSIM, "
        f"take {100 * chosen['content_share']:.1f} % of the layers' budget, the best of {count} splits. On calibration "
        f"calls the output's error is {chosen['measured_nmse']:.2e}; without groups it would be "
        f"{joint['measured_nmse']:.2e} with {100 * joint['content_share']:.1f} %."
    )


def _row(split: Split, whole: int, table: SensitivityTable, measured: float | None) -> dict[str, Any]:
    return {
        "content_bytes": split.content_bytes,
        "content_share": split.content_bytes / whole,
        "predicted_nmse": table.plan_loss(split.solved.schemes),
        "measured_nmse": measured,
    }


def _structure_losses(pipeline: Pipeline, subject: Subject, layers: Collection[str]) -> dict[str, dict[str, float]]:
    """Return the content layers' losses, measured once for all budgets: kept beside the samples."""
    from mpq_deploy.evaluate.cache import SampleCache
    from mpq_deploy.sensitivity.structure import measure_structure

    section = pipeline.recipe.measure
    key = {
        "part": "structure",
        "format": 1,
        **{name: pipeline.digest(name) for name in ("export", "calibrate", "candidates")},
        "measure": section.model_dump(mode="json", include={"samples", "calls", "timesteps", "sampling", "batch_size"}),
        "layers": sorted(layers),
        **version_of("torch", "onnxruntime", "numpy"),
    }

    def make() -> dict[str, Any]:
        found = measure_structure(subject, layers)
        return {"losses": np.array(json.dumps(found))}

    kept = SampleCache(pipeline.run.path / ".samples", pipeline.talk).get(key, make)
    losses: dict[str, dict[str, float]] = json.loads(str(kept["losses"]))
    return losses


def plan_error(pipeline: Pipeline, subject: Subject, schemes: dict[str, str]) -> float:
    """Return the output's error (NMSE, mean over timesteps) of a plan's graph, on calls that are measured."""
    from mpq_deploy.calibrate.fit_correction import call_moments
    from mpq_deploy.stages.quantize import write_plan

    float_model = Exported(pipeline).path
    with tempfile.TemporaryDirectory(dir=pipeline.run.scratch()) as folder:
        write_plan(pipeline, schemes, Path(folder))
        found = call_moments(
            float_model,
            Path(folder) / SIMULATED,
            subject.calibration,
            subject.conditions,
            subject.spec,
            pipeline.recipe.calibrate.batch_size,
            pipeline.talk,
        )
    return float(np.mean(found.dd.sum(axis=(1, 2)) / found.mm.sum(axis=(1, 2))))
