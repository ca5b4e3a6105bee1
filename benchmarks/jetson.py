"""What a byte budget is on Jetson and TensorRT 10 and 11, beside TensorRT-RTX: floors, times, quality.

    python benchmarks/jetson.py --page docs/results/jetson.md

1. The smallest feasible budget of four models on every target that builds engines: the two bundled ones, and UNets of
   20 M and of Stable Diffusion 1.5's shapes with random weights (``scale_models``). Sizes need no weights.
2. Estimated times of one call of Stable Diffusion 1.5's UNet (latent 64 x 64, two samples, for guidance) on every
   Jetson: everything FP16, everything INT8 as far as layers may, the fastest plan within each budget, and the plan of
   the smallest error if an error were 4^-bits for each weight (random weights have no better one). All are rooflines of
   peak figures; nothing ran on a device.
3. PSNR at equal bytes by weights alone, where only the form of convolutions differs: blocks along the channels of one
   position (products), against blocks along each channel's positions (TensorRT-RTX's reshaped weights).
   Checked: at most 1 dB lost.
"""

from __future__ import annotations

import argparse
import fnmatch
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from scale_models import SIZES, make_model
from table import Page, bench_parser, bench_recipe, decibels, markdown, verdict

from mpq_deploy.allocate.milp import allocate, fastest_plan
from mpq_deploy.allocate.problem import LayerChoice, Problem
from mpq_deploy.engine.target import Target, load_target
from mpq_deploy.formats.candidates import choices_for
from mpq_deploy.formats.scheme import SCHEMES, schemes_named
from mpq_deploy.formats.sizes import FP16_BYTES
from mpq_deploy.graph.shapes import known_shapes
from mpq_deploy.latency.conv_products import with_products
from mpq_deploy.latency.costs import LatencyCosts
from mpq_deploy.latency.roofline import Rates
from mpq_deploy.run.pipeline import open_pipeline
from mpq_deploy.run.view import Exported
from mpq_deploy.studies.sweep import run_sweep
from mpq_deploy.system.progress import PlainTalk

TARGETS = (
    *("rtx", "tensorrt-10", "tensorrt-11", "jetson-orin-nano", "jetson-orin-nx"),
    *("jetson-agx-orin", "jetson-agx-orin-jp7", "jetson-thor", "jetson-thor-jp7"),
)
JETSONS = TARGETS[3:]
FAMILIES = ("fp16", "w8a8", "w8a16", "w4a16", "w4a8")
# The smallest budgets may differ by so much, as a share of FP16; quality by so many dB.
FLOOR_SLACK, QUALITY_SLACK = 0.01, 1.0
BUDGETS, QUALITY_BUDGETS = (0.30, 0.35, 0.50), [0.28, 0.30, 0.35]
BUNDLED = ("emoji", "digits")
CALLS = 2


class Sized:
    """A model's graph, and what its layers cost on a target. ``folder``: of its export stage."""

    def __init__(self, folder: Path) -> None:
        self.exported = Exported(folder)
        self.fp16 = int(self.exported.facts["fp16_size_bytes"])
        self.shapes = known_shapes(self.exported.path, self.exported.spec.input_shapes(CALLS))[1]

    def problem(self, target: Target, budget: float, timed: bool = False) -> Problem:
        """Return the allocation for ``target``, errors being 4^-bits for each weight."""
        graph = with_products(self.exported.graph, target, self.shapes, self.shapes)
        costs = LatencyCosts(graph, self.shapes, target, CALLS) if timed else None
        choices = []
        for layer in graph.layers:
            schemes = choices_for(layer, schemes_named(FAMILIES), target.refusal).schemes
            if any(fnmatch.fnmatchcase(layer.name, pattern) for pattern in target.protected):
                schemes = schemes[:1]
            choices.append(
                LayerChoice(
                    layer.name,
                    layer.inputs,
                    {s.name: s.weight_bytes(layer) for s in schemes},
                    {
                        s.name: layer.weights * (4.0 ** -s.bits[0] + (s.bits[1] < 16) * 4.0**-8)
                        for s in schemes
                    },
                    {s.name: s.input_bytes(layer) for s in schemes},
                    {s.name: costs.layer_ns(layer, s) for s in schemes} if costs else {},
                )
            )
        fixed = self.fp16 - FP16_BYTES * sum(layer.weights for layer in graph.layers)
        problem = Problem(choices, fixed, int(budget * self.fp16))
        if costs is None:
            return problem
        shared = {
            tensor: costs.quantizer_ns(tensor, SCHEMES["w8a8"])
            for choice in choices
            for tensor in choice.inputs
        }
        return replace(problem, quantizer_ns=shared, fixed_ns=costs.others_ns)

    def smallest(self, target: Target) -> float:
        """Return the smallest feasible budget as a share of FP16."""
        problem = self.problem(target, 1.0)
        return problem.plan_bytes(problem.smallest_plan()) / self.fp16


def export_of(name: str, folder: Path, latent: int = 64) -> Path:
    """Export a bundled model, or make and export one of ``SIZES``; return its run."""
    run = folder / name
    values: dict[str, Any] = {}
    if name in BUNDLED:
        values = {} if name == "emoji" else {"model": name}
    else:
        if not (folder / f"{name}-model").exists():
            make_model(SIZES[name], latent, folder / f"{name}-model")
        values = {
            "model": str(folder / f"{name}-model"),
            "conditions": str(folder / f"{name}-model" / "conditions.npz"),
        }
    recipe = bench_recipe(None, [], values)
    with open_pipeline(recipe, run, PlainTalk()) as pipeline:
        pipeline.ensure("export")
    return run


