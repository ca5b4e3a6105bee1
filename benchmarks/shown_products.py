"""Which products of one input TensorRT-RTX makes one kernel of, and what the estimate of a call learns from that.

    python benchmarks/shown_products.py [--models unet2dcondition,dit,sd3] [--page docs/results/shown-products.md]

Each model is a diffusers folder with random weights, two levels or blocks of width 128. Every product is in one
scheme, and convolutions are in FP16: not all formats have them. The engine is built without a GPU, and its builder's
own log says which layers of the plan stand in which kernel. "Together" counts queries, keys and values of one input
(three of an attention, two of a cross-attention) by the kernels that hold them: 3 is all three in one, 2+1 two in one
and one apart, 2 of 8 a kernel that holds six more, of other attentions. "Others" are further products of one input
that are one kernel, such as the projections of the timestep. The times are the roofline's, before the engine (by the
assumption of the formats) and after it (by its log): of one call, estimated. Nothing was run on a GPU.
"""

from __future__ import annotations

import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from table import Page, bench_parser, bench_recipe, markdown, verdict
from transformer_engines import SMALL, write_model

from mpq_deploy.allocate.plan_solver import PlanSolver
from mpq_deploy.engine.record import EngineRecord
from mpq_deploy.graph.attention import projections
from mpq_deploy.graph.layers import Layer
from mpq_deploy.run.pipeline import open_pipeline
from mpq_deploy.run.view import Run
from mpq_deploy.system.progress import PlainTalk

MODELS = ("unet2dcondition", "dit", "sd3")
SCHEMES = {
    "rtx-ada": ("fp16", "w8a8", "w4a16", "w4a8", "f8a8", "w4f8"),
    "rtx-blackwell": ("fp16", "w8a8", "w4a8", "f8a8", "nvfp4"),
}
USUAL = {"engine.batch_max": 4, "quantize.rounding": "nearest", "budget": 1.0}
USUAL |= {"allocate.branches": [], "allocate.ranges": []}
HEADER = ("model", "target", "scheme", "together", "others", "ms, assumed", "ms, by the log")


def together(run: Run, record: EngineRecord) -> tuple[str, int]:
    """Return how groups are split into kernels ("4 x 3, 4 x 2 of 8"), and how many other layers share one."""
    kernel_of = {name: one for one in record.products for name in one.layers}
    splits: Counter[str] = Counter()
    grouped = set()
    for group in projections(run.exported.graph):
        names = [layer.name for layer in group if layer.name in kernel_of]
        grouped |= {layer.name for layer in group}
        parts = Counter(kernel_of[name] for name in names).most_common()
        shown = (f"{n} of {len(k.layers)}" if len(k.layers) > n else str(n) for k, n in parts)
        splits["+".join(shown) or "not shown"] += 1
    others = sum(
        len(one.layers)
        for one in record.products
        if len(one.layers) > 1 and not grouped & {*one.layers}
    )
    return ", ".join(f"{count} x {split}" for split, count in sorted(splits.items())), others


def every_product(scheme: str, layers: Sequence[Layer]) -> dict[str, Any]:
    """All products in one scheme."""
    rules = [
        {"layers": layer.name, "schemes": ["fp16" if layer.op == "Conv" else scheme]}
        for layer in layers
    ]
    schemes = ["fp16", *({scheme} - {"fp16"})]
    return {"allocate.schemes": schemes, "allocate.protect": rules}


def rows_of(model: str, target: str, folder: Path, given: dict[str, str]) -> list[list[str]]:
    """Build every scheme of ``target``; ``folder`` is the run's, for all targets."""
    rows = []
    values = {**SMALL, **USUAL, **given, "target": target}
    with open_pipeline(bench_recipe(None, [], values), folder, PlainTalk()) as pipeline:
        pipeline.run_until("export")
        layers = pipeline.run.exported.graph.layers
    for scheme in SCHEMES[target]:
        recipe = bench_recipe(None, [], {**values, **every_product(scheme, layers)})
        # The plan is made without what an earlier engine here shows.
        shutil.rmtree(folder / "engine", ignore_errors=True)
        with open_pipeline(recipe, folder, PlainTalk()) as pipeline:
            pipeline.run_until("engine")
            view = pipeline.run
            record = EngineRecord.load(folder / "engine" / "build.json")
            after = PlanSolver(view).timed_again(view.plan).latency
            split, others = together(view, record)
        before = view.plan.latency
        assert before is not None and after is not None
        times = [f"{before.ours_ms:.4f}", f"{after.ours_ms:.4f}"]
        rows.append([model, target, scheme, split, str(others), *times])
    return rows


def main() -> None:
    parser = bench_parser(__doc__, recipe=False)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("-o", "--out", type=Path, default=Path("runs/bench-shown-products"))
    chosen = parser.parse_args()
    page = Page("Products of one input in one kernel")
    page.say((__doc__ or "").split("\n\n")[2].replace("\n", " "))
    rows = []
    for model in chosen.models.split(","):
        given = write_model(model, chosen.out / model / "model", 0)
        for target in SCHEMES:
            rows += rows_of(model, target, chosen.out / model / "run", given)
    page.say(markdown(HEADER, rows))
    apart = {row[1] for row in rows if row[2] == "f8a8" and "+" in row[3]}
    one = {row[1] for row in rows if row[2] == "f8a8" and "+" not in row[3]}
    passed = apart == {"rtx-blackwell"} and one == {"rtx-ada"}
    page.say(verdict(passed, "FP8 products of one input are one kernel for Ada alone", "as above"))
    page.save(chosen.page)
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
