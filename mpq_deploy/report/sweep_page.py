"""sweep.html: measured points on the predicted curve, uniform plans, and the budgets' slider.

In: what ``run_sweep`` returns (sweep.json) and the plans of the curve. Out: one page.
"""

from __future__ import annotations

from typing import Any

from mpq_deploy.report import words
from mpq_deploy.report.budget_curve import Mark, milliseconds, view
from mpq_deploy.report.data import BudgetPlans
from mpq_deploy.report.page import asset, rendered

COLUMNS = ("Budget", "Of FP16", "Size", "Predicted error", "Measured error", "PSNR")


def sweep_page(result: dict[str, Any], plans: BudgetPlans, about: dict[str, str]) -> str:
    """Return the page. ``about``: model, target, synthetic and command; all is escaped."""
    points = [point for point in result["points"] if "size_bytes" in point]
    fp16_size = round(points[0]["size_bytes"] / points[0]["size_ratio"]) if points else 1
    marks = [
        Mark("swept", "", point["size_ratio"], point.get("measured_nmse"), point["predicted_nmse"])
        for point in points
    ]
    marks += [
        Mark(name, control["title"], control["size_ratio"], control["measured_nmse"])
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
            *([*_row(point), *_time(point, plans)] for point in points),
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
    compared = [
        p["predicted_nmse"] / p["measured_nmse"]
        for p in measured
        if p["predicted_nmse"] and p["measured_nmse"]
    ]
    text = f"{nominal}{words.count(len(measured), 'budget')} measured"
    if not compared:
        return f"{text}."
    return f"{text}: the prediction lies between {min(compared):.2f} and {max(compared):.2f} times what was measured."


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


def _row(point: dict[str, Any]) -> list[str]:
    predicted = point["predicted_nmse"]
    psnr = words.decibels(point.get("psnr_db"), point.get("measured_nmse") == 0)
    return [
        f"{point['budget']:.4f}",
        words.percent(point["size_ratio"]),
        words.size(point["size_bytes"]),
        words.NOT_PREDICTED if predicted is None else words.error(predicted),
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
