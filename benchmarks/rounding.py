"""What rounding is worth: every layer in 4-bit weights with blocks of 32, rounded in three ways.

    python benchmarks/rounding.py [MODEL ...]

The error is that of the denoiser's output on fresh trajectories, squared and relative to the float model's, mean over
the sampler's timesteps, with its standard error between images. All three see the same calibration and the same images.
Exit code 1 unless GPTQ is better than rounding to nearest, and refinement better than GPTQ alone.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from predict import Truth, relative_error
from table import Page, bench_parser, bench_recipe, markdown, verdict, weights_digest

from mpq_deploy.rounding.control_schemes import control_scheme
from mpq_deploy.run.pipeline import open_pipeline
from mpq_deploy.system.progress import PlainTalk

WAYS = {
    "nearest": {"quantize.rounding": "nearest"},
    "GPTQ": {"quantize.rounding": "gptq", "quantize.refinements": 0},
    "GPTQ, refined (the default)": {"quantize.rounding": "gptq"},
}
BODY = ("w4a16-b32",)


def measure_model(model: str, chosen: argparse.Namespace, page: Page) -> bool:
    """Round and measure one model in every way; say its table; return whether the order is as it should be."""
    rows, errors = [], []
    for name, values in WAYS.items():
        # One run folder: what comes before rounding is made once.
        recipe = bench_recipe(None, [], {"model": model, "engine.build": False, **values})
        with open_pipeline(
            recipe, chosen.out / f"bench-rounding-{Path(model).stem}", PlainTalk()
        ) as pipeline:
            pipeline.run_until("candidates")
            if not rows:
                page.say(f"## {Path(model).stem}\n\n{weights_digest(pipeline.run)}")
            truth = Truth(pipeline.run, chosen.images, chosen.seed)
            target = pipeline.run.target
            schemes = {
                layer.name: control_scheme(layer, BODY, target).name
                for layer in truth.exported.graph.layers
            }
            found = truth.errors(schemes)
            errors.append(float(found.mean()))
            seconds = pipeline.results["candidates"].seconds
        rows.append(
            [name, f"{errors[-1]:.2e} ± {relative_error(found, errors[-1]):.0%}", f"{seconds:.0f}"]
        )
    page.say(markdown(("rounding", "error", "candidates, s"), rows))
    ordered = errors[0] > errors[1] > errors[2]
    page.say(
        verdict(
            ordered,
            f"{model}: GPTQ is better than nearest, refined better than GPTQ",
            "as in the table",
        )
    )
    return ordered


def main() -> None:
    parser = bench_parser(__doc__, recipe=False)
    parser.add_argument(
        "models", nargs="*", default=["digits"], help="what `mpq-deploy build` takes"
    )
    parser.add_argument(
        "--images", type=int, default=128, help="fresh trajectories behind every error"
    )
    parser.add_argument("--seed", type=int, default=20260)
    parser.add_argument(
        "-o", "--out", type=Path, default=Path("runs"), help="where the run folders are"
    )
    chosen = parser.parse_args()
    page = Page("Rounding")
    passed = [measure_model(model, chosen, page) for model in chosen.models]
    page.save(chosen.page)
    sys.exit(0 if all(passed) else 1)


if __name__ == "__main__":
    main()
