"""What further forms of activation ranges would be worth: halves of skip connections, FP8 by timestep.

    python benchmarks/range_forms.py [MODEL]

MODEL is what `mpq-deploy build` takes; by default the bundled emoji model. Errors are those that rounding the inputs of
convolutions alone leaves in the output, to first order by the probes, as a share of the output: sums over layers. The
first table has the convolutions that read a Concat of two: one range for the whole input, or one for each half, as two
layers that add would have; at each exponent of the channels' factors. The second has all convolutions in FP8 (E4M3).
Neither form is built into the product: the page says why.
"""

from __future__ import annotations

from collections import defaultdict
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from table import Page, bench_parser, bench_recipe, markdown, verdict

from mpq_deploy.calibrate.stats import ActivationStats
from mpq_deploy.formats.branches.prescaled import TENTHS
from mpq_deploy.formats.fp8 import FloatGrid
from mpq_deploy.formats.interfaces import ActivationGrid
from mpq_deploy.formats.minifloat import E4M3
from mpq_deploy.formats.ranges import RANGES, ActivationRange, RangeTable
from mpq_deploy.graph.layers import LayerGraph
from mpq_deploy.onnx_torch.adjoint import layer_gradients
from mpq_deploy.onnx_torch.torch_graph import TorchGraph
from mpq_deploy.run.pipeline import open_pipeline
from mpq_deploy.run.view import Run
from mpq_deploy.sensitivity.layer_weights import InputRounding
from mpq_deploy.sensitivity.measured_calls import Calls
from mpq_deploy.sensitivity.subject import timestep_of
from mpq_deploy.sensitivity.torch_projection import lost_by_rounding
from mpq_deploy.stages.measure import measured_subject
from mpq_deploy.system.progress import PlainTalk

STEPS, PROBES, CALLS, SEED = 6, 4, 12, 2
# What a form must take off the error of all convolutions' inputs to be worth its kernels.
WORTH = 0.05
EXPONENTS = (None, *range(len(TENTHS)))
ALL = "all convolutions, one range"
WHOLE, HALVES = "those of a Concat, one range", "one per half"
Errors = dict[tuple[str, ...], float]


def split_inputs(graph: LayerGraph) -> dict[str, int]:
    """Return the Concats of two along the channels: output -> channels of the first half."""
    found = {}
    for node in graph.model.graph:
        if node.op_type != "Concat" or len(node.inputs) != 2:
            continue
        shape = node.inputs[0].shape if node.inputs[0] is not None else None
        if shape is not None and len(shape) == 4 and isinstance(shape[1], int):
            found[node.outputs[0].name or ""] = shape[1]
    return found


def rounding(
    stats: ActivationStats, part: slice, exponent: int | None, kind: ActivationRange, timestep: Any
) -> InputRounding:
    """Return the INT8 quantizer of some channels, its scale at their largest magnitude."""
    amax = stats.amax_by_timestep[:, part]
    factors = None if exponent is None else stats.factors[exponent][part]
    ranges = (amax if factors is None else amax * factors.astype(np.float32)).max(axis=1)
    table = RangeTable.of(stats.timesteps, ranges) if kind.by_timestep else None
    grid = ActivationGrid(float(np.float16(ranges.max() / 127)), table=table)
    return InputRounding(grid, np.empty(0, np.int32), factors, kind).at(timestep)


def float_grid(stats: ActivationStats, form: str, timestep: float) -> FloatGrid:
    """Return the E4M3 quantizer: as calibration chose it, or by the largest magnitude at the timestep."""
    if form == "static":
        return FloatGrid(stats.float_scale(E4M3))
    ranges = stats.amax_by_timestep.max(axis=1)
    ratio = RangeTable.of(stats.timesteps, ranges).at(timestep)
    return FloatGrid(float(ratio * ranges.max() / E4M3.largest))


