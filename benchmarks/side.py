"""What is lost, and what is saved, when losses are measured on smaller samples (`measure.side`).

    python benchmarks/side.py digits emoji --budgets 0.30,0.38

The bundled models by default. Each is exported, calibrated and rounded once; its losses are then measured three
times: on the calibrated calls as they are, on their centres of half the height and width (`--side N` for another),
and on the calls as they are but on fewer of them, as many as have the area that the centres have, with other
probes. Per kind of scheme: the rank correlation (Spearman, within schemes, pooled) of the layers' losses with those
of the first, and the factor between them, the median with the 10th and 90th percentile; its median per block of the
network for one scheme. Per budget: the plan that each leads to, its predicted error, the error of the output as
measured on whole samples, and the PSNR (mean over images) from the same noise, with the 95 % interval of the
difference to the first, image by image. Seconds are those of measuring alone, on the clock and of all threads. Exit
code 1 when the smaller side's Spearman is below 0.95 for a kind of scheme (fewer than 10 layers are not judged),
when its losses are off by more than a factor of two, or when a plan of it is more than 1 dB below that of whole
samples. A second call reuses the tables while they are current.
"""

from __future__ import annotations

import argparse
import importlib
import re
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from table import Page, bench_recipe, made_by_stages, markdown, verdict, weights_digest

import mpq_deploy.sensitivity
from mpq_deploy.errors import InfeasibleBudgetError
from mpq_deploy.evaluate.evaluate import evaluate
from mpq_deploy.evaluate.evaluation_result import EvaluationOptions, VariantResult
from mpq_deploy.evaluate.interval import paired_interval
from mpq_deploy.formats.scheme import SCHEMES
from mpq_deploy.graph.writers.deployed_graphs import SIMULATED
from mpq_deploy.run.common import Exported
from mpq_deploy.run.folder import file_digest
from mpq_deploy.run.pipeline import Pipeline, open_pipeline
from mpq_deploy.run.spread import forget_shards
from mpq_deploy.sensitivity.measure import measure
from mpq_deploy.sensitivity.table import SensitivityTable
from mpq_deploy.stages import INPUTS
from mpq_deploy.stages.allocate import PlanSolver
from mpq_deploy.stages.export import source_denoiser
from mpq_deploy.stages.measure import stage_subject
from mpq_deploy.stages.quantize import write_plan
from mpq_deploy.studies.agreement import Calibration, Compared, moments, rho_of
from mpq_deploy.studies.sweep import parse_budgets
from mpq_deploy.system.progress import PlainTalk, Talk
from mpq_deploy.system.usage import metered

WANTED, FEWEST = 0.95, 10
FACTOR = 2.0
LOST_DB = 1.0
SHOWN = "w4a16-b32"
WHOLE, SMALLER, FEWER = "whole", "smaller", "fewer"
STAGES = ("export", "calibrate", "candidates")

Tables = dict[str, SensitivityTable]


@dataclass(frozen=True)
class Found:
    """The plan of one budget by one table: predicted by that table and by the whole samples', and as measured."""

    schemes: dict[str, str]
    predicted: float
    by_whole: float
    measured: VariantResult


@dataclass(frozen=True)
class Agreement:
    """How losses of one kind of scheme agree with those of whole samples: ``factor`` low, median and high."""

    kind: str
    layers: int
    spearman: float
    factor: Calibration


def measured(pipeline: Pipeline, name: str) -> SensitivityTable:
    """Return the table of the pipeline's recipe, kept in the run folder as a stage of its own."""
    stage = f"bench-{name}"
    code = [file_digest(path) for path in sorted(Path(mpq_deploy.sensitivity.__path__[0]).glob("*.py"))]
    inputs = {**INPUTS["measure"](pipeline), "code": code}
    if pipeline.run.changed_fields(stage, inputs) != []:
        forget_shards(pipeline, "measure")
        started = time.process_time()
        with metered() as reading, pipeline.run.writing(stage, inputs) as folder:
            subject, _ = stage_subject(pipeline)
            measure(pipeline.recipe.measure.method, subject).save(folder)
        forget_shards(pipeline, "measure")
        pipeline.run.save_timing(f"{stage}-cpu", time.process_time() - started, reading.peak_rss_bytes)
        pipeline.run.save_timing(stage, reading.seconds, reading.peak_rss_bytes)
    return SensitivityTable.load(pipeline.run.stage(stage))


