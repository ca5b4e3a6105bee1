"""What a byte budget buys: predicted and measured error and PSNR per budget, beside everything INT8 and INT4.

    python benchmarks/budgets.py [MODEL] --budgets 0.26:0.5

MODEL is what `mpq-deploy build` takes; nothing is the bundled demo. The model is calibrated and measured once, then
solved, quantized and sampled for every budget; an engine is not built. NMSE is the squared error of the denoiser's
output relative to the float model's, averaged over timesteps. PSNR compares the final images from the same noise:
the mean over images, and "pooled", that of the squared error of all images together, which one image that takes another
path dominates; the checks use the first and name the second.
The checks are relations between results of this very run, and the exit code is 1 when one fails. The budgets of the
checks are added to the list. A second call reuses every stage and every sample that is still current.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from table import (
    Page,
    bench_parser,
    bench_recipe,
    decibels,
    made_by_stages,
    markdown,
    verdict,
    weights_digest,
)

from mpq_deploy.rounding.candidate_store import STATIC_INT8
from mpq_deploy.run.pipeline import open_pipeline
from mpq_deploy.studies.sweep import parse_budgets, run_sweep
from mpq_deploy.system.progress import PlainTalk

# Budget -> how many dB everything-INT8 (which takes 0.50 of the FP16 bytes) is to be beaten by, and whether a tie
# is enough.
LEADS = {0.265: (0.0, True), 0.28: (0.0, False), 0.35: (8.0, True)}
# Predicted over measured error.
RATIOS = (0.6, 1.6)
STAGES = ("export", "calibrate", "candidates", "measure", "controls")

Points = list[dict[str, Any]]


def budget_table(points: Points, controls: dict[str, Any]) -> str:
    """Return one row per budget, then the controls."""
    rows = []
    for point in points:
        if "size_bytes" not in point:
            rows.append(
                [
                    f"{point['budget']:g}",
                    "-",
                    f"{point['smallest_feasible_bytes']:,} needed",
                    *["-"] * 5,
                ]
            )
            continue
        predicted, measured = point["predicted_nmse"], point["measured_nmse"]
        figures = [
            f"{point['size_ratio']:.4f}",
            f"{point['size_bytes']:,}",
            f"{predicted:.2e}",
            f"{measured:.2e}",
        ]
        quality = [decibels(point["psnr_db"]), decibels(point["pooled_psnr_db"])]
        rows.append([f"{point['budget']:g}", *figures, f"{predicted / measured:.2f}", *quality])
    for name, control in controls.items():
        error = f"{control['measured_nmse']:.2e}"
        kind, _, static = name.partition("-")
        label = f"everything {kind.upper()}" + (f", {static}" if static else "")
        quality = [decibels(control["psnr_db"]), decibels(control["pooled_psnr_db"])]
        rows.append([label, f"{control['size_ratio']:.4f}", "", "", error, "", *quality])
    header = (
        "budget",
        "of FP16",
        "bytes",
        "predicted NMSE",
        "measured NMSE",
        "predicted / measured",
        "PSNR dB",
    )
    header = (*header, "pooled PSNR dB")
    return markdown(header, rows)


def lead_checks(points: Points, int8: dict[str, Any]) -> list[tuple[bool, str]]:
    """Compare the PSNR at the budgets of ``LEADS`` with that of everything INT8, each input under one scale."""
    checks = []
    for budget, (least, tie) in LEADS.items():
        wanted = f"at {budget:g} the PSNR is " + (
            f"at least {least:g} dB above" if least else "not below" * tie
        )
        wanted = (
            wanted if least or tie else f"at {budget:g} the PSNR is above"
        ) + " everything INT8, static"
        point = next(p for p in points if p["budget"] == budget)
        if "size_bytes" not in point:
            checks.append((False, verdict(False, wanted, "no plan fits")))
            continue
        lead, pooled = (
            infinite(point[key]) - infinite(int8[key]) for key in ("psnr_db", "pooled_psnr_db")
        )
        passed = lead >= least if tie else lead > least
        checks.append(
            (passed, verdict(passed, wanted, f"{lead:+.1f} dB (pooled {pooled:+.1f} dB)"))
        )
    return checks


def ratio_check(points: Points) -> tuple[bool, str]:
    """Whether every prediction lies within ``RATIOS`` of what was measured."""
    ratios = {
        p["budget"]: p["predicted_nmse"] / p["measured_nmse"] for p in points if "size_bytes" in p
    }
    low, high = min(ratios, key=ratios.__getitem__), max(ratios, key=ratios.__getitem__)
    passed = RATIOS[0] <= ratios[low] and ratios[high] <= RATIOS[1]
    found = f"{ratios[low]:.2f} (at {low:g}) to {ratios[high]:.2f} (at {high:g})"
    return passed, verdict(
        passed, f"predicted / measured lies within {RATIOS[0]} to {RATIOS[1]}", found
    )


def infinite(psnr_db: float | None) -> float:
    return math.inf if psnr_db is None else psnr_db


def main() -> None:
    parser = bench_parser(__doc__)
    parser.add_argument(
        "model", nargs="?", help="a bundled model's name, a diffusers folder, an ONNX file"
    )
    parser.add_argument(
        "--budgets", default="0.26:0.5", help="FROM:TO, FROM:TO:STEP or a comma-separated list"
    )
    parser.add_argument("--recipe", type=Path, help="a recipe to start from")
    parser.add_argument(
        "-o", "--out", type=Path, help="run folder (default: runs/bench-budgets-NAME)"
    )
    chosen = parser.parse_args()
    recipe = bench_recipe(chosen.recipe, chosen.set, {"model": chosen.model, "engine.build": False})
    budgets = sorted({*parse_budgets(chosen.budgets), *LEADS})
    name = Path(recipe.model).stem if recipe.model else "demo"
    with open_pipeline(
        recipe, chosen.out or Path("runs") / f"bench-budgets-{name}", PlainTalk()
    ) as pipeline:
        result = run_sweep(pipeline.current("measure", "controls"), budgets, evaluate=True)
        page = Page(f"Size against quality: {name}")
        page.say(f"{weights_digest(pipeline.run)}\n\n{made_by_stages(pipeline.run, STAGES)}")
    controls = result["controls"]
    page.say(budget_table(result["points"], controls))
    # Without the ranges and factors that this tool finds, where those differ.
    int8 = controls.get(STATIC_INT8, controls["int8"])
    checks = [
        *lead_checks(result["points"], int8),
        ratio_check(result["points"]),
    ]
    page.conclude(checks, chosen.page)


if __name__ == "__main__":
    main()
