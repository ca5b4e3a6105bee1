"""What plans by trajectory probes are worth beside plans by single-output probes, in final images.

    python benchmarks/trajectory.py [MODEL ...] --budgets 0.27,0.35,0.5

The bundled models by default; a model may be NAME=FOLDER, a recipe's model of another name. At every budget, of weights
alone (no activation is rounded) and of INT8 compute (every quantized layer's input is), each objective chooses a plan
from the same candidates, cross terms and held-back calls as in a build; its images are compared with the float model's
from other noise than anything was measured on: PSNR in dB, mean over images / of the pooled error / tenth percentile
/ worst. "NxP": trajectories and probes each (of single outputs: calls at each timestep); equal products are equal
backward passes. Means over trajectories: plain; "each": every trajectory divided by its own error (of all layers and
schemes), about the mean logarithm; "root": by its root; "trimmed": without the tenth of the largest. "steps apart":
squares of steps, without their signs; "half": the mean of that and the coherent sum; "tail": allocate.tail 0.1.
"predicted": mean / pooled / tenth percentile, as the report has them. The last table is over all models, budgets and
kinds, then by kind: mean differences in dB, and how often they are gains. A trained transformer as a third model is
made by `python scripts/train_digits.py --network transformer --minutes 12 --out runs/digits-transformer`.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from table import Page, bench_parser, bench_recipe, markdown, weights_digest

from mpq_deploy.allocate.plan import PrecisionPlan
from mpq_deploy.allocate.plan_solver import PlanSolver
from mpq_deploy.allocate.predicted_images import SHARES
from mpq_deploy.errors import InfeasibleBudgetError
from mpq_deploy.evaluate.evaluate import Variant, evaluate
from mpq_deploy.formats.scheme import SCHEMES
from mpq_deploy.graph.writers.deployed_graphs import SIMULATED
from mpq_deploy.graph.writers.plan_graphs import write_plan
from mpq_deploy.models.spec import Array
from mpq_deploy.recipe import EvaluateSettings
from mpq_deploy.run.pipeline import open_pipeline
from mpq_deploy.run.view import Run
from mpq_deploy.sensitivity.measure import measure
from mpq_deploy.sensitivity.subject import Subject
from mpq_deploy.sensitivity.table import SensitivityTable
from mpq_deploy.sensitivity.trajectory import StepProducts, measured_products
from mpq_deploy.stages.measure import measured_subject
from mpq_deploy.studies.sweep import parse_budgets
from mpq_deploy.system.progress import PlainTalk

SEED = 20261
# As a build chooses: by steps together and apart, each trajectory by its own error, one left out.
DEFAULT = "12x4, default"
TAIL, MORE_CALLS = "48x4, tail", "single outputs 48x4"
OWN_SETTINGS = {TAIL: {"tail": 0.1}, DEFAULT: {"trim": 0.1, "images_count": "inverse"}}
KINDS = {
    "weights only": lambda scheme: scheme.activation is None,
    "INT8 compute": lambda scheme: scheme.activation is not None or not scheme.quantized,
}


@dataclass(frozen=True)
class Measured:
    """What a model's objectives are made of."""

    default: SensitivityTable
    outputs: SensitivityTable
    products: StepProducts

    def tables(self, names: Iterable[str]) -> dict[str, SensitivityTable]:
        """Return the table of each objective."""
        return {name: OBJECTIVES[name](self) for name in names}


def some(products: StepProducts, trajectories: int, probes: int) -> StepProducts:
    """Return the products of fewer trajectories and probes."""
    count = min(trajectories, len(products.power))
    values = {
        layer: {scheme: rows[:, :probes, :count] for scheme, rows in row.items()}
        for layer, row in products.values.items()
    }
    return replace(products, values=values, power=products.power[:count])


def own_errors(products: StepProducts) -> Array:
    """Return each trajectory's error, float64 [N]: that of all layers alone, mean over schemes and probes."""
    total = np.zeros(len(products.power))
    for row in products.values.values():
        squares = [np.square(z.sum(0), dtype=np.float64).mean(0) for z in row.values()]
        total += np.mean(squares, axis=0)
    return total


def weighted(products: StepProducts, kind: str) -> SensitivityTable:
    """Return the table in which trajectories count by ``kind``."""
    errors = own_errors(products)
    shares = {
        "each": 1 / errors,
        "root": 1 / np.sqrt(errors),
        "trimmed": (errors <= np.quantile(errors, 0.9)).astype(np.float64),
    }[kind]
    roots = np.sqrt(shares / shares.mean()).astype(np.float32)
    values = {
        layer: {scheme: rows * roots for scheme, rows in row.items()}
        for layer, row in products.values.items()
    }
    return replace(products, values=values).table(apart=False)


