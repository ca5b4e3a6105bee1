"""What a byte budget buys: predicted and measured error and PSNR per budget, beside the target's controls.

    python benchmarks/budgets.py [MODEL] --budgets 0.26:0.5
    python benchmarks/budgets.py emoji --recipe quick --set target=rtx-blackwell --set evaluate.samples=16 --controls

MODEL is what `mpq-deploy build` takes; by default the bundled demo. The model is calibrated and measured once, then
solved, quantized and sampled for every budget; an engine is not built. NMSE is the squared error of the denoiser's
output relative to the float model's, averaged over timesteps. PSNR compares the final images from the same noise:
the mean over images, and "pooled", that of the squared error of all images together, which one image that takes another
path dominates; the checks use the first and name the second.
The checks are relations between results of this very run, and the exit code is 1 when one fails. The budgets of the
checks are added to the list. A second call reuses every stage and every sample that is still current.
With --controls the checks compare ours with each control, everything in one format or by NVIDIA's rule: at its bytes,
and by the smallest of the budgets that is as good.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
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

from mpq_deploy.evaluate.variants import read_controls
from mpq_deploy.rounding.control_schemes import STATIC_INT8
from mpq_deploy.run.pipeline import open_pipeline
from mpq_deploy.run.view import Run
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
    for control in controls.values():
        error = f"{control['measured_nmse']:.2e}"
        label = control["title"].replace("Everything", "everything")
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


def against_controls(
    points: Points, controls: dict[str, Any], times: Mapping[str, float]
) -> tuple[str, list[tuple[bool, str]]]:
    """Compare ours with each control at its bytes, and where both error and PSNR are as good.

    ``times``: estimated milliseconds of controls, as far as they are known. Return a table and the checks.
    """
    rows, checks = [], []
    feasible = sorted((p for p in points if "size_bytes" in p), key=lambda p: p["size_ratio"])
    for name, control in controls.items():
        title = control["title"].replace("Everything", "everything")
        ratio, error, psnr = (control[k] for k in ("size_ratio", "measured_nmse", "psnr_db"))
        good = [p for p in feasible if p["measured_nmse"] <= error and above(p, psnr) >= 0]
        as_large = next((p for p in feasible if p["budget"] == as_budget(ratio)), None)
        as_good = good[0] if good else None
        rows.append(
            [title, f"{ratio:.4f}", f"{error:.2e}", decibels(psnr), milliseconds(times.get(name))]
        )
        rows[-1] += [*cells(as_large), *cells(as_good)]
        gain = -math.inf if as_large is None else above(as_large, psnr)
        less = 0.0 if as_large is None else error / as_large["measured_nmse"]
        what = f"at the bytes of {title} ours has less error and a higher PSNR"
        checks.append((less > 1 and gain > 0, what, f"1/{less:.3g} of the error, {gain:+.1f} dB"))
        smaller = as_good is not None and as_good["size_ratio"] < ratio
        said = f"{as_good['size_ratio'] / ratio:.0%} of its bytes" if as_good else "no budget here"
        checks.append((smaller, f"as good as {title} ours is smaller", said))
    figures = ["of FP16", "NMSE", "PSNR dB", "ms"]
    header = ["", *figures, "ours at its bytes: of FP16", *figures[1:]]
    header += ["ours as good: of FP16", *figures[1:]]
    return markdown(header, rows), [(p, verdict(p, what, said)) for p, what, said in checks]


def controls_part(run: Run, result: dict[str, Any], page: Page) -> list[tuple[bool, str]]:
    """Say how ours compares with each control; return the checks."""
    info = run.plan.latency
    assert info is not None, "the target has figures to estimate times from"
    times = {"int8": info.int8_ms, "int4": info.int4_ms, **info.controls_ms}
    table, checks = against_controls(result["points"], result["controls"], times)
    page.say(
        f"## Against each control\n\nTarget {run.target.name}, {run.recipe.evaluate.samples} images; FP4 is "
        'simulated in ONNX Runtime. "As good": the smallest budget above with neither more error nor a lower PSNR. '
        f"Bytes are the files'. Milliseconds of a call at batch {info.batch} were measured nowhere: {info.basis}. "
        f"Everything FP16: {milliseconds(info.fp16_ms)}; plans are those of the least error, whatever their time."
    )
    page.say(table)
    return checks


def above(point: dict[str, Any], psnr_db: float | None) -> float:
    """Return how many dB the images of ``point`` lie above; 0 where both are the float model's."""
    one, other = infinite(point["psnr_db"]), infinite(psnr_db)
    return 0.0 if one == other else one - other


def cells(point: dict[str, Any] | None) -> list[str]:
    """Return size, error, PSNR and estimated time of a plan; dashes without one."""
    if point is None:
        return ["-"] * 4
    figures = f"{point['size_ratio']:.4f}", f"{point['measured_nmse']:.2e}"
    return [*figures, decibels(point["psnr_db"]), milliseconds(point.get("latency_ms"))]


def milliseconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def as_budget(ratio: float) -> float:
    """Return a share of FP16's bytes as a budget that is not larger."""
    return math.floor(ratio * 1e6) / 1e6


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
    parser.add_argument("--recipe", help="a recipe to start from, or a bundled one's name")
    parser.add_argument("--controls", action="store_true", help="compare with each control")
    parser.add_argument(
        "-o", "--out", type=Path, help="run folder (default: runs/bench-budgets-NAME)"
    )
    chosen = parser.parse_args()
    # The output's error is predicted, so it is measured.
    values = {"model": chosen.model, "engine.build": False, "measure.method": "probe"}
    recipe = bench_recipe(chosen.recipe, chosen.set, values)
    name = Path(recipe.model).stem if recipe.model else "demo"
    with open_pipeline(
        recipe, chosen.out or Path("runs") / f"bench-budgets-{name}", PlainTalk()
    ) as pipeline:
        run = pipeline.current("measure", "controls")
        fp16 = run.exported.facts["fp16_size_bytes"]
        sizes = [
            as_budget((c.size_bytes or 0) / fp16)
            for c in read_controls(run.stage("controls")).values()
        ]
        further = sizes if chosen.controls else LEADS
        budgets = sorted({*parse_budgets(chosen.budgets), *further})
        result = run_sweep(run, budgets, evaluate=True)
        about = "The plan against the controls" if chosen.controls else "Size against quality"
        page = Page(f"{about}: {name}")
        page.say(f"{weights_digest(pipeline.run)}\n\n{made_by_stages(pipeline.run, STAGES)}")
    controls, points = result["controls"], result["points"]
    page.say(budget_table(points, controls))
    if chosen.controls:
        checks = controls_part(run, result, page)
    else:
        # Without the ranges and factors that this tool finds, where those differ.
        int8 = controls.get(STATIC_INT8, controls["int8"])
        checks = [*lead_checks(points, int8), ratio_check(points)]
    page.conclude(checks, chosen.page)


if __name__ == "__main__":
    main()
