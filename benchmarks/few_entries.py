"""What plans and predictions are worth from few probe entries, with and without the parts of the projections.

    python benchmarks/few_entries.py [MODEL ...] --page docs/results/few-entries.md

A build measures some calls at each of some timesteps, each by some probes. For each of these counts and each of
several seeds the plan is chosen twice: by the squares of the projections alone, and with the sums of the squares of
their parts (docs/methods.md). Both plans are measured on fresh trajectories. "times the best": the measured error
relative to that of the plan by the most entries. Both figures are ranges over the seeds. The exit code is 1 when a plan
with parts from the fewest entries has more than twice the error of the best, or a prediction with parts is outside 0.6
to 1.6 times what is measured.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from predict import Truth
from table import Page, bench_parser, bench_recipe, markdown, verdict, weights_digest

from mpq_deploy.allocate.plan_solver import PlanSolver
from mpq_deploy.calls.timesteps import sampled_steps
from mpq_deploy.run.pipeline import open_pipeline
from mpq_deploy.run.view import Run
from mpq_deploy.sensitivity.probe import measure_probe
from mpq_deploy.sensitivity.table import SensitivityTable
from mpq_deploy.stages.measure import measured_subject
from mpq_deploy.system.progress import PlainTalk

# Calls at each timestep, probes of each, timesteps: the least that effort quick takes, what it takes of
# small models, the default, and more.
COUNTS = ((1, 1, 5), (3, 1, 14), (12, 1, 20), (12, 4, 20))
SEEDS = (11, 12, 13)
WORST, LEAST, MOST = 2.0, 0.6, 1.6


def table_of(run: Run, counts: tuple[int, int, int], seed: int) -> SensitivityTable:
    """Measure the run's candidates by ``counts`` entries."""
    calls, probes, steps = counts
    section = run.recipe.measure.replace(method="probe", calls=calls, probes=probes, seed=seed)
    chosen = sampled_steps(len(run.calibration.inputs.timesteps), steps)
    return measure_probe(measured_subject(tuple(int(step) for step in chosen), run, None, section))


def rows_of(run: Run, budgets: list[str], truth: Truth) -> dict[str, list[dict[str, float]]]:
    """Return per budget the predicted and measured errors of the plans of all counts and seeds.

    Each with and without parts.
    """
    found: dict[str, list[dict[str, float]]] = {budget: [] for budget in budgets}
    for counts in COUNTS:
        for seed in SEEDS:
            table = table_of(run, counts, seed)
            for budget in budgets:
                row = {"entries": float(counts[0] * counts[1] * counts[2])}
                for name, one in (("squares", replace(table, partial=None)), ("parts", table)):
                    plan = PlanSolver(run, table=one).solve(budget)
                    assert plan.predicted_loss is not None
                    row[f"{name} predicted"] = plan.predicted_loss
                    row[f"{name} measured"] = float(truth.errors(plan.schemes).mean())
                found[budget].append(row)
    return found


def judge(page: Page, title: str, rows: list[dict[str, float]]) -> list[tuple[bool, str]]:
    """Say the table of one model and budget; return its checks."""
    best = sum(row["parts measured"] for row in rows[-len(SEEDS) :]) / len(SEEDS)
    cells = []
    for start in range(0, len(rows), len(SEEDS)):
        same = rows[start : start + len(SEEDS)]
        cells.append([f"{same[0]['entries']:g}"])
        for name in ("squares", "parts"):
            errors = [row[f"{name} measured"] / best for row in same]
            ratios = [row[f"{name} predicted"] / row[f"{name} measured"] for row in same]
            cells[-1] += [f"{min(own):.2f} to {max(own):.2f}" for own in (errors, ratios)]
    page.say(f"## {title}")
    header = (
        "squares: times the best",
        "squares: predicted / measured",
        "parts: times the best",
        "parts: predicted / measured",
    )
    page.say(markdown(("entries", *header), cells))
    worst = max(row["parts measured"] / best for row in rows[: len(SEEDS)])
    ratios = [row["parts predicted"] / row["parts measured"] for row in rows]
    near = min(ratios) >= LEAST and max(ratios) <= MOST
    least = f"{min(ratios):.2f} to {max(ratios):.2f}"
    return [
        (
            worst <= WORST,
            verdict(worst <= WORST, f"{title}: within {WORST:g} times the best", f"{worst:.2f}"),
        ),
        (
            near,
            verdict(
                near, f"{title}: predictions {LEAST} to {MOST} times the measured error", least
            ),
        ),
    ]


def main() -> None:
    parser = bench_parser(__doc__)
    parser.add_argument("models", nargs="*", default=["digits", "emoji"])
    parser.add_argument("--budgets", default="0.35,0.5", help="comma-separated")
    parser.add_argument(
        "--images", type=int, default=128, help="fresh trajectories behind a measured error"
    )
    parser.add_argument(
        "-o", "--out", type=Path, default=Path("runs"), help="where the run folders are"
    )
    chosen = parser.parse_args()
    page, judged = Page("Plans and predictions from few probe entries"), []
    for model in chosen.models:
        recipe = bench_recipe(None, chosen.set, {"model": model, "engine.build": False})
        place = chosen.out / f"few-entries-{Path(model).name}"
        with open_pipeline(recipe, place, PlainTalk()) as pipeline:
            pipeline.run_until("candidates")
            run = pipeline.run
            truth = Truth(run, chosen.images, seed=20261)
            page.say(f"{model}: {weights_digest(run)}")
            for budget, rows in rows_of(run, chosen.budgets.split(","), truth).items():
                judged += judge(page, f"{model}, {budget}", rows)
    page.conclude(judged, chosen.page)


if __name__ == "__main__":
    main()
