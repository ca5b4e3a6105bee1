"""Three papers' claims in kind: MPQ-Diff's, MPQ-DM's and MPQ-DMv2's methods against uniform bits and our default.

    python benchmarks/papers.py [--models digits emoji]

Three questions on each bundled model, every plan sampled from the same noise as the float model:

- MPQ-Diff (arXiv 2412.00144): of what uniform 4 bits add to the Frechet distance, how much goes with 16.5 % more bytes,
  shared out by ORM's importances and by our default (the paper, on LSUN: FID 65.73 -> 15.39)? Once among the deployable
  schemes (uniform: INT4 blocks), once simulated with INT8 activations at 4 and at 3 bits per channel.
- MPQ-DM (arXiv 2412.11549): W2A4 and W3A6, without and with its outlier-driven bits (omq). Simulated.
- MPQ-DMv2 (arXiv 2507.04290, by our reading of its abstract): the same with binary residuals (zres). Simulated.

Beside each stands our default allocation, at the same bytes or fewer and the same activation bits, among the same
grids, and where it may also take omq and zres; and the same by trajectory probes (`--sensitivity trajectory`), whose
objective is the final image. As in MPQ-DM's code the first two linears of the time embedding, the
first and the last convolution have 8 bits in the W2A4 and W3A6 plans; ours may take what it likes there. All are
without training, so the papers' own figures are not to be expected. The Frechet distance is on the model's own small
feature network (docs/demo-model.md) and is no FID. "A tenth below": tenth percentile of the images' PSNR. Checks
compare plans of this very run by error, PSNR and distance to the float model's samples, each with the papers' best
plan by it, and say by what ours does not win; the exit code is 1 when one fails.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
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

from mpq_deploy.allocate.plan_solver import PlanSolver
from mpq_deploy.allocate.problem import Problem
from mpq_deploy.evaluate.evaluate import Variant, evaluate
from mpq_deploy.evaluate.metrics.frechet import Moments, frechet_distance
from mpq_deploy.evaluate.metrics.networks import DEMO, NetworkOptions
from mpq_deploy.evaluate.metrics.open_networks import open_network
from mpq_deploy.evaluate.metrics.real import real_set
from mpq_deploy.formats.scheme import SCHEMES, Scheme
from mpq_deploy.formats.sizes import FP16_BYTES
from mpq_deploy.graph.writers.deployed_graphs import SIMULATED
from mpq_deploy.graph.writers.plan_graphs import write_plan
from mpq_deploy.models.locate import DEMOS
from mpq_deploy.rounding.candidate_store import candidates_of
from mpq_deploy.rounding.row_grids import SimulatedMatrix
from mpq_deploy.run.pipeline import open_pipeline
from mpq_deploy.run.view import Run
from mpq_deploy.system.progress import PlainTalk

# MPQ-Diff's headline: so many more bytes than uniform bits.
MORE = 1.165
INT4 = ("w4a16-b32", "w4a16-b64", "w4a16-b128")
GRIDS = (2, 3, 4, 5, 6, 8)
# MPQ-DM's layers of 8 bits.
EIGHT_BITS = ("time_embedding.linear_1", "time_embedding.linear_2", "conv_in", "conv_out")
# MPQ-DM and MPQ-DMv2; MPQ-Diff among simulated and among deployable schemes.
PARTS = ("low-bits", "orm-simulated", "orm")
# What shares out MPQ-Diff's further bytes.
MIXES = {
    "orm": "MPQ-Diff: ORM's allocation",
    "probe": "our default",
    "trajectory": "our default by trajectories",
}
STAGES = ("export", "calibrate", "candidates", "measure")
HEADER = (
    "plan",
    "of FP16",
    "bytes",
    "NMSE",
    "PSNR dB",
    "a tenth below",
    "Frechet to real",
    "Frechet to float",
    "increase that goes",
)
Allowed = Callable[[str, Scheme], bool]


@dataclass(frozen=True)
class Plan:
    """A plan to compare: its name, its schemes by layer, its bytes."""

    name: str
    schemes: dict[str, str]
    size_bytes: int


@dataclass(frozen=True)
class Result:
    """A plan and what came out of it. Distances to the real images and to the float model's samples."""

    plan: Plan
    of_fp16: float
    nmse: float
    psnr_db: float
    tenth_db: float
    to_real: float
    to_float: float


