"""The plans that each metric makes at the same budgets, and their measured quality.

A plan is measured once, whoever made it: its figures are stored in the run folder by the digest of
its schemes, of the stages behind its weights, and of how it was measured.
"""

from __future__ import annotations

import hashlib
import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mpq_deploy.allocate.plan_solver import PlanSolver
from mpq_deploy.errors import InfeasibleBudgetError, InputError
from mpq_deploy.evaluate.evaluate import Variant, evaluate
from mpq_deploy.evaluate.evaluation_result import VariantResult
from mpq_deploy.evaluate.fresh import FreshCalls, standard_error
from mpq_deploy.graph.writers.deployed_graphs import SIMULATED
from mpq_deploy.graph.writers.plan_graphs import write_plan
from mpq_deploy.run.folder import RECIPE
from mpq_deploy.run.stage import version_of
from mpq_deploy.run.view import SAMPLES, Run
from mpq_deploy.studies.audit_result import PlanPoint
from mpq_deploy.system.files import canonical_json, write_text
from mpq_deploy.system.inputs import read_json
from mpq_deploy.system.parallel.work import Alone, Job, Result, Shard, Within, Work, run_shards
from mpq_deploy.system.progress import Talk

if TYPE_CHECKING:
    from mpq_deploy.allocate.plan import PrecisionPlan
    from mpq_deploy.sensitivity.table import SensitivityTable

# Under the run folder.
STORED = Path("audit") / "plans"


class PlanQuality:
    """Measures plans on fresh trajectories: NMSE of each image, and PSNR from the same noise.

    Images, steps, sampler and noise are the recipe's (``evaluate``); nothing was calibrated on that
    noise.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self._exported = run.exported
        section = run.recipe.evaluate
        # The error of the output is known by then: one timestep is the minimum of the settings.
        self.settings = section.replace(timesteps=1, calls=section.samples)
        self._calls: FreshCalls | None = None
        self._place = run.path / STORED
        self._place.mkdir(parents=True, exist_ok=True)

    def of(self, schemes: dict[str, str]) -> dict[str, Any]:
        """Return ``nmse``, ``psnr_db`` (None for identical images) and the images' ``errors``."""
        path = self._place / f"{self._key(schemes)}.json"
        figures = _read(path)
        if figures is None:
            figures = self._measure(schemes)
            write_text(path, canonical_json(figures))
        return figures

    def prepare(self, plans: Sequence[dict[str, str]]) -> None:
        """Have workers, where there are any, measure the plans that are not stored yet."""
        missing = {self._key(schemes): schemes for schemes in plans}
        missing = {
            key: schemes
            for key, schemes in missing.items()
            if _read(self._place / f"{key}.json") is None
        }
        run = self.run
        if isinstance(run.crew, Alone) or len(missing) < 2:
            return
        files = (RECIPE, "export", "calibrate", "candidates", SAMPLES)
        size = sum(file.stat().st_size for file in run.stage("export").iterdir())
        job = Job("measuring plans", *run.for_workers(_open_plans, *files), 4 * size)
        shards = [Shard(f"plan {key[:8]}", schemes) for key, schemes in missing.items()]
        with run.crew.open(job, run.talk) as pool:
            results = run_shards(pool, "measure plans", shards, run.talk)
            for key, result in zip(missing, results, strict=True):
                write_text(self._place / f"{key}.json", canonical_json(_figures(result)))

    def image_error(self, schemes: dict[str, str]) -> float:
        """Return the mean squared error of a plan's final images, whose peak is 1; kept by plan."""
        path = self._place / f"images-{self._key(schemes)}.json"
        try:
            return float(read_json(path)["mse"])
        except (InputError, KeyError, TypeError, ValueError):
            pass
        with self._written(schemes) as graph:
            each = self._sampled(graph).psnr_db_each
        error = float(np.mean(np.power(10.0, np.divide(each, -10))))
        write_text(path, canonical_json({"mse": error}))
        return error

    @contextmanager
    def _written(self, schemes: dict[str, str]) -> Iterator[Path]:
        """Write a plan's graph for a while; give its path."""
        with tempfile.TemporaryDirectory(dir=self.run.scratch()) as folder:
            write_plan(self.run, schemes, Path(folder))
            yield Path(folder) / SIMULATED

    def _sampled(self, graph: Path) -> VariantResult:
        """Compare a graph's images with the float model's."""
        model, cache = self._exported.model.at_size(0), self.run.base / SAMPLES
        return evaluate({"plan": Variant(graph)}, model, self.settings, cache=cache).variants[
            "plan"
        ]

    def _measure(self, schemes: dict[str, str]) -> dict[str, Any]:
        """Measure a plan, stored or not."""
        model, cache = self._exported.model.at_size(0), self.run.base / SAMPLES
        if self._calls is None:
            self._calls = FreshCalls(model, self.settings, self.run.talk, cache)
        with self._written(schemes) as graph:
            errors = self._calls.errors(graph)
            psnr = self._sampled(graph).psnr_db
        return {
            "nmse": float(errors.mean()),
            "nmse_error": standard_error(errors),
            "errors": [float(error) for error in errors],
            "psnr_db": psnr if math.isfinite(psnr) else None,
        }

    def _key(self, schemes: dict[str, str]) -> str:
        made_of = {
            "schemes": schemes,
            **{name: self.run.digest(name) for name in ("export", "calibrate", "candidates")},
            **self.settings.model_dump(
                include={"samples", "steps", "seed", "sampler", "batch_size"}
            ),
            **version_of("onnxruntime", "numpy"),
        }
        return hashlib.sha256(canonical_json(made_of).encode()).hexdigest()[:32]