def floors(models: dict[str, Sized]) -> tuple[str, list[tuple[bool, str]]]:
    """Return the smallest budgets by target and model, and the checks."""
    found = {t: [one.smallest(load_target(t)) for one in models.values()] for t in TARGETS}
    rows = [[name, *(f"{value:.4f}" for value in values)] for name, values in found.items()]
    checks = []
    for name, values in found.items():
        worst = max(value - least for value, least in zip(values, found["rtx"]))
        checks.append(
            (
                worst <= FLOOR_SLACK,
                verdict(
                    worst <= FLOOR_SLACK,
                    f"smallest budgets of {name} within {FLOOR_SLACK} of rtx's",
                    f"{worst:+.4f}",
                ),
            )
        )
    return markdown(["target", *models], rows), checks


def times(model: Sized) -> str:
    """Return the estimated times of one call on every Jetson with figures."""
    rows = []
    for name in JETSONS:
        target = load_target(name)
        if Rates.of(target) is None:
            continue
        problem = model.problem(target, 1.0, timed=True)
        fp16 = problem.plan_ns({one.name: "fp16" for one in problem.layers})
        int8 = {one.name: "w8a8" if "w8a8" in one.bytes else "fp16" for one in problem.layers}
        rows.append([name, "FP16", "1.0000", f"{fp16 / 1e6:.1f}", "", "", "", ""])
        rows.append([name, "INT8", *_figures(problem, int8, model, fp16)])
        for budget in BUDGETS:
            limited = replace(problem, budget_bytes=int(budget * model.fp16))
            fastest = fastest_plan(limited)
            rows.append([name, f"{budget:.2f}, fastest", *_figures(problem, fastest, model, fp16)])
            accurate = allocate(limited).schemes
            rows.append([name, f"{budget:.2f}, by bits", *_figures(problem, accurate, model, fp16)])
    header = ["target", "plan", "of FP16", "ms", "of FP16's", "4-bit", "INT8", "FP16"]
    return markdown(header, rows)


def _figures(problem: Problem, plan: dict[str, str], model: Sized, fp16_ns: int) -> list[str]:
    took = problem.plan_ns(plan)
    kinds = [SCHEMES[name] for name in plan.values()]
    counts = (
        sum(s.weight.bits == 4 for s in kinds),
        sum(s.weight.bits == 8 for s in kinds),
        sum(not s.quantized for s in kinds),
    )
    size = problem.plan_bytes(plan) / model.fp16
    return [f"{size:.4f}", f"{took / 1e6:.1f}", f"{took / fp16_ns:.2f}", *map(str, counts)]


def quality(name: str, folder: Path, changes: Sequence[str]) -> tuple[str, list[tuple[bool, str]]]:
    """Return the PSNR by weights alone on rtx and on a Jetson, and the checks."""
    found: dict[str, list[Any]] = {}
    for target in ("rtx", "jetson-orin-nano"):
        values = {
            "target": target,
            "allocate.schemes": ["fp16", "w4a16"],
            "allocate.branches": [],
            "engine.build": False,
        }
        if name != "emoji":
            values["model"] = name
        recipe = bench_recipe(None, changes, values)
        # One run: the second target takes over the export and the calibration.
        with open_pipeline(recipe, folder / f"{name}-quality", PlainTalk()) as pipeline:
            run = pipeline.current("measure", "controls")
            found[target] = run_sweep(run, QUALITY_BUDGETS, evaluate=True)["points"]
    rows, checks = [], []
    for one, other in zip(*found.values()):
        budget = one["budget"]
        lost = one["psnr_db"] - other["psnr_db"]
        rows.append([f"{budget:.2f}", decibels(one["psnr_db"]), decibels(other["psnr_db"])])
        what = f"{name} at {budget:.2f} by weights alone within {QUALITY_SLACK} dB of rtx"
        passed = lost <= QUALITY_SLACK
        checks.append((passed, verdict(passed, what, f"{-lost:+.2f} dB")))
    return markdown(["budget", "rtx, dB", "jetson-orin-nano, dB"], rows), checks


def main() -> None:
    parser: argparse.ArgumentParser = bench_parser(__doc__)
    parser.add_argument("--keep", type=Path, help="a folder for the models and runs, used again")
    parser.add_argument("--models", nargs="*", default=[*BUNDLED, "20M", "860M"])
    parser.add_argument("--quality", nargs="*", default=list(BUNDLED))
    chosen = parser.parse_args()
    page = Page("Budgets on Jetson and TensorRT, beside TensorRT-RTX")
    with tempfile.TemporaryDirectory() as scratch:
        folder = chosen.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        models = {name: Sized(export_of(name, folder) / "export") for name in chosen.models}
        page.say("## Smallest feasible budgets, as shares of the FP16 size")
        table, checks = floors(models)
        page.say(table)
        if "860M" in models:
            page.say(
                "## Estimated times of one call of Stable Diffusion 1.5's UNet\n\nLatent 64 x 64, two samples. "
                f"FP16 is {models['860M'].fp16:,} bytes. "
                "Rooflines of peak figures, nothing ran: no peak is reached, and what is fused is known only for "
                "TensorRT-RTX. Columns on the right: layers by the bits of their weights."
            )
            page.say(times(models["860M"]))
        for name in chosen.quality:
            page.say(f"## {name}: PSNR by weights alone")
            text, found = quality(name, folder, chosen.set)
            page.say(text)
            checks += found
        page.conclude(checks, chosen.page)


if __name__ == "__main__":
    main()
