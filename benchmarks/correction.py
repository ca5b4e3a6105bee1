"""What PTQD's correction of the sampler is worth: each plan as it is and corrected, on fresh noise.

    python benchmarks/correction.py [MODEL ...]

MODEL is what `mpq-deploy build` takes; by default both bundled models. Per budget the plan is quantized, its
correction fitted on calibration calls that its weights were not rounded on, and both are compared with the float model
on the evaluation's noise: first with the model's own sampler (20 steps of DDIM, eta 0: slope and bias only), then with
DDPM of as many steps and the same noise (the residual's variance taken out as well). Everything INT8 and INT4 are
corrected in the same way. "Held-out" is the output's error on calls that the fit has not seen, before -> after, and at
how many timesteps the fit was applied. "Noise taken out" is the residual's largest share of DDPM's noise variance over
the steps (without clipping). The check fails when the correction raises the output's error on fresh noise anywhere.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

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
from mpq_deploy.errors import InfeasibleBudgetError
from mpq_deploy.evaluate.evaluate import Variant, evaluate
from mpq_deploy.evaluate.evaluation_result import VariantResult
from mpq_deploy.evaluate.variants import read_controls
from mpq_deploy.graph.writers.deployed_graphs import SIMULATED
from mpq_deploy.graph.writers.plan_graphs import write_plan
from mpq_deploy.models.spec import FloatModel
from mpq_deploy.run.pipeline import open_pipeline
from mpq_deploy.run.view import Run
from mpq_deploy.runtime.correction import Correction
from mpq_deploy.stages.correction import correction_for
from mpq_deploy.system.progress import PlainTalk

BUDGETS = (0.265, 0.28, 0.35, 0.5)
STAGES = ("export", "calibrate", "candidates", "measure", "controls")
HEADER = (
    "",
    "held-out NMSE",
    "applied",
    "NMSE",
    "corrected",
    "PSNR dB",
    "corrected",
    "SSIM",
    "corrected",
)
HEADER = (*HEADER, "DDPM: PSNR dB", "corrected", "noise taken out")

ABOUT = """\
Each pair of columns is without and with the correction. The samples of DDPM share the float model's noise, so their
PSNR counts noise that was taken out as a difference: it does not judge that part, whose aim is the samples'
distribution."""


@dataclass(frozen=True)
class Row:
    """One quantized graph, without and with its correction, under the model's sampler and under DDPM."""

    name: str
    correction: Correction
    plain: VariantResult
    corrected: VariantResult
    ddpm: tuple[VariantResult, VariantResult]
    noise_share: float

    @property
    def gain_db(self) -> float:
        """How much the PSNR rises."""
        return self.corrected.psnr_db - self.plain.psnr_db

    def cells(self) -> list[str]:
        """Return the row of the table."""
        before, after = self.correction.heldout_nmse()
        used = sum(step.applied for step in self.correction.steps)
        pairs = [f"{self.plain.measured_nmse:.3e}", f"{self.corrected.measured_nmse:.3e}"]
        pairs += [decibels(self.plain.psnr_db), decibels(self.corrected.psnr_db)]
        pairs += [f"{self.plain.ssim:.4f}", f"{self.corrected.ssim:.4f}"]
        pairs += [decibels(result.psnr_db) for result in self.ddpm]
        held = f"{before:.3e} -> {after:.3e}"
        return [
            self.name,
            held,
            f"{used}/{len(self.correction.steps)}",
            *pairs,
            f"{100 * self.noise_share:.2g} %",
        ]


def compare(run: Run, name: str, folder: Path) -> Row:
    """Fit the correction of the graphs in ``folder`` and evaluate it."""
    exported, section = run.exported, run.recipe.evaluate
    correction = correction_for(run, folder)
    settings = section.replace(
        timesteps=min(section.timesteps, section.steps), calls=section.samples
    )
    ddpm = exported.spec.model_copy(
        update={"scheduler": {**exported.spec.scheduler, "_class_name": "DDPMScheduler"}}
    )
    graph, found = folder / SIMULATED, []
    for spec, chosen in (
        (exported.spec, settings),
        (ddpm, settings.replace(sampler="folder", timesteps=1)),
    ):
        variants = {"plain": Variant(graph), "corrected": Variant(graph, correction=correction)}
        model = FloatModel(exported.path, spec, exported.conditions)
        result = evaluate(variants, model, chosen, run.talk, cache=run.path / ".samples")
        found.append((result.variants["plain"], result.variants["corrected"]))
    return Row(
        name,
        correction,
        *found[0],
        found[1],
        noise_share(correction, ddpm.scheduler, section.steps),
    )


