"""What ranges of INT8 activations are worth: static, by timestep, from the values; with factors of channels.

    python benchmarks/activations.py [MODEL]

MODEL is what `mpq-deploy build` takes; by default the bundled emoji model. The first table has every layer in INT8 in
one way, each part alone and together: the range's kind, the exponent of the channels' factors (`scaleN`: N tenths of
the activation's range move to the weight), and both as the probes choose them per activation; some of them without
shifts of the channels, too. The second has plans
within a budget: of weights alone and of INT8 compute alone, and of everything at the size of everything INT8. NMSE and
PSNR are against the float model from the same noise; milliseconds are the roofline's estimates. The checks are
relations between results of this very run, and the exit code is 1 when one fails.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from table import Page, bench_parser, bench_recipe, decibels, markdown, verdict

from mpq_deploy.allocate.exponents import best_int8
from mpq_deploy.calibrate.stats import CalibrationStats
from mpq_deploy.evaluate.evaluate import Variant, evaluate
from mpq_deploy.evaluate.evaluation_result import VariantResult
from mpq_deploy.formats.ranges import RANGES
from mpq_deploy.formats.scheme import SCHEMES
from mpq_deploy.formats.shifts import SHIFT_FORMS
from mpq_deploy.graph.writers.deployed_graphs import SIMULATED
from mpq_deploy.graph.writers.plan_graphs import write_plan
from mpq_deploy.latency.plan_latency import latency_costs
from mpq_deploy.run.pipeline import open_pipeline
from mpq_deploy.run.view import Run
from mpq_deploy.sensitivity.table import SensitivityTable
from mpq_deploy.system.progress import PlainTalk

# Every layer in one way, else the next of the list.
UNIFORM: dict[str, tuple[str, ...]] = {
    "weights alone": ("w8a16",),
    "static": ("w8a8",),
    "static + scale7": ("w8a8+scale7", "w8a8"),
    "timestep": ("w8a8-timestep", "w8a8"),
    "timestep + scale7": ("w8a8-timestep+scale7", "w8a8"),
    "dynamic": ("w8a8-dynamic", "w8a8"),
    "dynamic + scale7": ("w8a8-dynamic+scale7", "w8a8"),
}
NO_SHIFTS = ", no shifts"
BEST = "range and exponent by the probes"
# What all layers of a plan may take.
ALLOWED = {
    "weights alone": ["fp16", "w8a16", "w4a16"],
    "INT8 compute alone": ["fp16", "w8a8", "w4a8"],
}
# At the size of everything INT8.
EVERYTHING = "everything"
BUDGETS = ("0.35", "0.5")
# Goals, in dB: how near to weights alone by budget, and how far above everything INT8 at its size.
NEAR, ABOVE = {"0.35": 2.5, "0.5": 6.0}, 10.0
LARGEST_NMSE = 3.0e-4


@dataclass(frozen=True)
class Row:
    """A variant: its schemes, its share of FP16 and its estimated milliseconds."""

    schemes: Mapping[str, str]
    share: float
    milliseconds: float


class Models:
    """Writes variants of a run's model and compares them with the float model, all at once."""

    def __init__(self, run: Run, folder: Path) -> None:
        self.run, self.folder = run, folder
        self.rows: dict[str, Row] = {}
        self.variants: dict[str, Variant] = {}
        costs, why = latency_costs(run, run.exported)
        assert costs is not None, why
        self.costs = costs

    def add(self, title: str, schemes: Mapping[str, str], shifts: bool = True) -> None:
        """Write the graph of ``schemes`` (layer -> scheme)."""
        place = self.folder / str(len(self.rows))
        place.mkdir()
        run = self.run if shifts else unshifted(self.run)
        size = write_plan(run, dict(schemes), place)
        layers = self.run.exported.graph.layers
        taken = {name: SCHEMES[scheme] for name, scheme in schemes.items()}
        whole = self.run.exported.facts["fp16_size_bytes"]
        self.rows[title] = Row(schemes, size / whole, self.costs.plan_ns(layers, taken) / 1e6)
        self.variants[title] = Variant(place / SIMULATED, size)

    def compare(self, samples: int) -> Mapping[str, VariantResult]:
        """Return what ``samples`` images of each variant are worth."""
        settings = self.run.recipe.evaluate.replace(samples=samples, calls=samples)
        cache = self.run.path / ".samples"
        model = self.run.exported.model
        return evaluate(self.variants, model, settings, self.run.talk, cache=cache).variants


def unshifted(run: Run) -> Run:
    """Return ``run`` as calibration would have left it without shifts of channels."""
    bare, known = replace(run), run.calibration
    none = {"shifts": np.zeros((0, 0), np.int16), "shift_scales": np.zeros((0, 2))}
    stats = {name: replace(one, **none) for name, one in known.stats.activations.items()}
    bare.__dict__["calibration"] = known._replace(stats=CalibrationStats(stats))
    return bare


def uniform(run: Run, preferred: tuple[str, ...]) -> dict[str, str]:
    """Give every layer the first of the ``preferred`` schemes that it may take, else FP16."""
    losses = SensitivityTable.load(run.stage("measure")).losses
    return {
        layer: next((name for name in preferred if name in row), "fp16")
        for layer, row in losses.items()
    }


def by_probes(run: Run, kinds: tuple[str, ...]) -> dict[str, str]:
    """Give every layer INT8 with the range, of these ``kinds``, and the exponent of the least projected error."""
    table = SensitivityTable.load(run.stage("measure"))
    losses = {
        layer: {name: loss for name, loss in row.items() if SCHEMES[name].range.kind in kinds}
        for layer, row in table.losses.items()
    }
    best = best_int8(run.exported.graph.layers, run.target, losses, True)
    return {name: scheme.name for name, scheme in best.items()}


