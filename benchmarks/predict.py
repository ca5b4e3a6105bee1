"""How near the predicted error comes to the measured one, and what the cross terms between layers are worth.

    python benchmarks/predict.py [MODEL ...] --budgets 0.26:0.5

The bundled models by default. For every budget: the MILP's plan and the plan refined with the cross terms, each with
its predicted error (the full quadratic, on calls that the plan was not chosen on) and the error measured on fresh
trajectories: the squared error of the denoiser's output relative to the float model's, averaged over the sampler's
timesteps. Images differ much in how hard they are, so a measured error has a standard error of its own (between
images), which the table shows; that of the difference between the two plans is smaller: both see the same images.
"change" and its error are of the measured error. PSNR (mean over images, 64 of each of two seeds) stands where the
plans differ. Exit code 1 when a prediction of the resulting plan is off by more than 10 %, when refining makes any plan
worse by more than two standard errors, or when it brings no model a gain of that size.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from table import (
    Page,
    bench_parser,
    bench_recipe,
    made_by_stages,
    markdown,
    verdict,
    weights_digest,
)

from mpq_deploy.allocate.plan_solver import PlanSolver
from mpq_deploy.errors import InfeasibleBudgetError
from mpq_deploy.evaluate.evaluate import Variant, evaluate
from mpq_deploy.evaluate.fresh import FreshCalls, standard_error
from mpq_deploy.graph.writers.deployed_graphs import SIMULATED
from mpq_deploy.graph.writers.plan_graphs import write_plan
from mpq_deploy.models.spec import Array
from mpq_deploy.recipe import EvaluateSettings
from mpq_deploy.run.pipeline import open_pipeline
from mpq_deploy.run.view import Run
from mpq_deploy.studies.sweep import parse_budgets
from mpq_deploy.system.progress import PlainTalk, Talk

TOLERANCE = 0.1
STEPS = 20
SIGNIFICANT = 2.0  # standard errors
PSNR_SEEDS, PSNR_IMAGES = (777, 4242), 64
STAGES = ("export", "calibrate", "candidates", "measure")


@dataclass(frozen=True)
class Row:
    """One budget: predicted and measured errors of both plans, relative standard errors, and the cross terms."""

    budget: float
    predicted: float
    measured: float
    error: float
    milp_measured: float
    change_error: float
    cross_terms: dict[str, Any]
    psnr_db: tuple[float, float] | None

    @property
    def change(self) -> float:
        """By how much refining changes the measured error, relative to the MILP's plan."""
        return self.measured / self.milp_measured - 1


class Truth:
    """The float model on fresh trajectories, and the error of any plan there."""

    def __init__(self, run: Run, images: int, seed: int) -> None:
        self.run, self.exported = run, run.exported
        settings = run.recipe.evaluate.replace(samples=images, steps=STEPS, seed=seed)
        self._calls = FreshCalls(self.exported.model, settings, Talk())
        self._kept: dict[str, Array] = {}

    def errors(self, schemes: dict[str, str]) -> Array:
        """Return each call's relative squared error, mean over timesteps; their mean is the measured error."""
        key = repr(sorted(schemes.items()))
        if key not in self._kept:
            with tempfile.TemporaryDirectory(dir=self.run.scratch()) as folder:
                write_plan(self.run, schemes, Path(folder))
                self._kept[key] = self._calls.errors(Path(folder) / SIMULATED)
        return self._kept[key]


def relative_error(values: Array, of: float) -> float:
    """Return the standard error of the mean of ``values``, relative to ``of``."""
    return standard_error(values) / of


def psnr(run: Run, plans: list[dict[str, str]]) -> tuple[float, ...]:
    """Return the PSNR of each plan: mean over the images of all seeds."""
    exported = run.exported
    found = []
    with tempfile.TemporaryDirectory(dir=run.scratch()) as folder:
        variants = {}
        for number, schemes in enumerate(plans):
            place = Path(folder) / str(number)
            place.mkdir()
            write_plan(run, schemes, place)
            variants[str(number)] = Variant(place / SIMULATED)
        for seed in PSNR_SEEDS:
            settings = EvaluateSettings(samples=PSNR_IMAGES, steps=STEPS, timesteps=1, seed=seed)
            result = evaluate(variants, exported.model, settings, cache=run.path / ".samples")
            found.append([result.variants[name].psnr_db for name in variants])
    return tuple(float(value) for value in np.mean(found, axis=0))


def row_of(run: Run, truth: Truth, solvers: dict[bool, PlanSolver], budget: float) -> Row | None:
    """Solve one budget with and without the cross terms, and measure both plans; None when no plan fits."""
    try:
        plan, plain = (solvers[refined].solve(str(budget)) for refined in (True, False))
    except InfeasibleBudgetError:
        return None
    errors, plain_errors = truth.errors(plan.schemes), truth.errors(plain.schemes)
    measured, base = float(errors.mean()), float(plain_errors.mean())
    assert plan.predicted_loss is not None and plan.cross_terms is not None
    differ = plan.schemes != plain.schemes
    return Row(
        budget,
        plan.predicted_loss,
        measured,
        relative_error(errors, measured),
        base,
        relative_error(errors - plain_errors, base),
        plan.cross_terms,
        psnr(run, [plain.schemes, plan.schemes])[:2] if differ else None,  # type: ignore[arg-type]
    )


