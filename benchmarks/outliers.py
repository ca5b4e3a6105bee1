"""What outlier branches are worth: uniform plans with and without them, on a model and on its rescaled twin.

    python benchmarks/outliers.py [MODEL]

MODEL is what `mpq-deploy build` takes; by default the small digits model. The twin is synthetic: before every layer a
few input channels are multiplied by a large factor and the layer's weights for them divided by it, so that the float
function stays the same (its largest relative difference is printed) while INT8 activations get outliers and INT4 weight
blocks get columns of very different size. Every plan gives all layers one scheme where they may take it, the next best
of its list otherwise. NMSE and PSNR are against the float model from the same noise. A third table has the layers of
the model itself whose activations have the strongest outliers, and the loss that the probes predict for INT8 there with
and without a branch. The checks are relations between results of this very run, and the exit code is 1 when one fails.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import yaml
from table import Page, bench_parser, bench_recipe, decibels, markdown, verdict

from mpq_deploy.evaluate.evaluate import Variant, evaluate
from mpq_deploy.evaluate.evaluation_result import VariantResult
from mpq_deploy.graph.writers.deployed_graphs import SIMULATED
from mpq_deploy.graph.writers.plan_graphs import write_plan
from mpq_deploy.rounding.candidate_store import candidates_of
from mpq_deploy.run.pipeline import open_pipeline
from mpq_deploy.run.view import Exported, Run
from mpq_deploy.sensitivity.table import SensitivityTable
from mpq_deploy.system.progress import PlainTalk

# One input channel in SHARE is multiplied by FACTOR.
SHARE, FACTOR = 48, 32.0
# Branches must bring per-tensor W8A8 on the twin within so many dB of W8A8 on the model itself.
WITHIN_DB = 2.0
PLANS: dict[str, tuple[str, ...]] = {
    "W8A8, one scale per tensor": ("w8a8", "w8a16"),
    "W8A8 + cols1": ("w8a8+cols1", "w8a8", "w8a16"),
    "W8A8 + cols2": ("w8a8+cols2", "w8a8", "w8a16"),
    "W8A8 + scale5": ("w8a8+scale5", "w8a8", "w8a16"),
    "W4A16": ("w4a16-b128", "w4a16-b64", "w4a16-b32"),
    "W4A16 + rows1": ("+rows1", "w4a16-b128", "w4a16-b64", "w4a16-b32"),
    "W4A16 + rows3": ("+rows3", "w4a16-b128", "w4a16-b64", "w4a16-b32"),
    "W4A16 + lowrank8": ("+lowrank8", "w4a16-b128", "w4a16-b64", "w4a16-b32"),
}
# The layers of the third table, and what stands there relative to w8a8.
OUTLIER_LAYERS = 10
IN_PLACE_OF = ("w8a8+cols1", "w8a8+cols2", "w8a8+scale5", "w8a16")


def rescaled(run: Run, folder: Path) -> float:
    """Write the twin of the exported model as an ONNX model; return how far its output is from the model's."""
    exported = run.exported
    model = onnx.load(exported.path)
    weights = {t.name: t for t in model.graph.initializer}
    uses = {
        use.node: layer
        for layer in exported.graph.layers
        for use in layer.uses
        if len(layer.uses) == 1
    }
    factors: dict[str, np.ndarray] = {}
    nodes = []
    for node in model.graph.node:
        layer = uses.get(node.name)
        if (
            layer is not None
            and layer.group == 1
            and layer.weight_shape[1 - layer.out_axis] >= SHARE // 2
        ):
            channels = layer.weight_shape[1 - layer.out_axis]
            x = node.input[0]
            axes = len(layer.kernel)
            key = f"{x}/stretched"
            if key not in factors:
                rng = np.random.default_rng(len(factors))
                factors[key] = np.ones(channels, np.float32)
                factors[key][rng.choice(channels, max(1, channels // SHARE), replace=False)] = (
                    FACTOR
                )
                shaped = factors[key].reshape(-1, *(1,) * axes)
                model.graph.initializer.append(
                    onnx.numpy_helper.from_array(shaped, f"{key}.factor")
                )
                nodes.append(onnx.helper.make_node("Mul", [x, f"{key}.factor"], [key], name=key))
            shape = [1] * len(layer.weight_shape)
            shape[1 - layer.out_axis] = channels
            array = onnx.numpy_helper.to_array(weights[layer.weight]) / factors[key].reshape(shape)
            weights[layer.weight].CopyFrom(onnx.numpy_helper.from_array(array, layer.weight))
            node.input[0] = key
        nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, folder / "twin.onnx")
    describe(exported, folder)
    return difference(exported, folder / "twin.onnx")


def describe(exported: Exported, folder: Path) -> None:
    """Write the twin's YAML and conditions."""
    spec = exported.spec
    described: dict[str, Any] = {
        "sample": {"name": spec.sample.name, "shape": list(spec.sample.shape)},
        "timestep": spec.timestep.name,
        "conditions": [condition.name for condition in spec.conditions],
        "output": spec.output,
        "prediction_type": spec.prediction_type,
        "scheduler": spec.scheduler,
        "labels": list(spec.labels),
    }
    if spec.pixel_range:
        described["pixel_range"] = list(spec.pixel_range)
    (folder / "twin.yaml").write_text(
        yaml.safe_dump(json.loads(json.dumps(described))), encoding="utf-8"
    )
    np.savez(folder / "conditions.npz", **exported.conditions)  # type: ignore[arg-type]


def difference(exported: Exported, twin: Path) -> float:
    """Return the largest difference between the outputs of the model and its twin, relative to the largest output."""
    outputs = []
    spec = exported.spec
    feeds: dict[str, Any] = {
        spec.sample.name: np.random.default_rng(0)
        .standard_normal((2, *spec.sample.shape))
        .astype(np.float32),
        spec.timestep.name: np.full(2, 500, np.float32)
        if spec.timestep.batched
        else np.array(500, np.float32),
        **{name: rows[:2] for name, rows in exported.conditions.items()},
    }
    for path in (exported.path, twin):
        session = ort.InferenceSession(str(path))
        types = {entry.name: entry.type for entry in session.get_inputs()}
        cast = {
            n: v.astype(np.int64) if "int64" in types[n] else v
            for n, v in feeds.items()
            if n in types
        }
        outputs.append(session.run([spec.output], cast)[0])
    return float(np.abs(outputs[0] - outputs[1]).max() / np.abs(outputs[0]).max())


def measured(run: Run, samples: int) -> dict[str, tuple[VariantResult, float]]:
    """Return the result of every plan and its size as a share of FP16."""
    exported = run.exported
    candidates = candidates_of(run, exported.graph)
    section = run.recipe.evaluate
    with tempfile.TemporaryDirectory() as name:
        variants, sizes = {}, {}
        for title, preferred in PLANS.items():
            plan = {
                layer: next(
                    (
                        s.name
                        for p in preferred
                        for s in c.schemes
                        if s.name == p or (p[0] == "+" and ends(s.name, p))
                    ),
                    "fp16",
                )
                for layer, c in candidates.items()
            }
            folder = Path(name) / str(len(variants))
            folder.mkdir()
            sizes[title] = write_plan(run, plan, folder)
            variants[title] = Variant(folder / SIMULATED, sizes[title])
        settings = section.replace(samples=samples, calls=samples)
        found = evaluate(variants, exported.model, settings, run.talk)
    whole = exported.facts["fp16_size_bytes"]
    return {title: (found.variants[title], sizes[title] / whole) for title in PLANS}


def strongest(run: Run) -> str:
    """Return a table of the layers whose inputs have the strongest outliers, and their predicted losses."""
    losses = SensitivityTable.load(run.stage("measure")).losses
    stats = run.calibration.stats
    stretch = {}
    for layer in run.exported.graph.layers:
        amax = np.max([stats.activations[tensor].amax for tensor in layer.inputs], axis=0)
        if len(amax) >= SHARE // 2 and "w8a8+cols1" in losses[layer.name]:
            stretch[layer.name] = float(amax.max() / np.median(amax))
    rows = []
    for name in sorted(stretch, key=lambda layer: -stretch[layer])[:OUTLIER_LAYERS]:
        bare = losses[name]["w8a8"]
        rows.append(
            [name, f"{stretch[name]:.1f}", f"{bare:.1e}"]
            + [f"{losses[name][s] / bare:.2f}" if s in losses[name] else "-" for s in IN_PLACE_OF]
        )
    return markdown(
        ("layer", "largest / median range of its channels", "loss under w8a8", *IN_PLACE_OF), rows
    )


def ends(scheme: str, suffix: str) -> bool:
    """Whether ``scheme`` is a weights-only body with that branch."""
    return scheme.startswith("w4a16") and scheme.endswith(suffix)


def table(found: dict[str, tuple[VariantResult, float]]) -> str:
    """Return one row per plan."""
    rows = [
        [title, f"{share:.4f}", f"{result.measured_nmse:.2e}", decibels(result.psnr_db)]
        for title, (result, share) in found.items()
    ]
    return markdown(("every layer", "of FP16", "measured NMSE", "PSNR dB"), rows)


def main() -> int:
    """Measure, print the page, and return the exit code."""
    parser = bench_parser(__doc__)
    parser.add_argument("model", nargs="?", default="digits")
    parser.add_argument("-o", "--run", type=Path, default=Path("runs/bench-outliers"))
    parser.add_argument("--samples", type=int, default=32)
    options = parser.parse_args()
    branches = {"allocate.branches": ["rows", "cols", "lowrank", "scale"], "engine.build": False}
    branches["measure.method"] = "probe"
    page = Page(f"Outlier branches: {options.model} and its rescaled twin")
    talk = PlainTalk()
    with open_pipeline(
        bench_recipe(None, options.set, {"model": options.model, **branches}),
        options.run / "model",
        talk,
    ) as pipeline:
        plain = measured(pipeline.current("candidates"), options.samples)
        real = strongest(pipeline.current("measure"))
        folder = options.run / "twin-model"
        folder.mkdir(exist_ok=True)
        apart = rescaled(pipeline.run, folder)
    values = {
        "model": str(folder / "twin.onnx"),
        "conditions": str(folder / "conditions.npz"),
        **branches,
    }
    with open_pipeline(
        bench_recipe(None, options.set, values), options.run / "twin", talk
    ) as pipeline:
        twin = measured(pipeline.current("candidates"), options.samples)
    page.say("## The model itself\n\n" + table(plain))
    page.say(
        f"## Its rescaled twin (synthetic)\n\nOne input channel in {SHARE} of every wide enough layer is {FACTOR:g} "
        "times larger, its weights as much smaller. Largest difference of the float outputs: "
        f"{apart:.1e} of the largest.\n\n" + table(twin)
    )
    page.say(
        f"## Real outliers\n\nThe {OUTLIER_LAYERS} layers of the model itself whose inputs have the strongest outliers:"
        " their predicted loss under INT8 activations, and that of other schemes relative to it (w8a16: what the"
        " weights alone cost).\n\n" + real
    )
    first = next(iter(PLANS))
    itself, bare = plain[first][0].psnr_db, twin[first][0].psnr_db
    passed = []
    for kind in ("cols", "scale"):
        best = max(twin[title][0].psnr_db for title in PLANS if kind in title)
        passed.append(itself - best <= WITHIN_DB)
        page.say(
            verdict(
                passed[-1],
                f"{kind} brings W8A8 on the twin within {WITHIN_DB:g} dB of W8A8 on the model",
                f"{best:.1f} dB against {itself:.1f} dB (without branches {bare:.1f} dB)",
            )
        )
    page.save(options.page)
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
