"""The plans that each metric makes at the same budgets, and their measured quality.

A plan is measured once, whoever made it: its figures are kept in the run folder by the digest of its schemes, of the
stages behind its weights, and of how it was measured.
"""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpq_deploy.artefacts import canonical_json, write_text
from mpq_deploy.audit.result import PlanPoint
from mpq_deploy.errors import InfeasibleBudgetError
from mpq_deploy.evaluate.evaluate import evaluate
from mpq_deploy.evaluate.fresh import FreshCalls, FreshOptions, standard_error
from mpq_deploy.evaluate.result import EvaluationOptions
from mpq_deploy.graph.write import SIMULATED
from mpq_deploy.stages.allocate import PlanSolver
from mpq_deploy.stages.common import Exported, version_of
from mpq_deploy.stages.quantize import write_plan
from mpq_deploy.talk import Talk

if TYPE_CHECKING:
    from mpq_deploy.pipeline import Pipeline
    from mpq_deploy.sensitivity.table import SensitivityTable

# Under the run folder.
KEPT = Path("audit") / "plans"


class PlanQuality:
    """Measures plans on fresh trajectories: NMSE image by image, and the images' PSNR from the same noise.

    Images, steps, sampler and noise are the recipe's (``evaluate``); nothing was calibrated on that noise.
    """

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self._exported = Exported(pipeline)
        section = pipeline.recipe.evaluate
        self.options = FreshOptions(section.samples, section.steps, section.seed, section.sampler, section.batch_size)
        self._calls: FreshCalls | None = None
        self._place = pipeline.run.path / KEPT
        self._place.mkdir(parents=True, exist_ok=True)

    def of(self, schemes: dict[str, str]) -> dict[str, Any]:
        """Return ``nmse`` and ``psnr_db`` (None where images are identical) and the ``errors`` of the images."""
        path = self._place / f"{self._key(schemes)}.json"
        kept = _read(path)
        if kept is None:
            kept = self._measure(schemes)
            write_text(path, canonical_json(kept))
        return kept

    def _measure(self, schemes: dict[str, str]) -> dict[str, Any]:
        exported, options = self._exported, self.options
        if self._calls is None:
            arguments = (exported.path, exported.spec, exported.conditions)
            self._calls = FreshCalls(*arguments, options, self._pipeline.talk)
        with tempfile.TemporaryDirectory(dir=self._pipeline.run.scratch()) as folder:
            write_plan(self._pipeline, schemes, Path(folder))
            graph = Path(folder) / SIMULATED
            errors = self._calls.errors(graph)
            # The error of the output is known by now: one timestep of it is the least that can be asked for.
            sampled = evaluate(
                {"plan": graph},
                exported.path,
                exported.spec,
                exported.conditions,
                EvaluationOptions(
                    samples=options.images,
                    steps=options.steps,
                    timesteps=1,
                    batch_size=options.batch_size,
                    seed=options.seed,
                    sampler=options.sampler,
                    latency_calls=0,
                ),
                Talk(),
                cache=self._pipeline.run.path / ".samples",
            )
        psnr = sampled.variants["plan"].psnr_db
        return {
            "nmse": float(errors.mean()),
            "nmse_error": standard_error(errors),
            "errors": [float(error) for error in errors],
            "psnr_db": psnr if math.isfinite(psnr) else None,
        }

    def _key(self, schemes: dict[str, str]) -> str:
        made_of = {
            "schemes": schemes,
            **{name: self._pipeline.digest(name) for name in ("export", "calibrate", "candidates")},
            **vars(self.options),
            **version_of("onnxruntime", "numpy"),
        }
        return hashlib.sha256(canonical_json(made_of).encode()).hexdigest()[:32]


def _read(path: Path) -> dict[str, Any] | None:
    """Return the kept figures; None where there are none, or where the file is damaged: they are measured again."""
    try:
        kept = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None
    return kept if isinstance(kept, dict) and {"nmse", "nmse_error", "errors", "psnr_db"} <= set(kept) else None


def plan_points(
    pipeline: Pipeline, table: SensitivityTable, budgets: tuple[float, ...], quality: PlanQuality, cross_terms: bool
) -> tuple[PlanPoint, ...]:
    """Solve every budget with the losses of ``table`` and measure the plans; a budget that none fits says so."""
    solver = PlanSolver(pipeline, table=table)
    solver.section = pipeline.recipe.allocate.model_copy(update={"cross_terms": cross_terms})
    points = []
    for budget in budgets:
        try:
            plan = solver.solve(str(budget))
        except InfeasibleBudgetError as error:
            points.append(PlanPoint(budget, refused=str(error), smallest_bytes=error.smallest))
            continue
        found = quality.of(plan.schemes)
        points.append(
            PlanPoint(
                budget,
                plan.size_bytes,
                plan.size_bytes / plan.fp16_size_bytes,
                plan.predicted_loss,
                found["nmse"],
                found["nmse_error"],
                found["psnr_db"],
                found["psnr_db"] is None,
            )
        )
    return tuple(points)
