"""The memory estimate of every stage beside the measured peak.

    python benchmarks/memory.py [MODEL ...] [--set KEY=VALUE]

MODEL is a bundled model (digits, emoji), dit (a diffusion transformer of 32 M random weights, attention over 256
tokens), or a size of scale.py (2M to 2570M); by default digits and dit, which no constant of the estimate was fitted
to. Each stage runs in a process of its own, watched as scale.py does. Stages whose cost is kept in the folder are not
run again, so this also judges what 'scale.py --keep' left; with --kept nothing is run at all. The exit code is 1 when
an estimate is off by more than a quarter of the peak.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from scale import SETTINGS, STAGES, StageCost, in_child
from scale_models import SIZES
from table import Page, bench_parser, bench_recipe, markdown, verdict

from mpq_deploy.recipe import Recipe, load_recipe
from mpq_deploy.run.folder import RunFolder
from mpq_deploy.run.memory_model import StageMemory
from mpq_deploy.run.stage_memory import stage_memory
from mpq_deploy.run.view import Run
from mpq_deploy.system.progress import Talk

DEMOS = ("digits", "emoji")
# DiT-S/2 (arXiv 2212.09748, table 1).
DIT = {"num_layers": 12, "num_attention_heads": 6, "attention_head_dim": 64, "sample_size": 32}
SHARE = 0.25
LATENT = 32
COSTS, RECIPE = "costs.json", "recipe.yaml"


def prepare(name: str, work: Path, changes: Sequence[str]) -> Recipe:
    """Make the model and the recipe in ``work``, unless they are there."""
    if (work / RECIPE).is_file():
        return load_recipe(work / RECIPE)
    work.mkdir(parents=True, exist_ok=True)
    given = {"model": name}
    if name == "dit":
        from transformer_engines import write_model

        given = write_model("dit", work / "model", 0, DIT)
    elif name not in DEMOS:
        in_child(["--child", "model", "--out", str(work), "--latent", str(LATENT), name])
        given = {"model": str(work / "model"), "conditions": str(work / "model" / "conditions.npz")}
    recipe = bench_recipe(None, list(changes), {**SETTINGS, **given})
    (work / RECIPE).write_text(recipe.to_yaml(), encoding="utf-8")
    return recipe


def beside(work: Path, recipe: Recipe, run: bool) -> list[tuple[StageMemory, StageCost]]:
    """Return the estimate and the cost of every stage; those without a kept cost are run, or left out."""
    kept = work / COSTS
    costs = (
        {cost["stage"]: StageCost(**cost) for cost in json.loads(kept.read_text(encoding="utf-8"))}
        if kept.is_file()
        else {}
    )
    view = Run(recipe, RunFolder(work / "run"), Talk())
    found = []
    for stage in STAGES:
        if stage not in costs and not run:
            continue
        estimate = stage_memory(view, stage)
        if stage not in costs:
            costs[stage] = in_child(["--child", stage, "--out", str(work)])
            kept.write_text(
                json.dumps([asdict(cost) for cost in costs.values()], indent=1) + "\n",
                encoding="utf-8",
            )
        found.append((estimate, costs[stage]))
    return found


def table(found: Sequence[tuple[StageMemory, StageCost]]) -> str:
    """Return a row per stage: what is estimated, by kind, and what was seen."""
    rows = []
    for estimate, cost in found:
        parts = (
            estimate.weights,
            estimate.values,
            estimate.work,
            estimate.code,
            estimate.total,
            cost.peak_bytes,
        )
        rows.append(
            [
                estimate.stage,
                *(f"{part / 1e6:,.0f}" for part in parts),
                f"{ratio(estimate, cost):.2f}",
            ]
        )
    names = (
        "stage",
        "weights MB",
        "values MB",
        "work MB",
        "code MB",
        "estimate MB",
        "peak MB",
        "estimate / peak",
    )
    return markdown(names, rows)


def ratio(estimate: StageMemory, cost: StageCost) -> float:
    """Return the estimate over the peak."""
    return estimate.total / cost.peak_bytes


def main() -> None:
    parser = bench_parser(__doc__)
    choices = [*DEMOS, "dit", *SIZES]
    parser.add_argument(
        "models", nargs="*", choices=[[], *choices], metavar="MODEL", help=", ".join(choices)
    )
    parser.add_argument(
        "-o", "--out", type=Path, default=Path("runs") / "bench-scale", help="folder of the runs"
    )
    parser.add_argument(
        "--kept", action="store_true", help="run nothing: judge the costs that are kept"
    )
    chosen = parser.parse_args()
    page, checks = Page("Memory estimates beside measured peaks"), []
    for name in chosen.models or ("digits", "dit"):
        work = chosen.out / f"{name}-{LATENT}"
        recipe = prepare(name, work, chosen.set)
        found = beside(work, recipe, not chosen.kept)
        page.say(f"## {name}, rounding {recipe.quantize.rounding}")
        page.say(table(found))
        worst = max((ratio(*pair) for pair in found), key=lambda value: abs(value - 1), default=1.0)
        passed = abs(worst - 1) <= SHARE
        what = f"{name}: each of {len(found)} estimates lies within {SHARE:.0%} of the peak"
        checks.append((passed, verdict(passed, what, f"the worst is {worst:.2f} of it")))
    page.conclude(checks, chosen.page)


if __name__ == "__main__":
    main()