class Bench:
    """One finished measurement: plans by solver or by rule, and their evaluation."""

    def __init__(self, run: Run, model: str, samples: int) -> None:
        self.run, self.model, self.samples = run, model, samples
        self.solver = PlanSolver(run)
        self.choices = list(self.solver.choices)
        self.fixed = self.solver.fp16_size - FP16_BYTES * self.solver.weights
        options = NetworkOptions(demo=model)
        self.network = open_network(DEMO, options)
        real = real_set(None, self.network, options, ())
        assert real is not None, "the bundled models ship statistics of their real images"
        self.real = real.moments
        self.float_real = float("nan")

    def uniform(self, name: str, *preferred: str, eight: str = "") -> Plan:
        """Give each layer the first of ``preferred`` that it may take, those of ``EIGHT_BITS`` the scheme ``eight``."""
        wanted = {
            c.name: (eight, *preferred) if eight and c.name in EIGHT_BITS else preferred
            for c in self.choices
        }
        return self._sized(
            name,
            {
                c.name: next(s for s in (*wanted[c.name], "fp16") if s in c.bytes)
                for c in self.choices
            },
        )

    def ours(self, name: str, budget: int, allowed: Allowed) -> Plan:
        """Solve for ``budget`` bytes among the allowed schemes, FP16 always among them."""
        self.solver.choices = [
            replace(
                c,
                bytes={
                    s: b for s, b in c.bytes.items() if s == "fp16" or allowed(c.name, SCHEMES[s])
                },
                loss={
                    s: v for s, v in c.loss.items() if s == "fp16" or allowed(c.name, SCHEMES[s])
                },
            )
            for c in self.choices
        ]
        plan = self.solver.solve(f"{budget}b")
        return Plan(name, plan.schemes, plan.size_bytes)

    def _sized(self, name: str, schemes: dict[str, str]) -> Plan:
        return Plan(name, schemes, Problem(self.choices, self.fixed, 0).plan_bytes(schemes))

    def evaluate(self, plans: list[Plan]) -> list[Result]:
        """Sample every plan and the float model from the same noise, and compare."""
        results = []
        for plan in plans:
            with tempfile.TemporaryDirectory(dir=self.run.scratch()) as folder:
                written = write_plan(self.run, plan.schemes, Path(folder))
                assert written == plan.size_bytes, (
                    f"{written} bytes written, {plan.size_bytes} planned"
                )
                results.append(self.evaluate_graph(plan, Path(folder) / SIMULATED))
        return results

    def evaluate_graph(self, plan: Plan, graph: Path) -> Result:
        """Sample ``graph``, written for ``plan``, and the float model from the same noise, and compare."""
        section, model = self.run.recipe.evaluate, self.solver.exported.model
        # All calls, as many as the images.
        settings = section.replace(
            samples=self.samples,
            timesteps=min(section.timesteps, section.steps),
            calls=self.samples,
        )
        found = evaluate(
            {"plan": Variant(graph)},
            model,
            settings,
            self.run.talk,
            cache=self.run.path / ".samples",
        )
        floats, ours = (
            Moments.of(self.network.features(found.images[name])) for name in ("float", "plan")
        )
        self.float_real = frechet_distance(floats, self.real)
        share = plan.size_bytes / self.solver.fp16_size
        distances = frechet_distance(ours, self.real), frechet_distance(ours, floats)
        variant = found.variants["plan"]
        tenth = float(np.quantile(variant.psnr_db_each, 0.1))
        return Result(plan, share, variant.measured_nmse, variant.psnr_db, tenth, *distances)

    def table(self, results: list[Result]) -> str:
        """Return the rows; the increase is of the distance to the real images, against the first row's."""
        first = results[0].to_real - self.float_real
        rows = []
        for result in results:
            gone = (
                f"{100 * (1 - (result.to_real - self.float_real) / first):.0f} %"
                if first > 0
                else "no increase"
            )
            rows.append(
                [
                    result.plan.name,
                    f"{result.of_fp16:.4f}",
                    f"{result.plan.size_bytes:,}",
                    f"{result.nmse:.2e}",
                    decibels(result.psnr_db),
                    decibels(result.tenth_db),
                    f"{result.to_real:.4f}",
                    f"{result.to_float:.5f}",
                    "" if result is results[0] else gone,
                ]
            )
        rows.append(["float model", "", "", "", "", "", f"{self.float_real:.4f}", "0", ""])
        return markdown(HEADER, rows)


def grids(activation: int) -> Allowed:
    """Allow plain grids with activations of so many bits."""
    return lambda layer, s: not s.branch and s.bits[1] == activation


def with_shared_bits(activation: int) -> Allowed:
    """Allow grids, omq and zres with activations of so many bits, and 8 bits where MPQ-DM has them."""
    return lambda layer, s: (
        s.bits[1] == activation or (s.name == "w8a8-sim" and layer in EIGHT_BITS)
    )


