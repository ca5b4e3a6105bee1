"""The graphs of a run beside the float model: ours, corrected, as it was before recovery, and the controls."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from mpq_deploy.evaluate.evaluate import evaluate
from mpq_deploy.evaluate.evaluation_result import Evaluation, EvaluationOptions
from mpq_deploy.graph.writers.deployed_graphs import SIMULATED
from mpq_deploy.runtime.correction import Correction

if TYPE_CHECKING:
    from mpq_deploy.run.view import Run

LATENCY = "latency.json"
# The variant that samples the plan's graph with PTQD's correction in front of the sampler.
CORRECTED = "ours+ptqd"
# The plan as it was before recovery, where there was one.
BEFORE = "plan"


def evaluate_variants(
    run: Run,
    ours: Path,
    size_bytes: int,
    latency: bool,
    correction: Correction | None = None,
    before: Path | None = None,
) -> Evaluation:
    """Compare the graph ``ours`` (without and with ``correction``) and the controls with the float model.

    ``before``: the plan's graph where ``ours`` is the recovered one, of the same size.

    Samples are cached by content.
    """
    exported = run.exported
    controls = run.stage("controls")
    sizes: dict[str, int] = json.loads((controls / "sizes.json").read_text(encoding="utf-8"))
    corrected = {} if correction is None else {CORRECTED: correction}
    plan = {} if before is None else {BEFORE: before}
    return evaluate(
        {
            "ours": ours,
            **dict.fromkeys(corrected, ours),
            **plan,
            **{name: controls / name / SIMULATED for name in sizes},
        },
        exported.path,
        exported.spec,
        exported.conditions,
        _options(run, latency),
        run.talk,
        sizes={**sizes, "ours": size_bytes, **dict.fromkeys((*corrected, *plan), size_bytes)},
        cache=run.path / ".samples",
        corrections=corrected,
        crew=run.crew,
    )


def _options(run: Run, latency: bool) -> EvaluationOptions:
    """Return the recipe's settings; a model without timesteps is called once per input that was held out."""
    section, exported = run.recipe.evaluate, run.exported
    steps, samples = section.steps, section.samples
    if exported.spec.timestep is None:
        held_out = len(exported.conditions[exported.spec.sample.name]) - (exported.spec.calibration_rows or 0)
        steps, samples = 1, min(samples, held_out)
    return EvaluationOptions(
        samples=samples,
        steps=steps,
        timesteps=min(section.timesteps, steps),
        calls=section.calls,
        batch_size=section.batch_size,
        seed=section.seed,
        sampler=section.sampler,
        **({} if latency else {"latency_calls": 0}),
    )
