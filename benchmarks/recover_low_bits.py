"""What training is worth at two bits, part by part: MPQ-DM's and MPQ-DMv2's methods after EfficientDM's training.

    python benchmarks/recover_low_bits.py [MODEL ...] [--bits w2a4] [--steps N] [--seeds 4 5 6] [--parts NAME ...]

Weights of 2 bits and activations of 4 are simulated: no engine can hold them. "base" is uniform bits, trained as
EfficientDM's code does (low-rank adapters and scales, the noise as target, all timesteps alike); each "+" adds one
part. As in MPQ-DM's code the first two linears of the time embedding, the first and the last convolution have 8 bits.
"ours" is what `mpq-deploy recover` does by default, on uniform bits and on the plan that our default allocation makes
of the same bytes. Every part starts from weights rounded in the same way (GPTQ and what follows it), sees the same
noise with the same seed, and makes the same number of updates.

Frechet distances are on the model's own small feature network and are no FID. "below base" compares what the variant
adds to the float model's own distance to the real images with what base adds. Figures are means over the seeds (of the
noise of training; the images have one seed), behind "±" half of largest less smallest. The check is MPQ-DM's claim on
LSUN (arXiv 2412.11549): outlier-driven bits and relation distillation take 58 % off; a second one is ours against base.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from papers import Bench, Plan, Result, simulated_schemes, with_shared_bits
from table import Page, bench_parser, bench_recipe, markdown, verdict, weights_digest

from mpq_deploy.graph.writers.deployed_graphs import SIMULATED
from mpq_deploy.recover.recover import recover, write_recovered
from mpq_deploy.recover.training_trajectories import TrajectoryRecorder
from mpq_deploy.run.pipeline import open_pipeline
from mpq_deploy.run.view import Run
from mpq_deploy.stages.recover import recover_task
from mpq_deploy.system.progress import PlainTalk

EPS = {"eps": 1.0}
BASE: dict[str, Any] = {
    "losses": EPS,
    "timesteps": "uniform",
    "rank": 32,
    "adapter_rate": 1.0,
    "constant_rate": 0.0,
    "initialization": "zero",
}
RELATION, MEMORY = {"relation": 1e-3}, {"memory": 1e-2}


@dataclass(frozen=True)
class Part:
    """What is trained: the branch of the uniform bits ("": none, None: our own allocation), and the settings."""

    branch: str | None
    settings: dict[str, Any]


PARTS = {
    "base": Part("", BASE),
    "+ OMQ": Part("omq", BASE),
    "+ relation": Part("", {**BASE, "losses": {**EPS, **RELATION}}),
    "+ OMQ, relation (MPQ-DM)": Part("omq", {**BASE, "losses": {**EPS, **RELATION}}),
    "+ low-rank start": Part("", {**BASE, "initialization": "svd"}),
    "+ binary residual": Part("zres", BASE),
    "+ memory": Part("", {**BASE, "losses": {**EPS, **MEMORY}}),
    "+ residual, start, memory (MPQ-DMv2)": Part(
        "zres", {**BASE, "losses": {**EPS, **MEMORY}, "initialization": "svd"}
    ),
    "ours, uniform bits": Part("", {}),
    "ours, binary residual": Part("zres", {}),
    "ours, our allocation": Part(None, {}),
}
CLAIM = 0.58
HEADER = (
    "",
    "bytes",
    "NMSE untrained",
    "NMSE",
    "PSNR dB",
    "Frechet to real",
    "below base",
    "Frechet to float",
    "CPU min",
)


@dataclass(frozen=True)
class Row:
    """One part with one seed."""

    untrained: float
    result: Result
    cpu_minutes: float


class LowBits:
    """One run of the target simulate: plans, their training and evaluation."""

    def __init__(self, run: Run, model: str, body: str, samples: int) -> None:
        self.run, self.body = run, body
        self.bench = Bench(run, model, samples)
        self._untrained: dict[str, float] = {}

    def plan(self, name: str, part: Part) -> Plan:
        """Return the plan of a part; ours has the bytes of uniform bits."""
        uniform = self.bench.uniform(name, self.body, eight="w8a8-sim")
        if part.branch is None:
            return self.bench.ours(name, uniform.size_bytes, with_shared_bits(int(self.body[3])))
        if part.branch:
            return self.bench.uniform(
                name, f"{self.body}+{part.branch}", self.body, eight="w8a8-sim"
            )
        return uniform

    def train(self, name: str, part: Part, seed: int, steps: int) -> Row:
        """Train and evaluate one part."""
        run, plan = self.run, self.plan(name, part)
        recipe = run.recipe
        task = recover_task(run, plan.schemes)
        options = run.recipe.recover.replace(steps=steps, seed=seed, **part.settings)
        args = (run.exported.model, recipe.calibrate.steps, recipe.evaluate.sampler)
        cpu = time.process_time()
        with tempfile.TemporaryDirectory(dir=run.scratch()) as scratch:
            folder = Path(scratch)
            state = folder / "checkpoint"
            recovered = recover(
                task, options, TrajectoryRecorder(*args), run.talk, state, f"{name} {seed}"
            )
            minutes = (time.process_time() - cpu) / 60
            write_recovered(task, recovered, folder)
            return Row(
                recovered.recovery.before,
                self.bench.evaluate_graph(plan, folder / SIMULATED),
                minutes,
            )


def mean(rows: Sequence[Row], key: str) -> float:
    """Return the mean of a figure of the results."""
    return float(np.mean([getattr(row.result, key) for row in rows]))


def spread(values: Sequence[float], form: str) -> str:
    """Write the mean of ``values``, and half their range where there are several."""
    said = f"{np.mean(values):{form}}"
    return f"{said} ± {(max(values) - min(values)) / 2:{form}}" if len(values) > 1 else said


def gone(rows: Sequence[Row], base: Sequence[Row], float_real: float) -> float:
    """Return the share of base's increase of the Frechet distance over the float model's that is gone."""
    return 1 - (mean(rows, "to_real") - float_real) / (mean(base, "to_real") - float_real)


def cells(name: str, rows: Sequence[Row], base: Sequence[Row], float_real: float) -> list[str]:
    """Return one row of the table."""
    values = {
        key: [getattr(row.result, key) for row in rows]
        for key in ("nmse", "psnr_db", "to_real", "to_float")
    }
    return [
        name,
        f"{rows[0].result.plan.size_bytes:,}",
        f"{np.mean([row.untrained for row in rows]):.2e}",
        spread(values["nmse"], ".2e"),
        spread(values["psnr_db"], ".1f"),
        spread(values["to_real"], ".3f"),
        f"{100 * gone(rows, base, float_real):.0f} %" if base and rows is not base else "",
        spread(values["to_float"], ".3f"),
        f"{np.mean([row.cpu_minutes for row in rows]):.1f}",
    ]


def measure_model(model: str, chosen: argparse.Namespace, page: Page) -> list[bool]:
    """Measure one model; say its table and checks; return whether they passed."""
    values: dict[str, Any] = {
        "model": model,
        "engine.build": False,
        "target": "simulate",
        "allocate.schemes": simulated_schemes(),
        "allocate.branches": ["omq", "zres"],
    }
    recipe = bench_recipe(None, chosen.set, values)
    body = f"{chosen.bits}-sim"
    rows: dict[str, list[Row]] = {name: [] for name in PARTS if name in chosen.parts}
    with open_pipeline(recipe, chosen.out / f"{model}-simulate", PlainTalk()) as pipeline:
        pipeline.run_until("measure")
        bench = LowBits(pipeline.run, model, body, chosen.samples)
        page.say(
            f"## {model}, {chosen.bits.upper()}, simulated\n\n{weights_digest(pipeline.run)}\n\n"
            f"{chosen.steps} updates, "
            f"seeds {', '.join(map(str, chosen.seeds))}; {chosen.samples} images."
        )
        for seed in chosen.seeds:
            for name, found in rows.items():
                found.append(bench.train(name, PARTS[name], seed, chosen.steps))
                pipeline.run.talk.line(" | ".join(cells(name, found[-1:], [], 0.0)))
        float_real = bench.bench.float_real
    base = rows.get("base", [])
    page.say(
        markdown(HEADER, [cells(name, found, base, float_real) for name, found in rows.items()])
    )
    page.say(f"The float model's own distance to the real images is {float_real:.3f}.")
    return checks(model, rows, float_real, page)


def checks(model: str, rows: dict[str, list[Row]], float_real: float, page: Page) -> list[bool]:
    """Say whether MPQ-DM's parts, and ours, take as much off as MPQ-DM claims."""
    passed = []
    base = rows.get("base", [])
    for name in ("+ OMQ, relation (MPQ-DM)", "ours, our allocation"):
        if base and name in rows:
            share = gone(rows[name], base, float_real)
            passed.append(share >= CLAIM)
            said = f"{model}: '{name}' is at least {CLAIM:.0%} below base"
            page.say(verdict(passed[-1], said, f"{share:.0%}"))
    return passed


def main() -> None:
    parser = bench_parser(__doc__)
    parser.add_argument("models", nargs="*", default=["digits"], help="bundled models")
    parser.add_argument("--bits", default="w2a4", help="of the uniform plan, such as w2a4 or w3a6")
    parser.add_argument("--steps", type=int, default=400, help="updates of each training")
    parser.add_argument("--seeds", type=int, nargs="+", default=[4, 5, 6])
    parser.add_argument(
        "--samples", type=int, default=512, help="images behind each Frechet distance"
    )
    parser.add_argument(
        "--parts", nargs="+", choices=list(PARTS), default=list(PARTS), metavar="PART"
    )
    parser.add_argument(
        "-o", "--out", type=Path, default=Path("runs/bench-seeds"), help="folder of run folders"
    )
    chosen = parser.parse_args()
    page = Page("Recovery at low bits (simulated)")
    passed = [ok for model in chosen.models for ok in measure_model(model, chosen, page)]
    page.save(chosen.page)
    sys.exit(0 if all(passed) else 1)


if __name__ == "__main__":
    main()