def noise_share(correction: Correction, config: dict[str, object], steps: int) -> float:
    """Return the largest share of DDPM's noise variance that the residual takes the place of.

    The last step is left out: DDPM adds no noise there but a floor of 1e-20.
    """
    import diffusers
    import torch

    from mpq_deploy.runtime.corrected_scheduler import CorrectedScheduler

    scheduler = diffusers.DDPMScheduler.from_config(
        {**config, "clip_sample": False, "thresholding": False}
    )
    wrapped = CorrectedScheduler(scheduler, correction)
    wrapped.set_timesteps(steps)
    zeros = torch.zeros(1, correction.channels, 1, 1)
    shares = []
    for timestep in wrapped.timesteps[:-1]:
        wrapped.step(zeros, timestep, zeros)
        shares.append(wrapped.last_step.noise_share if wrapped.last_step else 0.0)
    return max(shares)


def measure_model(model: str, changes: list[str], out: Path, page: Page) -> list[Row]:
    """Measure one model; say its table. Returns the rows of the plans and of the controls."""
    recipe = bench_recipe(None, changes, {"model": model, "engine.build": False})
    rows: list[Row] = []
    missing = []
    with open_pipeline(recipe, out, PlainTalk()) as pipeline:
        pipeline.run_until("controls")
        solver = PlanSolver(pipeline.run)
        for budget in BUDGETS:
            try:
                plan = solver.solve(str(budget))
            except InfeasibleBudgetError as error:
                missing.append(
                    f"At {budget:g} no plan fits {model}: the smallest takes {error.smallest:,} bytes."
                )
                continue
            with tempfile.TemporaryDirectory(dir=pipeline.run.scratch()) as folder:
                write_plan(pipeline.run, plan.schemes, Path(folder))
                rows.append(compare(pipeline.run, f"ours, {budget:g}", Path(folder)))
        for name in read_controls(pipeline.run.stage("controls")):
            rows.append(
                compare(
                    pipeline.run,
                    f"everything {name.upper()}",
                    pipeline.run.stage("controls") / name,
                )
            )
        page.say(f"## {Path(model).stem}")
        page.say(f"{weights_digest(pipeline.run)}\n\n{made_by_stages(pipeline.run, STAGES)}")
    page.say("\n\n".join([markdown(HEADER, [row.cells() for row in rows]), *missing]))
    return rows


def main() -> None:
    parser = bench_parser(__doc__)
    parser.add_argument(
        "models", nargs="*", default=["emoji", "digits"], help="bundled names, folders, ONNX files"
    )
    parser.add_argument(
        "-o",
        "--out",
        type=Path,
        default=Path("runs/bench-correction"),
        help="folder of run folders",
    )
    chosen = parser.parse_args()
    page = Page("PTQD's correction of the sampler")
    page.say(ABOUT)
    passed = True
    for model in chosen.models:
        rows = measure_model(model, chosen.set, chosen.out / Path(model).stem, page)
        worst = max(rows, key=lambda row: row.corrected.measured_nmse / row.plain.measured_nmse)
        ratio = worst.corrected.measured_nmse / worst.plain.measured_nmse
        passed &= ratio <= 1
        found = f"at most {ratio:.4f} times the error ({worst.name})"
        gains = [row.gain_db for row in rows if row.name.startswith("ours")]
        said = (
            f"PSNR of ours changes by {min(gains):+.2f} to {max(gains):+.2f} dB over the budgets."
        )
        page.say(
            f"{verdict(ratio <= 1, f'{model}: the output error never rises', found)}\n- {said}"
        )
    page.save(chosen.page)
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