def all_tables(pipeline: Pipeline, whole: int, side: int) -> tuple[Tables, dict[str, str]]:
    """Return what is measured in the three ways, and what each is in words."""
    importlib.import_module("mpq_deploy.sensitivity.probe")  # torch takes seconds to import: not the first way's
    recipe, section = pipeline.recipe, pipeline.recipe.measure
    calls = max(1, round(section.calls * (side / whole) ** 2))
    ways: dict[str, tuple[str, dict[str, Any]]] = {
        WHOLE: (f"{whole} x {whole}, {section.calls} calls", {"side": None}),
        SMALLER: (f"{side} x {side}, {section.calls} calls", {"side": side}),
        FEWER: (f"{whole} x {whole}, {calls} calls", {"side": None, "calls": calls, "seed": section.seed + 1}),
    }
    tables = {}
    try:
        for name, (_, changes) in ways.items():
            pipeline.recipe = recipe.model_copy(update={"measure": section.model_copy(update=changes)})
            tables[name] = measured(pipeline, name)
    finally:
        pipeline.recipe = recipe
    return tables, {name: said for name, (said, _) in ways.items()}


def kind_of(scheme: str) -> str:
    """Return a scheme's name without the number of its branch's channels: they differ little."""
    return re.sub(r"(\+[a-z]+)\d+$", r"\1", scheme)


def agreements(whole: SensitivityTable, other: SensitivityTable) -> list[Agreement]:
    """Hold a table against that of whole samples, by kind of scheme; kinds that change nothing are left out."""
    rows = []
    for kind in dict.fromkeys(map(kind_of, SCHEMES)):
        schemes = [scheme for scheme in SCHEMES if kind_of(scheme) == kind]
        apart = [
            Compared.of([(n, scheme) for n, row in whole.losses.items() if scheme in row], whole.losses, other.losses)
            for scheme in schemes
        ]
        pairs = [pair for one in apart for pair in zip(one.layers, one.schemes, strict=True)]
        factor = Compared.of(pairs, whole.losses, other.losses).calibration()
        if factor is None:
            continue
        rank = float(rho_of(np.sum([moments(one.true, one.found) for one in apart], axis=0)))
        rows.append(Agreement(kind, len({name for name, _ in pairs}), rank, factor))
    return rows


def plans(pipeline: Pipeline, tables: Tables, budgets: list[float], images: int) -> dict[float, dict[str, Found]]:
    """Solve every budget by every table, and measure the plans from the same noise; budgets that no plan fits lack."""
    solvers = {name: PlanSolver(pipeline, table=table) for name, table in tables.items()}
    solved = {}
    for budget in budgets:
        try:
            solved[budget] = {name: solver.solve(str(budget)) for name, solver in solvers.items()}
        except InfeasibleBudgetError:
            continue
    results = iter(evaluated(pipeline, [plan.schemes for by in solved.values() for plan in by.values()], images))
    found: dict[float, dict[str, Found]] = {}
    for budget, by in solved.items():
        for name, plan in by.items():
            assert plan.predicted_loss is not None
            by_whole = tables[WHOLE].plan_loss(plan.schemes)
            row = Found(plan.schemes, plan.predicted_loss, by_whole, next(results))
            found.setdefault(budget, {})[name] = row
    return found


