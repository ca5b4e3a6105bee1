"""The curve of size against quality: one measured run, solved for many budgets.

Without ``evaluate`` each point is the plan's predicted loss; with it each budget is also quantized
and compared with the float model (in a folder of its own, so the run's plan stays). The budgets are
given, or a number of points spread over the predicted curve.
"""

from __future__ import annotations

import math
import shlex
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mpq_deploy.allocate.front import least_so_far
from mpq_deploy.errors import InfeasibleBudgetError, InfeasibleLatencyError, UsageError
from mpq_deploy.report.shown_errors import ShownErrors
from mpq_deploy.run.folder import RECIPE
from mpq_deploy.run.view import SAMPLES, Run
from mpq_deploy.system.files import sealed_json, write_text
from mpq_deploy.system.progress import Talk

if TYPE_CHECKING:
    from mpq_deploy.allocate.plan import PrecisionPlan
    from mpq_deploy.allocate.plan_solver import PlanSolver
    from mpq_deploy.report.data import BudgetPlans
    from mpq_deploy.system.parallel.work import Result, Work

# Points of FROM:TO when no step is given.
DEFAULT_POINTS = 13
MOST_POINTS = 500
# Up to here --points spreads its budgets: about where everything INT8 is, in shares of FP16 (our
# choice).
HIGHEST = 0.5


def parse_budgets(text: str) -> list[float]:
    """Parse ``0.26:0.5``, ``0.26:0.5:0.02`` or ``0.28,0.35``: ascending fractions of the FP16 size."""
    try:
        if ":" in text:
            parts = [float(part) for part in text.split(":")]
            if len(parts) not in (2, 3):
                raise ValueError
            low, high = parts[:2]
            step = parts[2] if len(parts) == 3 else (high - low) / (DEFAULT_POINTS - 1)
            if not (0 < low <= high <= 1) or (step <= 0 and high > low):
                raise ValueError
            count = 1 if high == low else int((high - low) / step + 1e-9) + 1
            budgets = [round(low + i * step, 6) for i in range(min(count, MOST_POINTS + 1))]
        else:
            budgets = sorted({float(part) for part in text.split(",")})
    except ValueError as error:
        raise UsageError(
            f"Invalid budgets '{text}'.",
            "Give FROM:TO, FROM:TO:STEP or a comma-separated list of fractions, such as 0.26:0.5:0.02.",
        ) from error
    if not budgets or not all(0 < b <= 1 and np.isfinite(b) for b in budgets):
        raise UsageError(
            f"The budgets '{text}' are not between 0 and 1.", "Give fractions of the FP16 size."
        )
    if len(budgets) > MOST_POINTS:
        raise UsageError(f"'{text}' is more than {MOST_POINTS} budgets.", "Give a larger step.")
    return budgets


def spread_over(sizes: Sequence[float], losses: Sequence[float | None], count: int) -> list[int]:
    """Choose ``count`` points of a curve, ascending: its ends, and others evenly along it.

    ``sizes`` ascend; ``losses`` are on a logarithmic axis. Points that a smaller plan equals are
    not on the curve; those without a positive loss count by their size alone. Our choice.
    """
    frontier = least_so_far(losses)
    width = (sizes[frontier[-1]] - sizes[frontier[0]]) or 1.0
    logs = [np.log10(loss) if loss else None for loss in (losses[i] for i in frontier)]
    known = [log for log in logs if log is not None]
    height = (max(known) - min(known) if known else 0.0) or 1.0
    along = [0.0]
    for (first, one), (second, other) in pairwise(zip(frontier, logs)):
        across = (sizes[second] - sizes[first]) / width
        down = (one - other) / height if one is not None and other is not None else 0.0
        along.append(along[-1] + float(np.hypot(across, down)))
    places = np.linspace(0.0, along[-1], min(count, len(frontier)))
    return sorted({frontier[int(np.argmin(np.abs(np.array(along) - at)))] for at in places})


def errors_of(points: Sequence[dict[str, Any]]) -> ShownErrors:
    """Return the errors that the points of a sweep are predicted in."""
    return ShownErrors.of(point.get("predicted_psnr_db") for point in points)


def predicted_error(point: dict[str, Any], shown: ShownErrors) -> float | None:
    """Return the predicted error of a point or of a plan of the curve."""
    return shown.predicted(point["predicted_nmse"], point.get("predicted_psnr_db"))