def simulated_schemes() -> list[str]:
    """Return what the simulated run measures."""
    return ["fp16", *(f"w{bits}a{a}-sim" for a in (4, 6, 8) for bits in GRIDS)]


@contextmanager
def measured_by(
    method: str, changes: list[str], values: dict[str, object], out: Path
) -> Iterator[Run]:
    """Open a run of the same candidates, measured by ``method``; ``out`` itself for the default."""
    recipe = bench_recipe(None, changes, {**values, "measure.method": method})
    folder = out if method == "probe" else other_method(out, method)
    with open_pipeline(recipe, folder, PlainTalk()) as pipe:
        pipe.run_until("measure")
        yield pipe.run


def other_method(source: Path, method: str) -> Path:
    """Copy a finished run folder, so that another metric can be measured on the same candidates."""
    target = source.with_name(f"{source.name}-{method}")
    if not target.exists():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns(".samples", "lock*"))
    return target


def check(name: str, ours: Result, papers: list[Result]) -> tuple[bool, str]:
    """Whether a plan of ours beats the papers' by error, PSNR and distance to the float model's samples; the line."""
    found, lost = [], []
    for what, value, show in MEASURES:
        best = min(papers, key=value)
        shown = f"{what} {show(ours)} against {show(best)} ({best.plan.name.partition(':')[0]})"
        (found if value(ours) < value(best) else lost).append(shown)
    text = "; ".join(found + ([f"NOT by {', '.join(lost)}"] if lost else []))
    return not lost, verdict(not lost, f"{name}: {ours.plan.name} beats the papers' plans", text)


# What plans are compared by: its name, a value that is the better the smaller it is, and how it is shown.
MEASURES: tuple[tuple[str, Callable[[Result], float], Callable[[Result], str]], ...] = (
    ("error", lambda r: r.nmse, lambda r: f"{r.nmse:.2e}"),
    ("PSNR", lambda r: -r.psnr_db, lambda r: f"{decibels(r.psnr_db)} dB"),
    ("distance", lambda r: r.to_float, lambda r: f"{r.to_float:.5f}"),
)


def against_orm(
    model: str,
    recipe_values: dict[str, object],
    changes: list[str],
    out: Path,
    samples: int,
    page: Page,
    cases: dict[str, tuple[tuple[str, ...], Allowed]],
) -> list[tuple[bool, str]]:
    """Answer MPQ-Diff's question for each of ``cases``: uniform schemes, and what the mixes may choose from."""
    plain = bench_recipe(None, changes, recipe_values)
    with open_pipeline(plain, out, PlainTalk()) as pipe:
        pipe.run_until("measure")
        bench = Bench(pipe.run, model, samples)
        # Not from the run by orm, which leaves out schemes whose activations have other bits than it fixes.
        page.say(about(pipe.run, samples))
        plans = {name: [bench.uniform(name, *preferred)] for name, (preferred, _) in cases.items()}
    budgets = {name: int(MORE * row[0].size_bytes) for name, row in plans.items()}
    for method, label in MIXES.items():
        with measured_by(method, changes, recipe_values, out) as run:
            bench = Bench(run, model, samples)
            for name, (_, allowed) in cases.items():
                plans[name].append(bench.ours(f"{label}, +16.5 %", budgets[name], allowed))
    checks = []
    with open_pipeline(plain, out, PlainTalk()) as pipe:
        bench = Bench(pipe.run, model, samples)
        for name, row in plans.items():
            results = bench.evaluate(row)
            page.say(f"### MPQ-Diff against {name}\n\n{bench.table(results)}")
            checks += [check(f"{model}, {name}", ours, results[:2]) for ours in results[2:]]
    return checks


def low_bits(
    bench: Bench, by_trajectories: Bench, bits: int, activation: int, page: Page
) -> list[tuple[bool, str]]:
    """Answer MPQ-DM's and MPQ-DMv2's questions for W``bits``A``activation``; the second bench has the other losses."""
    body = f"w{bits}a{activation}-sim"
    plain = bench.uniform(f"uniform {body}", body, eight="w8a8-sim")
    omq = bench.uniform(f"MPQ-DM: {body}+omq", f"{body}+omq", body, eight="w8a8-sim")
    zres = bench.uniform(f"MPQ-DMv2: {body}+zres", f"{body}+zres", body, eight="w8a8-sim")
    everything = with_shared_bits(activation)
    plans = [
        plain,
        omq,
        zres,
        bench.ours(
            "our default among grids, bytes of omq",
            omq.size_bytes,
            lambda layer, s: everything(layer, s) and not s.branch,
        ),
        bench.ours("our default among all, bytes of omq", omq.size_bytes, everything),
        bench.ours("our default among all, bytes of zres", zres.size_bytes, everything),
        by_trajectories.ours(
            "our default by trajectories among all, bytes of zres", zres.size_bytes, everything
        ),
    ]
    results = bench.evaluate(plans)
    page.say(
        f"### W{bits}A{activation}, simulated\n\n{bench.table(results)}\n\n{shared_bits(bench, body)}"
    )
    name = f"{bench.model} W{bits}A{activation}"
    # Those with more bytes than MPQ-DM's plans are compared with MPQ-DMv2's, too.
    return [check(name, results[4], results[:2])] + [
        check(name, ours, results[:3]) for ours in results[5:]
    ]