def mixed(products: StepProducts, coherence: float) -> SensitivityTable:
    """Return the table whose loss is part coherent sum over steps, part sum of the steps' squares."""
    values = {}
    for layer, row in products.values.items():
        values[layer] = {}
        for scheme, z in row.items():
            steps = len(z)
            parts = [np.sqrt(coherence) * z.sum(0), *(np.sqrt(1 - coherence) * z)]
            # Entries are divided by their number: as many more of them count as much more each.
            values[layer][scheme] = np.sqrt(steps + 1) * np.concatenate(parts)[None]
    return replace(products, values=values).table()


OBJECTIVES: dict[str, Callable[[Measured], SensitivityTable]] = {
    "single outputs 12x4": lambda m: m.default,
    MORE_CALLS: lambda m: m.outputs,
    "trajectories 12x4": lambda m: some(m.products, 12, 4).table(apart=False),
    "12x4, trimmed": lambda m: weighted(some(m.products, 12, 4), "trimmed"),
    "trajectories 48x1": lambda m: some(m.products, 48, 1).table(apart=False),
    "48x1, root": lambda m: weighted(some(m.products, 48, 1), "root"),
    "trajectories 48x4": lambda m: m.products.table(apart=False),
    DEFAULT: lambda m: some(m.products, 12, 4).table(),
    "48x4, each": lambda m: weighted(m.products, "each"),
    "48x4, root": lambda m: weighted(m.products, "root"),
    "48x4, trimmed": lambda m: weighted(m.products, "trimmed"),
    "48x4, half": lambda m: mixed(m.products, 0.5),
    "48x4, steps apart": lambda m: mixed(m.products, 0.0),
    TAIL: lambda m: m.products.table(apart=False),
}


def measured(run: Run, calls: int, probes: int, needed: bool) -> Measured:
    """Measure what is not kept in the run folder; single outputs of so many calls only where they are ``needed``."""
    folder = run.path / "bench-trajectory"
    folder.mkdir(exist_ok=True)
    chosen = tuple(range(len(run.calibration.inputs.timesteps)))
    subject: Subject = measured_subject(chosen, run)
    subject = replace(subject, settings=subject.settings.replace(calls=calls, probes=probes))
    key = f"{run.digest('candidates')[:16]}-{calls}x{probes}"
    outputs, products = folder / f"outputs-{key}", folder / f"products-{key}.npz"
    if needed and not (outputs / "table.json").exists():
        outputs.mkdir(exist_ok=True)
        measure("probe", subject).save(outputs)
    if not products.exists():
        save_products(measured_products(subject), products)
    default = SensitivityTable.load(run.stage("measure"))
    more = SensitivityTable.load(outputs) if needed else default
    return Measured(default, more, load_products(products))


def save_products(products: StepProducts, path: Path) -> None:
    pairs = [(layer, scheme) for layer, row in products.values.items() for scheme in row]
    stacked = np.stack([products.values[layer][scheme] for layer, scheme in pairs])
    unit = np.nan if products.mean_square is None else products.mean_square
    np.savez(
        path, values=stacked, power=products.power, unit=unit, pairs=np.array(json.dumps(pairs))
    )


def load_products(path: Path) -> StepProducts:
    with np.load(path) as data:
        values: dict[str, dict[str, Array]] = {}
        for (layer, scheme), rows in zip(json.loads(str(data["pairs"])), data["values"]):
            values.setdefault(layer, {})[scheme] = rows
        unit = float(data["unit"])
        return StepProducts(values, data["power"], None if np.isnan(unit) else unit)


class Images:
    """The PSNR of each image of a plan, float64 [N], in dB; kept by the plan."""

    def __init__(self, run: Run, count: int) -> None:
        self._run = run
        self._settings = EvaluateSettings(
            samples=count, steps=run.recipe.evaluate.steps, timesteps=1, calls=1, seed=SEED
        )
        self._file = run.path / "bench-trajectory" / f"psnr-{count}.json"
        self._kept: dict[str, list[float]] = {}
        if self._file.exists():
            self._kept = json.loads(self._file.read_text("utf-8"))

    def of(self, schemes: dict[str, str]) -> Array:
        """Sample the plan's images, unless they are known."""
        key = json.dumps(sorted(schemes.items()))
        if key not in self._kept:
            with tempfile.TemporaryDirectory(dir=self._run.scratch()) as place:
                write_plan(self._run, schemes, Path(place))
                variants = {"plan": Variant(Path(place) / SIMULATED)}
                found = evaluate(
                    variants,
                    self._run.exported.model,
                    self._settings,
                    cache=self._run.path / ".samples",
                )
            self._kept[key] = list(found.variants["plan"].psnr_db_each)
            self._file.write_text(json.dumps(self._kept), "utf-8")
        return np.array(self._kept[key])


def narrowed(table: SensitivityTable, allowed: Callable[[Any], bool]) -> SensitivityTable:
    """Return the table with only the schemes that a kind of plan may take, and FP16."""
    losses = {
        layer: {name: loss for name, loss in row.items() if allowed(SCHEMES[name])}
        for layer, row in table.losses.items()
    }
    return replace(table, losses=losses)