def _read(path: Path) -> dict[str, Any] | None:
    """Return the stored figures; None where there are none or the file is damaged."""
    try:
        figures = read_json(path, infinite=True)
    except InputError:
        return None
    complete = isinstance(figures, dict) and {"nmse", "nmse_error", "errors", "psnr_db"} <= set(
        figures
    )
    return figures if complete else None


@dataclass(frozen=True)
class Solved:
    """The plan of a metric at a budget, or why there is none."""

    budget: float
    plan: PrecisionPlan | None = None
    refused: InfeasibleBudgetError | None = None


def solved_plans(
    run: Run, table: SensitivityTable, budgets: tuple[float, ...], cross_terms: bool
) -> tuple[Solved, ...]:
    """Solve every budget for the least of ``table``'s losses: what is compared is not their speed."""
    solver = PlanSolver(run, table=table)
    changes = {"cross_terms": cross_terms, "objective": "quality"}
    solver.section = run.recipe.allocate.model_copy(update=changes)
    solved = []
    for budget in budgets:
        try:
            solved.append(Solved(budget, solver.solve(str(budget))))
        except InfeasibleBudgetError as error:
            solved.append(Solved(budget, refused=error))
    return tuple(solved)


def plan_points(solved: Sequence[Solved], quality: PlanQuality) -> tuple[PlanPoint, ...]:
    """Measure the plans; a budget that none fits says so."""
    points = []
    for one in solved:
        if one.refused is not None:
            points.append(
                PlanPoint(one.budget, refused=str(one.refused), smallest_bytes=one.refused.smallest)
            )
        if one.plan is None:
            continue
        figures = quality.of(one.plan.schemes)
        points.append(
            PlanPoint(
                one.budget,
                one.plan.size_bytes,
                one.plan.size_bytes / one.plan.fp16_size_bytes,
                one.plan.predicted_loss,
                figures["nmse"],
                figures["nmse_error"],
                figures["psnr_db"],
                figures["psnr_db"] is None,
            )
        )
    return tuple(points)


def _open_plans(root: Path, talk: Talk) -> Work:
    """Return what measures plans (layer -> scheme) of the run folder ``root``."""
    run = Run.opened(root, talk)
    quality = PlanQuality(run)

    def work(schemes: dict[str, str], inner: Talk) -> Result:
        quality.run = replace(run, talk=Within.silent(inner))
        figures = quality._measure(schemes)
        psnr = math.nan if figures["psnr_db"] is None else figures["psnr_db"]
        return {
            "nmse": np.array([figures["nmse"], figures["nmse_error"], psnr]),
            "errors": np.array(figures["errors"]),
        }

    return work


def _figures(result: Result) -> dict[str, Any]:
    nmse, error, psnr = result["nmse"].tolist()
    errors = result["errors"].tolist()
    return {
        "nmse": nmse,
        "nmse_error": error,
        "errors": errors,
        "psnr_db": None if math.isnan(psnr) else psnr,
    }