def shared_bits(bench: Bench, body: str) -> str:
    """Say how many channels of all layers take residuals where they may, and how many get other than the mean bits."""
    channels = residuals = 0
    moved = {"omq": 0, "zres": 0}
    bits = SCHEMES[body].bits[0]
    for candidates in candidates_of(bench.run, bench.solver.exported.graph).values():
        for kind in moved:
            matrix = candidates.forms.get(SCHEMES[f"{body}+{kind}"].weight_form)
            if isinstance(matrix, SimulatedMatrix):
                moved[kind] += int((matrix.grid_bits + matrix.orders != bits).sum())
                if kind == "zres":
                    channels += len(matrix.codes)
                    residuals += int((matrix.orders - (matrix.grid_bits == 0) > 0).sum())
    return (
        f"Of {channels:,} channels omq gives {moved['omq']:,} a bit more or less than the mean, by the error of the "
        f"layer's output (0: it chose m = 0 everywhere), and zres {moved['zres']:,}; {residuals:,} take binary "
        f"residuals ({100 * residuals / channels:.0f} %)."
    )


def measure_model(
    model: str, parts: list[str], changes: list[str], out: Path, samples: int, page: Page
) -> list[tuple[bool, str]]:
    """Measure one model and say its tables; return the checks."""
    page.say(f"## {model}")
    common: dict[str, object] = {"model": model, "engine.build": False}
    deployable = {**common, "target": "onnxruntime-cpu"}
    simulated = {
        **common,
        "target": "simulate",
        "allocate.schemes": simulated_schemes(),
        "allocate.branches": ["omq", "zres"],
    }
    checks = []
    place = out / f"{model}-simulate"
    if "low-bits" in parts:
        with (
            measured_by("probe", changes, simulated, place) as run,
            measured_by("trajectory", changes, simulated, place) as other,
        ):
            page.say(about(run, samples))
            benches = Bench(run, model, samples), Bench(other, model, samples)
            for bits, activation in (2, 4), (3, 6):
                checks += low_bits(*benches, bits, activation, page)
    if "orm-simulated" in parts:
        cases = {
            f"uniform w{bits}a8-sim (simulated)": ((f"w{bits}a8-sim",), grids(8)) for bits in (4, 3)
        }
        checks += against_orm(model, simulated, changes, place, samples, page, cases)
    if "orm" in parts:
        everything: dict[str, tuple[tuple[str, ...], Allowed]] = {
            "uniform INT4 blocks (w4a16, deployable)": (INT4, lambda layer, scheme: True)
        }
        checks += against_orm(model, deployable, changes, out / model, samples, page, everything)
    return checks


def about(run: Run, samples: int) -> str:
    """Say what was measured, and what it took."""
    steps = run.recipe.evaluate.steps
    made = f"{weights_digest(run)}\n\n{made_by_stages(run, STAGES)}"
    return f"{made} {samples} samples for every plan, {steps} steps."


def main() -> None:
    parser = bench_parser(__doc__)
    parser.add_argument(
        "--models", nargs="+", choices=DEMOS, default=list(DEMOS), help="bundled models"
    )
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=PARTS,
        default=list(PARTS),
        help="which questions (default: all)",
    )
    parser.add_argument("--samples", type=int, default=256, help="images per plan (default 256)")
    parser.add_argument(
        "-o",
        "--out",
        type=Path,
        default=Path("runs/bench-papers"),
        help="folder of run folders",
    )
    chosen = parser.parse_args()
    page = Page("Three papers' claims in kind")
    page.say("\n\n".join(part for part in (__doc__ or "").split("\n\n")[2:]))
    checks = []
    for model in chosen.models:
        checks += measure_model(model, chosen.parts, chosen.set, chosen.out, chosen.samples, page)
    page.say("## Checks\n\n" + "\n".join(line for _, line in checks))
    page.save(chosen.page)
    sys.exit(0 if all(passed for passed, _ in checks) else 1)


if __name__ == "__main__":
    main()