def points_on_curve(
    plans: BudgetPlans,
    fp16_size: int,
    count: int,
    highest: float = HIGHEST,
    limit_ms: float = math.inf,
) -> list[float]:
    """Return ``count`` ascending budgets spread over the predicted curve, at most ``highest``.

    ``limit_ms``: the longest call that the recipe allows; slower plans are not on the curve.
    """
    fast = [plan for plan in plans.plans if (plan.latency_ms or 0.0) <= limit_ms] or plans.plans
    low = [plan for plan in fast if plan.size_bytes <= highest * fp16_size] or fast[:1]
    shown = ShownErrors.of(plan.predicted_psnr_db for plan in low)
    chosen = spread_over(
        [p.size_bytes / fp16_size for p in low],
        [shown.predicted(p.predicted_nmse, p.predicted_psnr_db) for p in low],
        count,
    )
    # Rounded up, so that the plan still fits.
    return sorted({math.ceil(low[i].size_bytes / fp16_size * 1e4) / 1e4 for i in chosen})


def run_sweep(
    run: Run,
    budgets: list[float],
    evaluate: bool,
    points_wanted: int | None = None,
    command: str = "",
) -> dict[str, Any]:
    """Solve (with ``evaluate``: and measure) every budget; write sweep.json, .svg and .html.

    A budget that no plan fits is a point that names the smallest feasible budget.
    ``points_wanted``: in place of ``budgets``, that many of the predicted curve, measured.
    """
    from mpq_deploy.allocate.plan_solver import PlanSolver, PredictedPlan
    from mpq_deploy.report.budget_plans import front_plans, packed
    from mpq_deploy.report.sweep_page import sweep_page

    solver = PlanSolver(run)
    curve: BudgetPlans | None = None
    if points_wanted is not None:
        curve, limit = front_plans(solver), solver.section.max_latency
        limit_ms = limit.nanoseconds / 1e6 if limit else math.inf
        budgets = points_on_curve(curve, solver.fp16_size, points_wanted, HIGHEST, limit_ms)
        evaluate = True
    plans, points = _solve(run, solver, budgets)
    controls = _measure(run, plans, points) if evaluate else {}
    simulated = any(plan.simulated for plan in plans.values())
    result = {
        "measure": run.digest("measure"),
        "points": points,
        "controls": controls,
        "simulated": simulated,
        "objective": solver.objective,
    }
    if curve is not None:
        result["curve"] = [
            {
                "size_ratio": plan.size_bytes / solver.fp16_size,
                "predicted_nmse": plan.predicted_nmse,
                "predicted_psnr_db": plan.predicted_psnr_db,
                "latency_ms": plan.latency_ms,
            }
            for plan in curve.plans
        ]
    write_text(run.path / "sweep.json", sealed_json(result))
    draw(result, run.path / "sweep.svg")
    shown = curve or packed(solver, [PredictedPlan.of(plan) for plan in plans.values()])
    write_text(run.path / "sweep.html", sweep_page(result, shown, _about(run, solver, command)))
    return result


def _solve(
    run: Run, solver: PlanSolver, budgets: list[float]
) -> tuple[dict[float, PrecisionPlan], list[dict[str, Any]]]:
    """Return the plan of each budget that one fits, and the points of all budgets."""
    plans, points = {}, []
    with run.talk.bar("solve budgets", len(budgets)) as advance:
        for budget in budgets:
            point: dict[str, Any] = {"budget": budget}
            try:
                plan = plans[budget] = solver.solve(str(budget))
                point["size_bytes"] = plan.size_bytes
                point["size_ratio"] = plan.size_bytes / plan.fp16_size_bytes
                images = plan.predicted_images
                point["predicted_nmse"] = plan.predicted_loss
                point["predicted_psnr_db"] = images.psnr_db if images else None
                point["latency_ms"] = plan.latency.ours_ms if plan.latency else None
                point["fusion"] = plan.latency.fusion if plan.latency else ""
            except InfeasibleBudgetError as error:
                point["smallest_feasible_bytes"] = error.smallest
            except InfeasibleLatencyError as error:
                point["minimum_latency_ms"] = error.minimum_ns / 1e6
            points.append(point)
            advance(1)
    return plans, points


def _about(run: Run, solver: PlanSolver, command: str) -> dict[str, str]:
    """Say what was swept, for the page."""
    spec, target = solver.exported.spec, run.target
    return {
        "model": spec.name,
        "synthetic": spec.synthetic,
        "target": target.title or target.name,
        "command": command or f"mpq-deploy sweep {shlex.quote(str(run.path))}",
    }


