"""Joint size against the predicted error of the images: a whole pipeline's run, solved for many budgets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mpq_deploy.errors import InfeasibleBudgetError, InfeasibleLatencyError, UsageError
from mpq_deploy.models.pipeline_parts import Parts
from mpq_deploy.recipe import Recipe
from mpq_deploy.run.folder import open_run
from mpq_deploy.run.pipeline_file import PipelineFile
from mpq_deploy.run.several_parts import WholeRun
from mpq_deploy.studies.sweep import draw
from mpq_deploy.system.files import sealed_json, write_text
from mpq_deploy.system.progress import Talk
from mpq_deploy.system.quantities import Budget


def sweep_whole(recipe: Recipe, run: Path, budgets: Sequence[float], talk: Talk) -> dict[str, Any]:
    """Solve the joint program of ``run`` for each of ``budgets`` (shares of FP16); build nothing.

    Writes sweep.json and sweep.svg. A budget that no plan fits is a point that names the smallest.
    Raises UsageError for a run that is not planned yet.
    """
    view = PipelineFile.load(run)
    if view.size_bytes is None:
        raise UsageError(
            f"{run} has no plan yet, so its parts' gains are unknown.",
            f"Plan it first: mpq-deploy allocate {run}",
        )
    pinned = frozenset(name for name, part in view.parts.items() if part.state == "pinned")
    parts = Parts(*(Path(view.source), view.class_name, view.denoiser), tuple(view.parts), pinned)
    with open_run(run) as folder:
        found = WholeRun(recipe, folder, parts, talk, None).sweep(
            [Budget.parse(budget) for budget in budgets]
        )
        points = [_point(budget, one) for budget, one in zip(budgets, found, strict=True)]
        result = {"points": points, "controls": {}, "of": "final images", "parts": list(view.parts)}
        write_text(run / "sweep.json", sealed_json(result))
        draw(result, run / "sweep.svg")
    return result


def _point(
    budget: float, found: PipelineFile | InfeasibleBudgetError | InfeasibleLatencyError
) -> dict[str, Any]:
    if isinstance(found, InfeasibleBudgetError):
        return {"budget": budget, "smallest_feasible_bytes": found.smallest}
    if isinstance(found, InfeasibleLatencyError):
        return {"budget": budget, "minimum_latency_ms": found.minimum_ns / 1e6}
    size, fp16 = found.size_bytes or 0, found.fp16_size_bytes or 1
    kept = {"fp16_size_bytes", "size_bytes", "predicted_nmse", "predicted_image_error", "image_ms"}
    return {
        "budget": budget,
        "size_bytes": size,
        "size_ratio": size / fp16,
        # Of the final images, as all errors of a whole pipeline.
        "predicted_nmse": found.predicted_image_error,
        "latency_ms": found.image_ms,
        "parts": {name: part.model_dump(include=kept) for name, part in found.parts.items()},
    }


def whole_sweep_table(result: dict[str, Any]) -> str:
    """Return the points as a table for the terminal: each part's bytes as a share of its FP16."""
    names = result["parts"]
    head = f"{'budget':>8} {'of FP16':>8} {'bytes':>14} {'predicted':>10} {'ms/image':>9}"
    lines = [" ".join([head, *(f"{name:>12}" for name in names)])]
    for point in result["points"]:
        start = f"{point['budget']:>8.4f}"
        if "minimum_latency_ms" in point:
            fastest = f"{point['minimum_latency_ms']:.3f} ms"
            lines.append(f"{start} no plan is fast enough: the fastest takes {fastest} per image")
            continue
        if "smallest_feasible_bytes" in point:
            smallest = f"{point['smallest_feasible_bytes']:,} bytes"
            lines.append(f"{start} no plan of all parts fits: the smallest is {smallest}")
            continue
        time = point["latency_ms"]
        shares = [
            f"{part['size_bytes'] / part['fp16_size_bytes']:>{max(12, len(name))}.4f}"
            for name, part in point["parts"].items()
        ]
        figures = (
            f"{point['size_ratio']:>8.4f} {point['size_bytes']:>14,} {point['predicted_nmse']:>10.2e} "
            f"{'-' if time is None else f'{time:.3g}':>9}"
        )
        lines.append(" ".join([start, figures, *shares]))
    return "\n".join(lines)
