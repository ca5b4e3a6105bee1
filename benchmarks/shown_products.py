"""Which products of one input TensorRT-RTX makes one kernel of, and what the estimate of a call learns from that.

    python benchmarks/shown_products.py [--models unet2dcondition,dit,sd3] [--page docs/results/shown-products.md]

Each model is a diffusers network with random weights, two levels or blocks of width 128. Every product is in one
scheme, and convolutions are in FP16: not all formats have them. The engine is built without a GPU, and its builder's
own log says which layers of the plan stand in which kernel. "Together" counts the groups of queries, keys and values
of one input (three of an attention, two of a cross-attention) by the kernels that hold them: 3 is all three in one,
2+1 two in one and one apart, 2 of 8 a kernel that holds six more, of other attentions. "Others" are further products
of one input that are one kernel, such as the projections of the timestep. The times are the roofline's, before the
engine (by the assumption of the formats) and after it (by its log): of one call of two samples, estimated. Nothing
ran on a GPU.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from table import Page, bench_parser, markdown, verdict
from transformer_engines import write_model

from mpq_deploy.engine.builder import BatchProfile, BuildRequest, build_engine
from mpq_deploy.engine.product_kernels import ProductKernel
from mpq_deploy.engine.target import load_target
from mpq_deploy.formats.scheme import SCHEMES
from mpq_deploy.graph.attention import projections
from mpq_deploy.graph.layers import Layer, layer_graph
from mpq_deploy.graph.load import load_model
from mpq_deploy.graph.shapes import known_shapes
from mpq_deploy.latency.costs import LatencyCosts
from mpq_deploy.latency.joins import Joins, Shown
from mpq_deploy.models.additions import Additions
from mpq_deploy.models.export import ExportedModel, export_denoiser, load_exported
from mpq_deploy.models.open import open_denoiser
from mpq_deploy.system.progress import Talk
from tests.engine.float_plans import write_floats

MODELS = ("unet2dcondition", "dit", "sd3")
TARGETS = {
    "rtx-ada": ("fp16", "w8a8", "w4a16-b64", "w4a8-b64", "f8a8"),
    "rtx-blackwell": ("f8a8", "nvfp4"),
}
BATCH = 2
HEADER = ("model", "target", "scheme", "together", "others", "ms, assumed", "ms, by the log")


def export(model: str, folder: Path) -> ExportedModel:
    """Write a model with random weights, and export it."""
    given = write_model(model, folder / "model", 0)
    conditions = folder / "conditions.npz"
    if model == "dit":
        np.savez(conditions, class_labels=np.array([0, 1]))
    else:
        conditions = Path(given["conditions"])
    additions = Additions(conditions=conditions)
    export_denoiser(open_denoiser(Path(given["model"]), additions), folder / "export")
    return load_exported(folder / "export")


def together(
    groups: Sequence[Sequence[Layer]], products: Sequence[ProductKernel]
) -> tuple[str, int]:
    """Return how groups are split into kernels ("4 x 3, 4 x 2 of 8"), and how many other layers share one."""
    kernel_of = {name: one for one in products for name in one.layers}
    grouped = {layer.name for group in groups for layer in group}
    splits: Counter[str] = Counter()
    for group in groups:
        parts = Counter(kernel_of[n.name] for n in group if n.name in kernel_of).most_common()
        shown = (f"{n} of {len(k.layers)}" if len(k.layers) > n else str(n) for k, n in parts)
        splits["+".join(shown) or "not shown"] += 1
    others = [len(one.layers) for one in products if not grouped & {*one.layers}]
    said = ", ".join(f"{count} x {split}" for split, count in sorted(splits.items()))
    return said, sum(count for count in others if count > 1)


def row_of(exported: ExportedModel, target: str, scheme: str) -> list[str]:
    """Build one engine; return what its log shows, and both times."""
    graph, spec = layer_graph(load_model(exported.model)), exported.spec
    groups = projections(graph)
    with tempfile.TemporaryDirectory() as name:
        written = write_floats(
            exported.model,
            Path(name),
            lambda _, layer: "fp16" if layer.op == "Conv" else scheme,
            target,
            (spec.timestep_name, spec.sample.name),
        )
        shapes = {item.name: item.shape for item in spec.inputs if item.batched}
        profile = BatchProfile(1, BATCH, 4, shapes)
        request = BuildRequest(written.model, load_target(target).build_target, profile)
        record = build_engine(request, Path(name) / "engine", written.expected, Talk())
    plan = {layer.name: SCHEMES[layer.scheme] for layer in written.expected.layers}
    known = known_shapes(exported.model, spec.input_shapes(BATCH))[1]
    times = []
    for shown in (None, Shown(record.products, "it")):
        joins = Joins(graph, groups, shown)
        costs = LatencyCosts(graph, known, load_target(target), BATCH, None, joins)
        times.append(f"{costs.plan_ns(graph.layers, plan) / 1e6:.4f}")
    split, others = together(groups, record.products)
    return [target, scheme, split, str(others), *times]


def main() -> None:
    parser = bench_parser(__doc__, recipe=False)
    parser.add_argument("--models", default=",".join(MODELS))
    chosen = parser.parse_args()
    page = Page("Products of one input in one kernel")
    page.say((__doc__ or "").split("\n\n")[2].replace("\n", " "))
    rows = []
    for model in chosen.models.split(","):
        with tempfile.TemporaryDirectory() as name:
            exported = export(model, Path(name))
            for target, schemes in TARGETS.items():
                for scheme in schemes:
                    rows.append([model, *row_of(exported, target, scheme)])
                    print(rows[-1], file=sys.stderr, flush=True)
    page.say(markdown(HEADER, rows))
    split = {(row[1], "1+1" in row[3]) for row in rows if row[2] == "f8a8"}
    passed = split == {("rtx-ada", False), ("rtx-blackwell", True)}
    what = "products of one input in FP8 are one kernel for Ada, and apart for Blackwell"
    page.conclude([(passed, verdict(passed, what, "as above"))], chosen.page)


if __name__ == "__main__":
    main()
