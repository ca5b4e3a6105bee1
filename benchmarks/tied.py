"""What it costs that queries, keys and values of one input share a scheme, at equal budgets.

    python benchmarks/tied.py [MODEL ...] --budgets 0.28,0.3,0.35,0.42,0.5

Each model is measured once, then solved for every budget with and without `allocate.tie_qkv`, for
the least error. "Sum" is what the integer program minimizes, the sum of the layers' losses, which
tying can only raise. "Predicted" is the error with the cross terms, from calls that the plan was
not chosen on: few calls make it noisy. "Alike" counts the groups that share a scheme without having
to. Times are the roofline's, of one call on the target, where products of one input and an equal
scheme of FP16 or W8A8 count as one kernel.
"""

from __future__ import annotations

from pathlib import Path

from table import Page, bench_parser, bench_recipe, markdown

from mpq_deploy.allocate.plan_solver import PlanSolver
from mpq_deploy.formats.scheme import SCHEMES
from mpq_deploy.recipe import recipe_file
from mpq_deploy.run.pipeline import open_pipeline
from mpq_deploy.run.view import Run
from mpq_deploy.system.progress import PlainTalk


def rows_of(run: Run, model: str, budgets: list[str]) -> list[list[str]]:
    """Solve one model for each budget, apart and tied."""
    apart, tied = PlanSolver(run), PlanSolver(run)
    apart.groups = []
    rows = []
    for budget in budgets:
        plans = [solver.solve(budget) for solver in (apart, tied)]
        errors = [plan.predicted_loss or 0.0 for plan in plans]
        times = ["-", "-"]
        if tied.costs is not None:
            times = [
                f"{tied.costs.plan_ns(tied.layers, {n: SCHEMES[s] for n, s in p.schemes.items()}) / 1e6:.3f}"
                for p in plans
            ]
        groups = plans[1].tied
        alike = sum(len({plans[0].schemes[name] for name in group}) == 1 for group in groups)
        sums = [plan.solver.loss for plan in plans]
        shown = [
            cell
            for pair in (sums, errors)
            for cell in (f"{pair[0]:.2e}", f"{pair[1]:.2e}", f"{pair[1] / pair[0] - 1:+.1%}")
        ]
        rows.append([model, budget, f"{alike} of {len(groups)}", *shown, *times])
    return rows


def main() -> None:
    parser = bench_parser(__doc__)
    parser.add_argument("models", nargs="*", default=["emoji", "digits"])
    parser.add_argument("--budgets", default="0.28,0.3,0.35,0.42,0.5")
    parser.add_argument("--recipe", help="a recipe's name or file")
    parser.add_argument("-o", "--out", type=Path, default=Path("runs"))
    chosen = parser.parse_args()
    page = Page("Queries, keys and values under one scheme")
    page.say((__doc__ or "").split("\n\n")[2].replace("\n", " "))
    rows = []
    for model in chosen.models:
        file = recipe_file(chosen.recipe) if chosen.recipe else None
        recipe = bench_recipe(file, chosen.set, {"model": model, "measure.method": "probe"})
        with open_pipeline(recipe, chosen.out / f"bench-tied-{model}", PlainTalk()) as pipeline:
            pipeline.run_until("measure")
            rows += rows_of(pipeline.run, model, chosen.budgets.split(","))
    header: tuple[str, ...] = (
        "model",
        "budget",
        "alike",
        "sum apart",
        "tied",
        "more",
        "predicted apart",
        "tied",
    )
    header += ("more", "ms apart", "tied")
    page.say(markdown(header, rows))
    page.save(chosen.page)


if __name__ == "__main__":
    main()
