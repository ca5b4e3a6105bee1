"""sweep.html: measured points on the predicted curve, uniform plans, and the budgets' slider.

In: what ``run_sweep`` returns (sweep.json) and the plans of the curve. Out: one page.
"""

from __future__ import annotations

from typing import Any

from mpq_deploy.report import words
from mpq_deploy.report.budget_curve import Mark, milliseconds, view
from mpq_deploy.report.data import BudgetPlans
from mpq_deploy.report.page import asset, rendered
from mpq_deploy.report.shown_errors import ShownErrors

COLUMNS = ("Budget", "Of FP16", "Size", "Predicted error", "Measured error", "PSNR")


def sweep_page(result: dict[str, Any], plans: BudgetPlans, about: dict[str, str]) -> str:
    """Return the page. ``about``: model, target, synthetic and command; all is escaped."""
    points = [point for point in result["points"] if "size_bytes" in point]
    fp16_size = round(points[0]["size_bytes"] / points[0]["size_ratio"]) if points else 1
    shown = _shown(points)
    marks = [
        Mark("swept", "", point["size_ratio"], shown.measured(point), _predicted(point, shown))
        for point in points
    ]
    marks += [
        Mark(name, control["title"], control["size_ratio"], shown.measured(control))
        for name, control in result["controls"].items()
    ]
    simulated = bool(result.get("simulated"))
    return rendered(
        "sweep.html.j2",
        **about,
        budgets=view(plans, fp16_size, marks, simulated=simulated) if plans.plans else None,
        curve_note=" ".join([_note(result), *_fusion(points)]),
        columns=[*COLUMNS, f"Time, {plans.times.source}"] if plans.times else COLUMNS,
        rows=[
            *([*_row(point, shown), *_time(point, plans)] for point in points),
            *([*_control(c), *_time(c, plans)] for c in result["controls"].values()),
        ],
        refused=[_refused(point) for point in result["points"] if "size_bytes" not in point],
        simulated=simulated,
        lead=_lead(points, simulated),
        script=asset("budgets.js"),
    )


def _lead(points: list[dict[str, Any]], simulated: bool) -> str:
    measured = [point for point in points if point.get("measured_nmse") is not None]
    nominal = "Simulated, with nominal bytes: " if simulated else ""
    if not measured:
        return f"{nominal}{words.count(len(points), 'budget')}, predicted; --evaluate or --points measures them."
    shown = _shown(points)
    pairs = [(_predicted(point, shown), shown.measured(point)) for point in measured]
    compared = [predicted / found for predicted, found in pairs if predicted and found]
    text = f"{nominal}{words.count(len(measured), 'budget')} measured"
    if not compared:
        return f"{text}."
    what = "predicted squared error of the images" if shown.of_images else "prediction"
    return f"{text}: the {what} lies between {min(compared):.2f} and {max(compared):.2f} times what was measured."


def _shown(points: list[dict[str, Any]]) -> ShownErrors:
    return ShownErrors.of(point.get("predicted_psnr_db") for point in points)


def _predicted(point: dict[str, Any], shown: ShownErrors) -> float | None:
    return shown.predicted(point["predicted_nmse"], point.get("predicted_psnr_db"))


def _fusion(points: list[dict[str, Any]]) -> list[str]:
    """Say on what the times count products as one kernel: of the largest plan, in a sentence."""
    said = [point["fusion"] for point in points if point.get("fusion")][-1:]
    return [f"Times, for the largest plan: {text}." for text in said]


def _note(result: dict[str, Any]) -> str:
    if not result.get("curve"):
        return "The plans are those of this sweep."
    objective = result.get("objective", "quality")
    if objective == "quality":
        return (
            "The measured plans are also refined with the cross terms between layers, so they may "
            "lie a little below the line."
        )
    return (
        f"The measured plans are those of the recipe's objective ({objective}), which chooses faster ones than the "
        "line's, so they may lie above it."
    )


def _row(point: dict[str, Any], shown: ShownErrors) -> list[str]:
    predicted = _predicted(point, shown)
    psnr = words.decibels(point.get("psnr_db"), point.get("measured_nmse") == 0)
    return [
        f"{point['budget']:.4f}",
        words.percent(point["size_ratio"]),
        words.size(point["size_bytes"]),
        words.NOT_PREDICTED if predicted is None else shown.text(predicted),
        words.error(point.get("measured_nmse")),
        psnr,
    ]


def _time(point: dict[str, Any], plans: BudgetPlans) -> list[str]:
    """Return the cell of a time, where plans have one; empty for a control."""
    if plans.times is None:
        return []
    return [milliseconds(point["latency_ms"]) if point.get("latency_ms") else ""]


def _control(control: dict[str, Any]) -> list[str]:
    ratio, psnr = words.percent(control["size_ratio"]), words.decibels(control["psnr_db"])
    return [control["title"], ratio, "", "", words.error(control["measured_nmse"]), psnr]


def _refused(point: dict[str, Any]) -> str:
    if "minimum_latency_ms" in point:
        return f"{point['budget']:.4f}: no plan is fast enough; the fastest takes {point['minimum_latency_ms']:.3f} ms."
    return f"{point['budget']:.4f}: no plan fits; the smallest takes {point['smallest_feasible_bytes']:,} bytes."