def kinds_of(row: Row) -> str:
    """Count what the layers of ``row`` have."""
    kinds = Counter(scheme_kind(name) for name in row.schemes.values())
    return ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))


def scheme_kind(name: str) -> str:
    """Return a scheme's range with whether it has factors, or its family where its input stays in FP16."""
    scheme = SCHEMES[name]
    if scheme.activation is None:
        return scheme.family
    kind = scheme.range.kind or "static"
    return f"{kind}+scale" if scheme.branch.rescales else kind


def table(rows: Mapping[str, Row], found: Mapping[str, VariantResult], titles: list[str]) -> str:
    """Return one row per variant."""
    lines = [
        [
            title,
            f"{rows[title].share:.4f}",
            f"{found[title].measured_nmse:.2e}",
            decibels(found[title].psnr_db),
            f"{rows[title].milliseconds:.3f}",
            kinds_of(rows[title]),
        ]
        for title in titles
    ]
    return markdown(("", "of FP16", "NMSE", "PSNR dB", "ms (estimated)", "layers"), lines)


def planned(models: Models, options: list[str], base: dict[str, object], out: Path) -> None:
    """Add the plans of every budget, and those at the size of everything INT8."""
    int8 = f"{models.rows[BEST].share:.4f}"
    wanted = [(title, b, names) for b in BUDGETS for title, names in ALLOWED.items()]
    for title, budget, allowed in (*wanted, (EVERYTHING, int8, [])):
        protect = [{"layers": "*", "schemes": allowed}] if allowed else []
        values = {**base, "budget": budget, "allocate.protect": protect}
        with open_pipeline(bench_recipe(None, options, values), out, PlainTalk()) as pipeline:
            plan = pipeline.current("allocate").plan
        models.add(f"{title}, {budget}", plan.schemes)


def checks(models: Models, found: Mapping[str, VariantResult]) -> list[tuple[bool, str]]:
    """Return the verdicts on the goals."""
    best, rows = found[BEST], models.rows
    verdicts = [
        (
            best.measured_nmse <= LARGEST_NMSE,
            f"everything INT8 is at most {LARGEST_NMSE:.1e}",
            f"{best.measured_nmse:.2e}, static {found['static'].measured_nmse:.2e}",
        )
    ]
    for budget, near in NEAR.items() if f"weights alone, {BUDGETS[0]}" in rows else ():
        int8, weights = (
            found[f"{title}, {budget}"].psnr_db for title in ("INT8 compute alone", "weights alone")
        )
        said = f"INT8 compute alone is within {near:g} dB of weights alone at {budget}"
        verdicts.append((weights - int8 <= near, said, f"{int8:.1f} and {weights:.1f} dB"))
    title = f"{EVERYTHING}, {rows[BEST].share:.4f}"
    if title not in rows:
        return [(passed, verdict(passed, what, said)) for passed, what, said in verdicts]
    above, times = found[title].psnr_db - best.psnr_db, (rows[title], rows[BEST])
    verdicts.append(
        (
            above >= ABOVE and times[0].milliseconds <= times[1].milliseconds,
            f"at its size a plan is {ABOVE:g} dB above everything INT8, and not slower by estimate",
            f"{above:+.1f} dB, {times[0].milliseconds:.3f} and {times[1].milliseconds:.3f} ms",
        )
    )
    return [(passed, verdict(passed, what, said)) for passed, what, said in verdicts]


def main() -> int:
    """Measure, print the page, and return the exit code."""
    parser = bench_parser(__doc__)
    parser.add_argument("model", nargs="?", default="emoji")
    parser.add_argument("-o", "--run", type=Path, default=Path("runs/bench-activations"))
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--no-plans", action="store_true", help="the first table alone")
    options = parser.parse_args()
    # Losses are set beside errors of the output.
    base: dict[str, object] = {"model": options.model, "engine.build": False}
    base["measure.method"] = "probe"
    page = Page(f"Ranges of INT8 activations: {options.model}")
    kinds = tuple(kind.kind for kind in RANGES)
    with tempfile.TemporaryDirectory() as folder:
        with open_pipeline(
            bench_recipe(None, options.set, base), options.run, PlainTalk()
        ) as pipeline:
            models = Models(pipeline.current("measure"), Path(folder))
        for title, preferred in UNIFORM.items():
            models.add(title, uniform(models.run, preferred))
            if SCHEMES[preferred[0]].activation_form in SHIFT_FORMS:
                models.add(title + NO_SHIFTS, uniform(models.run, preferred), shifts=False)
        models.add("static, exponent by the probes", by_probes(models.run, kinds[:1]))
        models.add("static or timestep, by the probes", by_probes(models.run, kinds[:2]))
        models.add(BEST, by_probes(models.run, kinds))
        models.add(BEST + NO_SHIFTS, by_probes(models.run, kinds), shifts=False)
        single = list(models.rows)
        if not options.no_plans:
            planned(models, options.set, base, options.run)
        found = models.compare(options.samples)
    plans = [title for title in models.rows if title not in single]
    page.say(f"## Every layer in INT8\n\n{table(models.rows, found, single)}")
    if plans:
        page.say(f"## Plans within a budget\n\n{table(models.rows, found, plans)}")
    verdicts = checks(models, found)
    page.say("\n".join(line for _, line in verdicts))
    page.save(options.page)
    return 0 if all(passed for passed, _ in verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