def _measure(
    run: Run, plans: dict[float, PrecisionPlan], points: list[dict[str, Any]]
) -> dict[str, Any]:
    """Evaluate every plan beside the controls; fill in the points, return the controls' figures."""
    from mpq_deploy.report.collect import titles

    figures: dict[str, Any] = {}
    chosen = [point for point in points if point["budget"] in plans]
    measured = _measured_plans(run, [plans[point["budget"]] for point in chosen])
    for point, variants in zip(chosen, measured):
        plan, ours = plans[point["budget"]], variants["ours"]
        point.update({name: _finite(value) for name, value in ours.items() if name != "size_bytes"})
        point["measured_nmse"] = ours["measured_nmse"]
        figures = {
            name: {
                "title": titles(plan).get(name, name),
                "size_ratio": control["size_bytes"] / plan.fp16_size_bytes,
                "measured_nmse": control["measured_nmse"],
                "psnr_db": _finite(control["psnr_db"]),
                "pooled_psnr_db": _finite(control["pooled_psnr_db"]),
            }
            for name, control in variants.items()
            if name != "ours"
        }
        run.talk.line(f"  {point['size_ratio']:.4f} of FP16: PSNR {ours['psnr_db']:.1f} dB")
    run.remove_shards("sweep")
    return figures


@dataclass(frozen=True)
class _Plan:
    """A plan to quantize and measure: layer -> scheme, and its bytes."""

    schemes: dict[str, str]
    size_bytes: int


FIGURES = ("measured_nmse", "psnr_db", "pooled_psnr_db", "size_bytes")


def _measured_plans(
    run: Run, plans: Sequence[PrecisionPlan]
) -> Iterator[dict[str, dict[str, float]]]:
    """Yield each plan's and the controls' ``FIGURES`` by variant; measure the first plan here.

    By then the float model's samples and the controls' are in the cache that workers read.
    """
    from mpq_deploy.run.stage import settings, version_of
    from mpq_deploy.system.parallel.work import Job, Shard, run_shards

    tasks = [_Plan(plan.schemes, plan.size_bytes) for plan in plans]
    if not tasks:
        return
    store = run.shard_cache("sweep")
    stages = ("export", "calibrate", "candidates", "controls")
    made_of: dict[str, Any] = {name: run.digest(name) for name in stages}
    made_of |= {**settings(run.recipe.evaluate, "evaluate"), **version_of("onnxruntime", "numpy")}
    made_of |= {"threads": asdict(run.crew.threads_of_shard())}
    shards = [
        Shard(
            f"{task.size_bytes:,} bytes",
            task,
            1,
            {"part": "sweep", **made_of, "schemes": task.schemes},
        )
        for task in tasks
    ]
    yield _figures(_measure_plan(run, tasks[0]))
    files = (RECIPE, "export", "calibrate", "candidates", "controls", SAMPLES)
    size = sum(file.stat().st_size for file in run.stage("export").iterdir())
    job = Job("measuring plans", *run.for_workers(_open_plans, *files), 4 * size)
    with run.crew.open(job, run.talk) as pool:
        for result in run_shards(pool, "measure plans", shards[1:], run.talk, store):
            yield _figures(result)


def _open_plans(root: Path, talk: Talk) -> Work:
    """Return what quantizes and measures a ``_Plan`` of the run folder ``root``."""
    run = Run.opened(root, talk)

    def work(task: _Plan, inner: Talk) -> Result:
        return _measure_plan(replace(run, talk=inner), task)

    return work


def _measure_plan(run: Run, task: _Plan) -> Result:
    """Return the ``FIGURES`` of a plan and of the controls, float64 [4], by variant."""
    from mpq_deploy.evaluate.variants import evaluate_variants
    from mpq_deploy.graph.writers.deployed_graphs import SIMULATED
    from mpq_deploy.graph.writers.plan_graphs import write_plan

    # Controls stand beside plans of all budgets, so that they have all images: sampled once.
    every = run.recipe.evaluate.replace(controls_images="all")
    run = replace(run, recipe=run.recipe.model_copy(update={"evaluate": every}))
    with tempfile.TemporaryDirectory(dir=run.scratch()) as folder:
        write_plan(run, task.schemes, Path(folder))
        result = evaluate_variants(run, Path(folder) / SIMULATED, task.size_bytes, latency=False)
    return {
        name: np.array([getattr(variant, figure) or 0 for figure in FIGURES], np.float64)
        for name, variant in result.variants.items()
    }


