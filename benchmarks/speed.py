"""What a build takes on two cores, against five goals: wall seconds, and processor seconds of all threads and children.

    python benchmarks/speed.py                 a UNet2DModel of 21 M random weights (needs torch)
    python benchmarks/speed.py digits emoji    bundled models

The recipe is the default one but for 32 calibration inputs (8 timesteps x 4 samples, two of the samples kept to measure
on); the engine is built where the RTX builder is installed. Goals for the 21 M UNet: the stage quantize below 10 s; all
stages together below 120 s, judged with the default 32 images and with 8, and below 60 s without ``evaluate``, which
samples them; calibrate at most 1.4 times the same number of forward passes of the float model, timed in the same run
right after it; another budget on the finished run, up to its quantized model and with the
start of Python, below 5 s; `import mpq_deploy.cli` below 0.3 s.

Each stage is timed once and kept in FOLDER/costs.json, so a call that was stopped goes on (--fresh measures again); one
that another call made is not timed. Where others use the cores, wall time says more of them than of us: every goal is
judged by wall seconds and by processor seconds over two cores. Work of one thread takes its processor seconds in wall
time, also where nothing else runs. The exit code is 1 when a goal is missed by both, or not measured. --curve adds
processor seconds over the model's size, from what scale.py --keep left.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from math import log
from pathlib import Path
from typing import Any

import numpy as np
from table import Page, bench_parser, bench_recipe, markdown, verdict

from mpq_deploy.calls.recorded import CallSet, RecordedCalls
from mpq_deploy.calls.timesteps import sampled_steps
from mpq_deploy.models.export import load_exported
from mpq_deploy.recipe import Recipe, load_recipe
from mpq_deploy.run.pipeline import STAGES, open_pipeline
from mpq_deploy.run.view import CALLS
from mpq_deploy.runtime.ort import OrtDenoiser
from mpq_deploy.system.progress import PlainTalk

UNET = "unet"
PREPARE = Path(__file__).parent / "peer_tools" / "prepare.py"
SETTINGS: dict[str, Any] = {
    "calibrate.timesteps": 8,
    "calibrate.samples": 4,
    "calibrate.batch_size": 4,
    "measure.samples": 2,
    "evaluate.controls_images": "needed",
}
# Not in every build: they are off in the default recipe.
OPTIONAL = ("recover", "correction")
ORDER = tuple(stage for stage in STAGES if stage not in OPTIONAL)
# Samples images with the float model, ours, and everything in INT8 and in INT4: forward passes and little else.
IMAGES = "evaluate"
FEW_IMAGES = 8
FEW = f"{IMAGES} with {FEW_IMAGES} images"
CORES = 2
QUANTIZE_SECONDS, BUILD_SECONDS, BUDGET_SECONDS, IMPORT_SECONDS = 10.0, 120.0, 5.0, 0.3
WITHOUT_IMAGES_SECONDS = 60.0
CALIBRATE_RATIO = 1.4
OTHER_BUDGET = "0.42"
IMPORTS = 5
IMPORT = "import time; s = time.perf_counter(), time.process_time(); import mpq_deploy.cli; "
IMPORT += "print(time.perf_counter() - s[0], time.process_time() - s[1])"


@dataclass(frozen=True)
class Cost:
    """What a piece of work took; ``load``: the machine's load average when it ended."""

    wall: float
    cpu: float
    load: float

    def until_now(self) -> Cost:
        """Return what was taken since; this one holds the clocks' readings then."""
        return Cost(
            time.perf_counter() - self.wall, processor_seconds() - self.cpu, os.getloadavg()[0]
        )


def processor_seconds() -> float:
    """Return the processor seconds of this process and of its children that ended."""
    return sum(os.times()[:4])


class Costs:
    """Costs by name, kept in a file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        self.found = {name: Cost(**values) for name, values in kept.items()}

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Time the block and keep it as ``name``."""
        started = Cost(time.perf_counter(), processor_seconds(), 0.0)
        yield
        self.keep(name, started.until_now())

    def keep(self, name: str, cost: Cost) -> None:
        """Keep and say a cost."""
        self.found[name] = cost
        self._path.write_text(
            json.dumps({n: asdict(c) for n, c in self.found.items()}, indent=1) + "\n",
            encoding="utf-8",
        )
        print(f"{name}: {cost.wall:.1f} s, {cost.cpu:.1f} CPU s", file=sys.stderr, flush=True)