def evaluated(pipeline: Pipeline, found: list[dict[str, str]], images: int) -> list[VariantResult]:
    """Return the error and the images' figures of every plan, all from the same noise."""
    exported, section = Exported(pipeline), pipeline.recipe.evaluate
    options = EvaluationOptions(
        samples=images, steps=section.steps, timesteps=section.timesteps, seed=section.seed, latency_calls=0
    )
    with tempfile.TemporaryDirectory(dir=pipeline.run.scratch()) as folder:
        variants = {}
        for number, schemes in enumerate(found):
            place = Path(folder) / str(number)
            place.mkdir()
            write_plan(pipeline, schemes, place)
            variants[str(number)] = place / SIMULATED
        arguments = (variants, exported.path, exported.spec, exported.conditions, options, Talk())
        result = evaluate(*arguments, cache=pipeline.run.path / ".samples")
    return [result.variants[name] for name in variants]


def costs(pipeline: Pipeline, said: dict[str, str]) -> str:
    """Say what each way of measuring took."""
    timings = pipeline.run.timings()
    rows = []
    for name, words in said.items():
        clock, cpu = timings[f"bench-{name}"], timings[f"bench-{name}-cpu"]
        cells = (f"{clock['seconds']:.1f}", f"{cpu['seconds']:.1f}", f"{clock['peak_rss_bytes'] / 1e6:.0f}")
        rows.append([words, *cells])
    return markdown(("measured on", "seconds", "processor seconds", "peak MB"), rows)


def agreement_table(found: dict[str, list[Agreement]], said: dict[str, str]) -> str:
    header, rows = ["scheme", "layers"], []
    for name in found:
        header += [f"{said[name]}: Spearman", "factor (10 % to 90 %)"]
    for row in zip(*found.values(), strict=True):
        cells = [row[0].kind, str(row[0].layers)]
        for one in row:
            cells += ["-" if np.isnan(one.spearman) else f"{one.spearman:.4f}"]
            cells += [f"{one.factor.median:.2f} ({one.factor.low:.2f} to {one.factor.high:.2f})"]
        rows.append(cells)
    return markdown(header, rows)


def block_of(layer: str) -> str:
    """Return the block that a layer's name begins with: ``up_blocks.1``, or its first word."""
    parts = layer.split(".")
    return ".".join(parts[:2]) if len(parts) > 1 and parts[1].isdigit() else parts[0]


def block_table(tables: Tables, said: dict[str, str]) -> str:
    """Show where in the network the factors lie: the median over each block's layers, for one scheme."""
    whole = tables[WHOLE].losses
    rows = []
    for block in dict.fromkeys(map(block_of, whole)):
        names = [name for name, row in whole.items() if block_of(name) == block and row.get(SHOWN, 0.0) > 0]
        factors = [
            float(np.median([tables[way].losses[name][SHOWN] / whole[name][SHOWN] for name in names]))
            for way in (SMALLER, FEWER)
            if names
        ]
        if factors:
            rows.append([block, str(len(names)), *(f"{factor:.2f}" for factor in factors)])
    return markdown((f"block ({SHOWN})", "layers", *(f"{said[way]}: factor" for way in (SMALLER, FEWER))), rows)


def plan_table(found: dict[float, dict[str, Found]], said: dict[str, str]) -> str:
    rows = []
    for budget, by in found.items():
        for name, one in by.items():
            other = name != WHOLE
            differ = sum(by[WHOLE].schemes[layer] != scheme for layer, scheme in one.schemes.items())
            rows.append(
                [
                    f"{budget:g}",
                    said[name],
                    f"{one.predicted:.2e}",
                    f"{one.by_whole:.2e}" if other else "",
                    f"{one.measured.measured_nmse:.2e}",
                    f"{one.predicted / one.measured.measured_nmse:.2f}",
                    f"{one.measured.psnr_db:.1f}",
                    f"{lost(by, name):+.2f} ({between(by, name)})" if other else "",
                    str(differ) if other else "",
                ]
            )
    header = ("budget", "measured on", "predicted", "by the first", "measured error", "predicted / measured")
    return markdown((*header, "PSNR dB", "difference, dB (95 %)", "layers that differ"), rows)