def _figures(result: Result) -> dict[str, dict[str, float]]:
    return {name: dict(zip(FIGURES, values.tolist())) for name, values in result.items()}


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


def sweep_table(result: dict[str, Any]) -> str:
    """The points as a table for the terminal."""
    lines = [
        f"{'budget':>8} {'of FP16':>8} {'bytes':>14} {'predicted':>10} {'measured':>10} {'PSNR dB':>8}"
    ]
    for point in result["points"]:
        if "minimum_latency_ms" in point:
            fastest = f"{point['minimum_latency_ms']:.3f} ms"
            lines.append(
                f"{point['budget']:>8.4f} no plan is fast enough: the fastest takes {fastest}"
            )
            continue
        if "size_bytes" not in point:
            smallest = f"{point['smallest_feasible_bytes']:,} bytes"
            lines.append(f"{point['budget']:>8.4f} no plan fits: the smallest is {smallest}")
            continue
        measured = f"{point['measured_nmse']:.2e}" if "measured_nmse" in point else "-"
        # None: the metric predicts no error.
        predicted = "-" if point["predicted_nmse"] is None else f"{point['predicted_nmse']:.2e}"
        if point.get("predicted_psnr_db") is not None:
            predicted = f"{point['predicted_psnr_db']:.1f} dB"
        lines.append(
            f"{point['budget']:>8.4f} {point['size_ratio']:>8.4f} {point['size_bytes']:>14,} "
            f"{predicted:>10} {measured:>10} {_decibels(point.get('psnr_db')):>8}"
        )
    for name, control in result["controls"].items():
        lines.append(
            f"{name:>8} {control['size_ratio']:>8.4f} {'':>14} {'':>10} "
            f"{control['measured_nmse']:>10.2e} {_decibels(control['psnr_db']):>8}"
        )
    if result.get("simulated"):
        lines.append("simulated: bytes are nominal, no engine can hold these plans")
    return "\n".join(lines)


def _decibels(psnr_db: float | None) -> str:
    return "-" if psnr_db is None else f"{psnr_db:.1f}"


def _predicted(
    plans: Sequence[dict[str, Any]], measured: Sequence[dict[str, Any]], shown: ShownErrors
) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """Return the plans' (share of FP16, predicted error), and those of the least error of their size.

    None is far below what was measured: that would only stretch the axis.
    """
    floor = min((shown.measured(p) or 0.0 for p in measured), default=0.0) / 100
    errors = [(p["size_ratio"], predicted_error(p, shown)) for p in plans]
    known = sorted((size, error) for size, error in errors if error is not None)
    line = [known[number] for number in least_so_far([loss for _, loss in known])]
    return [p for p in known if p[1] >= floor], [p for p in line if p[1] >= floor]


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw predicted (line) and measured (dots) error against size, the same bytes each time."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot as plt

    points = [p for p in result["points"] if "size_ratio" in p]
    shown = errors_of(points)
    measured = [p for p in points if "measured_nmse" in p and shown.measured(p) is not None]
    with matplotlib.rc_context({"svg.hashsalt": "sweep", "font.size": 10}):
        figure, axes = plt.subplots(figsize=(6.4, 4))
        drawn, line = _predicted(result.get("curve", points), measured, shown)
        if drawn:
            others = "other plans" if len(drawn) > len(line) else None
            axes.plot(*zip(*drawn), ".", color="0.75", markersize=4, label=others)
            axes.plot(*zip(*line), label="least predicted")
        if measured:
            sizes = [p["size_ratio"] for p in measured]
            errors: list[Any] = [shown.measured(p) for p in measured]
            axes.plot(sizes, errors, "o", label="measured")
        for name, control in result["controls"].items():
            error = shown.measured(control)
            if error is not None:
                axes.plot(control["size_ratio"], error, "s", color="0.4")
                axes.annotate(control.get("title", name), (control["size_ratio"], error))
        if drawn or measured:
            axes.set_yscale("log")
        nominal = "nominal bytes (simulated)" if result.get("simulated") else "bytes"
        axes.set_xlabel(f"{nominal} of all constants, as a share of FP16")
        of_parts = f"relative squared error of the {result.get('of', 'output')}"
        axes.set_ylabel(shown.axis if shown.of_images else of_parts)
        axes.grid(alpha=0.3)
        if drawn or measured:
            axes.legend(frameon=False)
        figure.tight_layout()
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)