def measure(model: str, work: Path, recipe: Recipe, last: str) -> Costs:
    """Make the stages up to ``last``, and what hangs on them, as far as ``work`` does not hold their costs."""
    work.mkdir(parents=True, exist_ok=True)
    costs, run = Costs(work / "costs.json"), work / "run"
    if "import" not in costs.found:
        costs.keep("import", import_cost())
    with open_pipeline(recipe, run, PlainTalk()) as pipeline:
        for stage in ORDER[: ORDER.index(last) + 1]:
            started = Cost(time.perf_counter(), processor_seconds(), 0.0)
            made = pipeline.ensure(stage)
            # What was made again after another budget is timed already; what another call made is not timed.
            if stage not in costs.found and not made.cached:
                costs.keep(stage, started.until_now())
            if stage == "calibrate" and stage in costs.found and "bare" not in costs.found:
                with costs.timed("bare"):
                    bare_passes(run, recipe)
    if FEW not in costs.found and IMAGES in costs.found:
        few_images(run, recipe, costs)
    if "budget" not in costs.found and {"allocate", "quantize"} <= costs.found.keys():
        with costs.timed("budget"):
            subprocess.run([sys.executable, __file__, "--child", str(run), model], check=True)
    return costs


def few_images(run: Path, recipe: Recipe, costs: Costs) -> None:
    """Time ``evaluate`` with fewer images, none of them cached."""
    shutil.rmtree(run / ".samples", ignore_errors=True)
    section = recipe.evaluate.model_copy(update={"samples": FEW_IMAGES})
    fewer = recipe.model_copy(update={"evaluate": section})
    with open_pipeline(fewer, run, PlainTalk()) as pipeline, costs.timed(FEW):
        pipeline.ensure(IMAGES)


def other_budget(run: Path) -> None:
    """Make the plan and the quantized model of another budget."""
    recipe = load_recipe(run / "recipe.yaml", {"budget": OTHER_BUDGET})
    with open_pipeline(recipe, run, PlainTalk()) as pipeline:
        pipeline.run_until("quantize")