class Projected:
    """Errors of the output by rounding the convolutions' inputs, summed over layers, calls and probes."""

    def __init__(self, run: Run) -> None:
        steps = np.linspace(0, len(run.calibration.inputs.timesteps) - 1, STEPS).astype(int)
        self.subject = measured_subject(tuple(steps.tolist()), run)
        self.calls = Calls(self.subject.graph, self.subject.recorded, CALLS)
        self.graph = TorchGraph(self.subject.graph.model)
        self.uses = [
            (layer, use)
            for layer in self.subject.layers
            for use in layer.uses
            if layer.op == "Conv" and len(layer.kernel) == 2
        ]
        self.halves = split_inputs(self.subject.graph)
        self.errors: Errors = defaultdict(float)
        self.power = 0.0

    def add(self, step: int) -> None:
        """Add the calls at one timestep."""
        arrays = self.calls.feeds(step, slice(0, CALLS))
        timestep = timestep_of(self.subject.spec, arrays)
        random = torch.Generator().manual_seed(SEED + step)

        def seeds(output: Any) -> list[Any]:
            self.power += float(output.double().square().sum())
            return [torch.randn(output.shape, generator=random) for _ in range(PROBES)]

        whole = (slice(0, len(self.graph.values)),)
        directions = {self.subject.spec.output: seeds}
        feeds, nodes = self.graph.feed(arrays), [use for _, use in self.uses]
        for came in layer_gradients(self.graph, feeds, whole, nodes, directions, range(len(nodes))):
            layer, use = self.uses[came.number]
            through = torch.stack(came.through, 1)
            stats = self.subject.stats.activations[use.input]

            def keep(key: tuple[str, ...], lost: Any, through: Any = through) -> None:
                products = torch.einsum("nchw,npchw->np", lost, through)
                self.errors[key] += float(products.double().square().sum())

            for form in ("static", "timestep"):
                grid = float_grid(stats, form, float(timestep or 0))
                keep(("fp8", form), came.x - grid.rounded(came.x, torch))
            cut = self.halves.get(use.input, 0)
            forms = {ALL: [slice(None)]}
            if cut:
                forms |= {WHOLE: [slice(None)], HALVES: [slice(cut), slice(cut, None)]}
            for kind, exponent, name in product(RANGES, EXPONENTS, forms):
                parts = forms[name]
                own = [rounding(stats, part, exponent, kind, timestep) for part in parts]
                lost = [
                    lost_by_rounding(came.x[:, part].contiguous(), one, layer)
                    for part, one in zip(parts, own, strict=True)
                ]
                keep((kind.kind, str(exponent), name), torch.cat(lost, 1))

    def share(self, *key: str) -> float:
        """Return an error as a share of the output."""
        return self.errors[key] / PROBES / self.power


def main() -> None:
    """Measure, print the page, and exit."""
    parser = bench_parser(__doc__)
    parser.add_argument("model", nargs="?", default="emoji")
    parser.add_argument("-o", "--run", type=Path, default=Path("runs/bench-activations"))
    options = parser.parse_args()
    page = Page("Forms of activation ranges that are not worth their kernels")
    recipe = bench_recipe(None, options.set, {"model": options.model})
    with open_pipeline(recipe, options.run, PlainTalk()) as pipeline:
        run = pipeline.current("candidates")
        found = Projected(run)
    for step in range(STEPS):
        found.add(step)
    rows, verdicts = [], []
    for kind in RANGES:
        label = kind.kind or "static"
        errors = {
            name: [found.share(kind.kind, str(e), name) for e in EXPONENTS]
            for name in (ALL, WHOLE, HALVES)
        }
        rows += [[label, name, *(f"{e:.2e}" for e in row)] for name, row in errors.items()]
        gained = (min(errors[WHOLE]) - min(errors[HALVES])) / min(errors[ALL])
        said = verdict(
            gained < WORTH,
            f"at the best exponents two {label} ranges take less than {WORTH:.0%} off all error",
            f"{gained:.1%}",
        )
        verdicts.append((gained < WORTH, said))
    head = ("range", "inputs", "no factors", *(f"0.{tenths}" for tenths in TENTHS))
    page.say(markdown(head, rows))
    floats = [found.share("fp8", form) for form in ("static", "timestep")]
    names = ("FP8, one scale", "FP8, the range by timestep")
    page.say(
        markdown(("all convolutions", "error"), [[n, f"{e:.2e}"] for n, e in zip(names, floats)])
    )
    gained = 1 - floats[1] / floats[0]
    said = f"FP8 by timestep takes less than {WORTH:.0%} off the error of one scale"
    verdicts.append((gained < WORTH, verdict(gained < WORTH, said, f"{gained:.1%}")))
    page.conclude(verdicts, options.page)


if __name__ == "__main__":
    main()
