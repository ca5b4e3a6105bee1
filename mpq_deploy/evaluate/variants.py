"""The graphs of a run beside the float model: ours, corrected, as it was before recovery, and the controls."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from mpq_deploy.evaluate.cpu_latency import with_cpu_latency
from mpq_deploy.evaluate.evaluate import Variant, evaluate
from mpq_deploy.evaluate.evaluation_result import Evaluation
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
    model, settings = run.exported.model, run.recipe.evaluate
    if model.spec.timestep is None:
        # A model without timesteps is called once per input that was held out.
        held_out = len(model.conditions[model.spec.sample.name]) - (model.spec.calibration_rows or 0)
        settings = settings.replace(steps=1, samples=min(settings.samples, held_out))
    settings = settings.replace(timesteps=min(settings.timesteps, settings.steps))
    controls = run.stage("controls")
    sizes: dict[str, int] = json.loads((controls / "sizes.json").read_text(encoding="utf-8"))
    variants = {"ours": Variant(ours, size_bytes)}
    if correction is not None:
        variants[CORRECTED] = Variant(ours, size_bytes, correction)
    if before is not None:
        variants[BEFORE] = Variant(before, size_bytes)
    variants |= {name: Variant(controls / name / SIMULATED, size) for name, size in sizes.items()}
    found = evaluate(variants, model, settings, run.talk, cache=run.path / ".samples", crew=run.crew)
    return with_cpu_latency(found, model, "ours", ours) if latency else found