def bare_passes(run: Path, recipe: Recipe) -> None:
    """Run the float model as often as calibrate does: along the trajectories, then on the calls that are observed."""
    exported = load_exported(run / "export")
    recorded = CallSet.load(run / "calibrate" / CALLS)
    denoiser = OrtDenoiser(exported.model, exported.spec)
    every = list(RecordedCalls(recorded, exported.spec).batches(recipe.calibrate.batch_size))
    calls = recorded.count
    observed = len(recorded.timesteps) * min(calls, recipe.calibrate.observed)
    # Trajectories end at the last step that is kept.
    steps = int(sampled_steps(recipe.calibrate.steps, recipe.calibrate.timesteps)[-1]) + 1
    left = steps * calls + observed
    while left > 0:
        for batch in every[: -(-left * len(every) // (calls * len(recorded.timesteps)))]:
            denoiser.session.run(None, batch.feed)
            left -= len(batch.calls)


def import_cost() -> Cost:
    """Return the least wall and processor seconds of importing the command line, of several fresh processes."""
    command = [sys.executable, "-c", IMPORT]
    texts = [
        subprocess.run(command, check=True, capture_output=True, encoding="utf-8").stdout
        for _ in range(IMPORTS)
    ]
    found = np.array([[float(number) for number in text.split()] for text in texts])
    return Cost(float(found[:, 0].min()), float(found[:, 1].min()), os.getloadavg()[0])


def cost_table(costs: dict[str, Cost]) -> str:
    """Return one row per stage, their sum, and what was measured beside them."""
    names = {
        "bare": "forward passes of calibrate",
        "budget": f"budget {OTHER_BUDGET}",
        "import": "import of the CLI",
    }
    rows = [row(stage, costs[stage]) for stage in ORDER if stage in costs]
    rows.append(row("stages together", total(costs)))
    rows += [
        row(title, costs[name]) for name, title in {FEW: FEW, **names}.items() if name in costs
    ]
    return markdown(("", "wall s", "CPU s", "CPU s / 2", "load"), rows)


def row(name: str, cost: Cost) -> list[str]:
    return [
        name,
        f"{cost.wall:.2f}",
        f"{cost.cpu:.2f}",
        f"{cost.cpu / CORES:.2f}",
        f"{cost.load:.1f}",
    ]


def total(costs: dict[str, Cost], without: str = "") -> Cost:
    made = [costs[stage] for stage in ORDER if stage in costs and stage != without]
    return Cost(sum(c.wall for c in made), sum(c.cpu for c in made), max(c.load for c in made))


def goals(model: str, costs: dict[str, Cost]) -> list[tuple[bool, str]]:
    """Judge what was measured; what was not is said."""
    missing = [stage for stage in ORDER if stage not in costs]
    few = None if missing or FEW not in costs else total({**costs, IMAGES: costs[FEW]})
    limits = (
        ("quantize with a given plan", costs.get("quantize"), QUANTIZE_SECONDS),
        ("the whole build", None if missing else total(costs), BUILD_SECONDS),
        (f"the whole build with {FEW_IMAGES} images", few, BUILD_SECONDS),
        (
            "the whole build but for its images",
            None if missing else total(costs, without=IMAGES),
            WITHOUT_IMAGES_SECONDS,
        ),
        ("another budget, to its quantized model", costs.get("budget"), BUDGET_SECONDS),
        ("import of the CLI", costs.get("import"), IMPORT_SECONDS),
    )
    found = [judged(model, what, cost, limit) for what, cost, limit in limits if cost is not None]
    if {"calibrate", "bare"} <= costs.keys():
        ratios = [
            costs["calibrate"].wall / costs["bare"].wall,
            costs["calibrate"].cpu / costs["bare"].cpu,
        ]
        what = f"{model}: calibrate takes at most {CALIBRATE_RATIO} times its forward passes"
        passed = min(ratios) <= CALIBRATE_RATIO
        found.append(
            (
                passed,
                verdict(passed, what, f"{ratios[0]:.2f} by wall, {ratios[1]:.2f} by CPU seconds"),
            )
        )
    if missing:
        found.append(
            (
                False,
                f"- {model}: not judged as a whole: {', '.join(missing)} not measured in this run",
            )
        )
    return found


def judged(model: str, what: str, cost: Cost, limit: float) -> tuple[bool, str]:
    by = {"wall": cost.wall, "CPU / 2": cost.cpu / CORES}
    words = ", ".join(
        f"{'PASS' if value < limit else 'FAIL'} by {name} {value:.2f} s"
        for name, value in by.items()
    )
    passed = min(by.values()) < limit
    return passed, verdict(passed, f"{model}: {what} below {limit:g} s", words)


def curve(files: list[Path]) -> str:
    """Tabulate the CPU seconds of each stage over sizes from what ``scale.py --keep`` left, smallest size first.

    The exponent is that of the line through the first and last size on logarithmic axes: 1 is linear.
    """
    sizes, found = [], []
    for path in files:
        sizes.append(parameters(path.parent / "run"))
        found.append(
            {
                one["stage"]: one["cpu_seconds"]
                for one in json.loads(path.read_text(encoding="utf-8"))
            }
        )
    order = np.argsort(sizes)
    rows = []
    for stage in (s for s in STAGES if all(s in costs for costs in found)):
        seconds = [found[i][stage] for i in order]
        slope = log(seconds[-1] / seconds[0]) / log(sizes[order[-1]] / sizes[order[0]])
        rows.append([stage, *(f"{s:.1f}" for s in seconds), f"{slope:.2f}"])
    return markdown(("CPU s", *(f"{sizes[i] / 1e6:.1f} M" for i in order), "exponent"), rows)


def parameters(run: Path) -> int:
    """Return the weights of all layers."""
    from mpq_deploy.graph.layers import layer_graph
    from mpq_deploy.graph.load import load_model

    return sum(
        layer.weights for layer in layer_graph(load_model(run / "export" / "model.onnx")).layers
    )


def source_of(model: str, out: Path) -> str:
    """Return what the recipe's ``model`` is; makes the UNet of random weights."""
    if model != UNET:
        return model
    folder = out / "unet-source"
    if not (folder / "model_index.json").is_file():
        subprocess.run([sys.executable, str(PREPARE), "unet", str(folder)], check=True)
    return str(folder)


def main() -> None:
    parser = bench_parser(__doc__)
    parser.add_argument(
        "models", nargs="*", default=[UNET], help="what mpq-deploy build takes (default: unet)"
    )
    parser.add_argument("--until", default=ORDER[-1], choices=ORDER, help="the last stage")
    parser.add_argument("--fresh", action="store_true", help="measure again what is kept")
    parser.add_argument(
        "--curve",
        nargs="+",
        type=Path,
        default=[],
        metavar="COSTS",
        help="costs.json of scale.py --keep",
    )
    parser.add_argument(
        "-o", "--out", type=Path, default=Path("runs") / "bench-speed", help="folder of the runs"
    )
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.child:
        other_budget(chosen.child)
        return
    page, checks = Page("Speed"), []
    builder = importlib.util.find_spec("tensorrt_rtx") is not None
    for model in chosen.models:
        work = chosen.out / Path(model).stem
        if chosen.fresh:
            shutil.rmtree(work, ignore_errors=True)
        values = {**SETTINGS, "model": source_of(model, chosen.out), "engine.build": builder}
        recipe = bench_recipe(None, chosen.set, values)
        costs = measure(model, work, recipe, chosen.until).found
        page.say(f"## {model}\n\n{cost_table(costs)}")
        said = ", ".join(
            [*(f"{k} {v}" for k, v in SETTINGS.items()), f"engine.build {str(builder).lower()}"]
        )
        page.say(f"The default recipe, with {', '.join([said, *chosen.set])}.")
        checks += goals(model, costs)
    if chosen.curve:
        page.say(f"## Over the model's size\n\n{curve(chosen.curve)}")
    page.conclude(checks, chosen.page)


if __name__ == "__main__":
    main()