def cells(row: Row) -> list[str]:
    crossed = row.cross_terms
    held = [crossed["milp_held_back"], crossed["refined_held_back"]]
    predicted = "-" if None in held else f"{held[1] / held[0] - 1:+.1%}"
    return [
        f"{row.budget:g}",
        f"{row.predicted:.2e}",
        f"{row.measured:.2e} ± {row.error:.0%}",
        f"{row.predicted / row.measured:.2f}",
        f"{crossed['rho']:.2f}",
        f"{crossed['moves']}" + ("" if crossed["kept"] or not crossed["moves"] else " (not kept)"),
        predicted,
        f"{row.change:+.1%} ± {row.change_error:.1%}" if crossed["kept"] else "",
        f"{row.psnr_db[0]:.1f} → {row.psnr_db[1]:.1f}" if row.psnr_db else "",
    ]


def checks(model: str, rows: list[Row]) -> list[tuple[bool, str]]:
    """Judge the rows of one model."""
    ratios = {row.budget: row.predicted / row.measured for row in rows}
    low, high = min(ratios, key=ratios.__getitem__), max(ratios, key=ratios.__getitem__)
    near = all(abs(ratio - 1) <= TOLERANCE for ratio in ratios.values())
    found = f"{ratios[low]:.2f} (at {low:g}) to {ratios[high]:.2f} (at {high:g})"
    worst = max(rows, key=lambda row: row.change)
    harmless = all(row.change <= SIGNIFICANT * row.change_error for row in rows)
    return [
        (
            near,
            verdict(
                near, f"{model}: predictions lie within {TOLERANCE:.0%} of what was measured", found
            ),
        ),
        (
            harmless,
            verdict(
                harmless,
                f"{model}: refining makes no plan worse beyond noise",
                f"{worst.change:+.1%} ± {worst.change_error:.1%} at most (at {worst.budget:g})",
            ),
        ),
    ]


def main() -> None:
    parser = bench_parser(__doc__)
    parser.add_argument(
        "models", nargs="*", default=["emoji", "digits"], help="what `mpq-deploy build` takes"
    )
    parser.add_argument(
        "--budgets", default="0.26:0.5", help="FROM:TO, FROM:TO:STEP or a comma-separated list"
    )
    parser.add_argument(
        "--images", type=int, default=640, help="fresh trajectories behind every measured error"
    )
    parser.add_argument("--seed", type=int, default=20260)
    parser.add_argument(
        "-o", "--out", type=Path, default=Path("runs"), help="where the run folders are"
    )
    chosen = parser.parse_args()
    page = Page("Predicted and measured error, and the cross terms between layers")
    judged, best = [], []
    for model in chosen.models:
        # The output's error is predicted, so it is measured.
        values = {"model": model, "engine.build": False, "measure.method": "probe"}
        recipe = bench_recipe(None, chosen.set, {**values, "allocate.cross_terms": True})
        name = Path(model).stem
        with open_pipeline(recipe, chosen.out / f"bench-predict-{name}", PlainTalk()) as pipeline:
            pipeline.run_until("measure")
            page.say(
                f"## {name}\n\n{weights_digest(pipeline.run)}\n\n{made_by_stages(pipeline.run, STAGES)}"
            )
            truth = Truth(pipeline.run, chosen.images, chosen.seed)
            solvers = {refined: PlanSolver(pipeline.run) for refined in (True, False)}
            solvers[False].section = recipe.allocate.model_copy(update={"cross_terms": False})
            found = [
                row_of(pipeline.run, truth, solvers, budget)
                for budget in parse_budgets(chosen.budgets)
            ]
        rows = [row for row in found if row is not None]
        header = (
            "budget",
            "predicted",
            "measured",
            "predicted / measured",
            "rho",
            "moves",
            "change held back",
        )
        page.say(markdown((*header, "change measured", "PSNR dB"), [cells(row) for row in rows]))
        judged += checks(name, rows)
        best.append(
            min(
                rows,
                key=lambda row: row.change / max(row.change_error, 1e-12) if row.change else 0.0,
            )
        )
    gains = any(row.change < -SIGNIFICANT * row.change_error for row in best)
    said = ", ".join(
        f"{row.change:+.1%} ± {row.change_error:.1%} (at {row.budget:g})" for row in best
    )
    judged.append((gains, verdict(gains, "refining gains somewhere beyond noise", said)))
    page.conclude(judged, chosen.page)


if __name__ == "__main__":
    main()