def lost(by: dict[str, Found], name: str) -> float:
    """PSNR of a plan minus that of whole samples, dB."""
    return by[name].measured.psnr_db - by[WHOLE].measured.psnr_db


def between(by: dict[str, Found], name: str) -> str:
    """The 95 % interval of ``lost``, in words."""
    interval = paired_interval(by[name].measured.psnr_db_each, by[WHOLE].measured.psnr_db_each)
    return "one image" if interval is None else f"{interval[0]:+.2f} to {interval[1]:+.2f}"


def checks(model: str, rows: list[Agreement], found: dict[float, dict[str, Found]]) -> list[tuple[bool, str]]:
    """Judge the smaller side on one model: the order of layers, the size of the losses, and the plans."""
    judged = [row for row in rows if row.layers >= FEWEST]
    worst = min(judged, key=lambda row: row.spearman)
    farthest = max(judged, key=lambda row: abs(np.log(row.factor.median)))
    budget = min(found, key=lambda key: lost(found[key], SMALLER))
    least = lost(found[budget], SMALLER)
    said = (
        (worst.spearman >= WANTED, f"Spearman at least {WANTED}", f"{worst.spearman:.4f} ({worst.kind})"),
        (
            1 / FACTOR <= farthest.factor.median <= FACTOR,
            f"losses within a factor of {FACTOR:g}",
            f"{farthest.factor.median:.2f} ({farthest.kind})",
        ),
        (least >= -LOST_DB, f"plans at most {LOST_DB:g} dB below", f"{least:+.2f} dB (at {budget:g})"),
    )
    return [(passed, verdict(passed, f"{model}, smaller side: {what}", figure)) for passed, what, figure in said]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("models", nargs="*", default=["emoji", "digits"], help="what `mpq-deploy build` takes")
    parser.add_argument("--budgets", default="0.30,0.38", help="FROM:TO, FROM:TO:STEP or a comma-separated list")
    parser.add_argument("--side", type=int, help="height and width to measure on; default: half of the samples'")
    parser.add_argument("--images", type=int, default=64, help="images behind every PSNR")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a recipe entry, repeatable")
    parser.add_argument("-o", "--out", type=Path, default=Path("runs"), help="where the run folders are")
    parser.add_argument("--page", type=Path, help="keep the result as a Markdown page")
    chosen = parser.parse_args()
    page = Page("Losses measured on smaller samples")
    judged = []
    for model in chosen.models:
        name, values = Path(model).stem, {"model": model, "engine.build": False}
        opened = source_denoiser(bench_recipe(None, chosen.set, values), Talk())
        whole = int(opened.spec.sample.shape[-1])
        side = chosen.side or whole // 2
        recipe = bench_recipe(None, chosen.set, {**values, "measure.side": side})
        with open_pipeline(recipe, chosen.out / f"bench-side-{name}", PlainTalk()) as pipeline:
            pipeline.run_until("candidates")
            page.say(f"## {name}\n\n{weights_digest(pipeline)}\n\n{made_by_stages(pipeline, STAGES)}")
            tables, said = all_tables(pipeline, whole, side)
            rows = {name: agreements(tables[WHOLE], tables[name]) for name in (SMALLER, FEWER)}
            page.say(costs(pipeline, said))
            page.say(agreement_table(rows, said))
            page.say(block_table(tables, said))
            found = plans(pipeline, tables, parse_budgets(chosen.budgets), chosen.images)
        page.say(plan_table(found, said))
        judged += checks(name, rows[SMALLER], found)
    page.say("\n".join(line for _, line in judged))
    page.save(chosen.page)
    sys.exit(0 if all(passed for passed, _ in judged) else 1)


if __name__ == "__main__":
    main()