def figures(each: Array) -> tuple[float, float, float, float]:
    """Return mean, pooled, tenth percentile and worst of the images' PSNR."""
    pooled = -10 * np.log10(np.mean(10 ** (-each / 10)))
    return float(each.mean()), float(pooled), float(np.quantile(each, 0.1)), float(each.min())


def solved(
    run: Run, table: SensitivityTable, budget: float, kind: str, name: str
) -> PrecisionPlan | None:
    """Return the plan of an objective; None where none fits."""
    section = run.recipe.allocate.replace(**OWN_SETTINGS.get(name, {}))
    recipe = run.recipe.model_copy(update={"allocate": section})
    solver = PlanSolver(replace(run, recipe=recipe), table=narrowed(table, KINDS[kind]))
    try:
        return solver.solve(str(budget))
    except InfeasibleBudgetError:
        return None


def predicted(plan: PrecisionPlan) -> str:
    """Return mean, pooled and tenth percentile of the PSNR that a plan is predicted to have."""
    found = plan.predicted_images
    if found is None:
        return ""
    values = (found.psnr_db, found.pooled_psnr_db, found.quantiles[SHARES.index(0.1)])
    return " / ".join(f"{value:.1f}" for value in values)


Row = tuple[str, str, float, tuple[float, float, float, float]]
OfModel = tuple[str, str, str, float, tuple[float, float, float, float]]


def of_model(
    run: Run, page: Page, names: list[str], budgets: Iterable[float], images: int
) -> list[Row]:
    """Measure one model, say its tables, and return (objective, kind, budget, figures)."""
    tables = measured(run, 48, 4, MORE_CALLS in names).tables(names)
    seen, rows = Images(run, images), list[Row]()
    for kind in KINDS:
        for budget in budgets:
            lines = []
            for name, table in tables.items():
                plan = solved(run, table, budget, kind, name)
                if plan is None:
                    continue
                found = figures(seen.of(plan.schemes))
                rows.append((name, kind, budget, found))
                guess = predicted(plan) if "," not in name else ""
                size = f"{plan.size_bytes / plan.fp16_size_bytes:.4f}"
                lines.append([name, size, *(f"{value:.1f}" for value in found), guess])
            if lines:
                page.say(f"### {kind}, budget {budget:g}")
                header = ("objective", "of FP16", "mean", "pooled", "tenth", "worst", "predicted")
                page.say(markdown(header, lines))
    return rows


def summary(rows: list[OfModel], names: list[str]) -> str:
    """Compare each objective with the first, over all settings: mean differences in dB, and how often it wins."""
    base = {(kind, budget, model): found for model, n, kind, budget, found in rows if n == names[0]}
    lines = []
    for name in names[1:]:
        gains = np.array(
            [
                np.subtract(found, base[kind, budget, model])
                for model, n, kind, budget, found in rows
                if n == name and (kind, budget, model) in base
            ]
        )
        if not len(gains):
            continue
        cells = [
            f"{mean:+.2f} ({wins} of {len(gains)})"
            for mean, wins in zip(gains.mean(0), (gains > 0).sum(0), strict=True)
        ]
        lines.append([name, *cells])
    return markdown((f"beside {names[0]}", "mean", "pooled", "tenth", "worst"), lines)


def main() -> None:
    parser = bench_parser(__doc__)
    parser.add_argument("models", nargs="*", default=["digits", "emoji"])
    parser.add_argument("--budgets", default="0.27,0.35,0.5")
    parser.add_argument("--objectives", default=";".join(OBJECTIVES), help="some, with ; between")
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("-o", "--out", type=Path, default=Path("runs"))
    chosen = parser.parse_args()
    names = [name for name in OBJECTIVES if name in chosen.objectives.split(";")]
    page, every = Page("Plans by trajectory probes beside plans by single-output probes"), []
    for model in chosen.models:
        name, _, place = model.partition("=")
        # Trimmed means are objectives of their own here.
        values = {"model": place or name, "engine.build": False, "allocate.branches": []}
        values |= {"allocate.trim": 0.0, "allocate.images_count": "equal"}
        values["measure.method"] = "probe"
        recipe = bench_recipe(None, chosen.set, values)
        folder = chosen.out / f"bench-trajectory-{name}"
        with open_pipeline(recipe, folder, PlainTalk()) as pipeline:
            pipeline.run_until("measure")
            page.say(f"## {name}\n\n{weights_digest(pipeline.run)}")
            budgets = parse_budgets(chosen.budgets)
            rows = of_model(pipeline.run, page, names, budgets, chosen.images)
        page.say(f"Of {name}, in dB:\n\n{summary([(name, *row) for row in rows], names)}")
        every += [(name, *row) for row in rows]
    page.say(f"## Together\n\n{summary(every, names)}")
    for kind in KINDS:
        rows = [row for row in every if row[2] == kind]
        page.say(f"## Together, {kind}\n\n{summary(rows, names)}")
    page.save(chosen.page)


if __name__ == "__main__":
    main()
