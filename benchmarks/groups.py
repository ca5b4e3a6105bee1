"""Whether MixDQ's content and quality groups (allocate.groups: mixdq) help: the measured error with and without them.

    python benchmarks/groups.py --page docs/results/groups.md       the tests' text-conditional UNet, of random weights
    python benchmarks/groups.py ./my-pipeline --budgets 0.3 0.4     any text-conditional pipeline

Each budget is allocated in groups; the best split stands beside the plan of all layers together, as large and refined
with the cross terms. Errors are of the output on calibration calls. Random weights say nothing about images.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from table import Page, bench_recipe, markdown, weights_digest

from mpq_deploy.run.pipeline import Pipeline, open_pipeline
from mpq_deploy.stages.allocate import PlanSolver
from mpq_deploy.system.progress import PlainTalk

COLUMNS = ("budget", "content, groups", "content, together", "error, groups", "error, together", "ratio", "splits")


def tiny_model(folder: Path) -> Path:
    """Return the pipeline that the tests use; made where it is not there."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from tests.tiny_models import tiny_text_pipeline_folder

    made = folder / "tiny_text"
    return made if (made / "model_index.json").is_file() else tiny_text_pipeline_folder(folder, sample_size=16)


def rows(pipeline: Pipeline, budgets: list[str]) -> list[list[str]]:
    """Allocate every budget in groups; return the table's cells."""
    solver, found = PlanSolver(pipeline), []
    for budget in budgets:
        groups = solver.solve(budget).groups
        assert groups is not None  # the recipe asks for them
        ours, joint = groups["chosen"], groups["without_groups"]
        shares = [f"{100 * one['content_share']:.1f} %" for one in (ours, joint)]
        errors = [one["measured_nmse"] for one in (ours, joint)]
        found.append([budget, *shares, *(f"{error:.2e}" for error in errors), f"{errors[0] / errors[1]:.3f}"])
        found[-1].append(str(len(groups["splits"])))
        pipeline.talk.line(" | ".join(found[-1]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", nargs="?", help="a text-conditional pipeline (default: the tests')")
    parser.add_argument("--budgets", nargs="+", default=["0.35", "0.4", "0.5"])
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a recipe entry, repeatable")
    parser.add_argument("-o", "--out", type=Path, default=Path("runs/bench-groups"), help="folder of the run")
    parser.add_argument("--page", type=Path, help="keep the result as a Markdown page")
    chosen = parser.parse_args()
    model = chosen.model or str(tiny_model(chosen.out))
    values = {"model": model, "target": "onnxruntime-cpu", "engine.build": False, "allocate.groups": "mixdq"}
    with open_pipeline(bench_recipe(None, chosen.set, values), chosen.out / "run", PlainTalk()) as pipeline:
        pipeline.run_until("measure")
        page = Page("MixDQ's content and quality groups")
        page.say(weights_digest(pipeline))
        page.say(markdown(COLUMNS, rows(pipeline, chosen.budgets)))
    page.save(chosen.page)


if __name__ == "__main__":
    main()
