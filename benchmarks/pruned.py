"""What could be left unrounded: schemes that no plan takes, if it were known beforehand what they cost.

    python benchmarks/pruned.py [emoji] [digits] [dit] [unet2dcondition] [unet]

Of a build that rounds and measures everything, with few calls: dit and unet2dcondition are tiny models of random
weights, unet has 21 M. A scheme of a layer is within reach when at some price of a byte and of a nanosecond it would be
the layer's choice, were its loss MARGIN times smaller: so wrong may the estimate be that decides before rounding. Given
are the rounded weights within reach, of all, by their number of elements; what the controls take is always rounded.

Beside it stands how far off an estimate without rounding is: the observers rank the exponents of each activation's
factors. Given is the loss of the best of the first ones over that of the best of all.

A call that was stopped goes on: finished stages are kept in FOLDER.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from speed import SETTINGS, UNET, source_of
from table import Page, bench_parser, bench_recipe, markdown

from mpq_deploy.allocate.front import BYTE_PRICES, TIME_PRICES
from mpq_deploy.allocate.plan_solver import PlanSolver
from mpq_deploy.formats.scheme import W8A16, Scheme
from mpq_deploy.graph.layers import Layer
from mpq_deploy.models.spec import Array
from mpq_deploy.rounding.candidate_store import choices_of
from mpq_deploy.rounding.control_schemes import control_plans
from mpq_deploy.run.pipeline import open_pipeline
from mpq_deploy.run.view import Run
from mpq_deploy.system.progress import PlainTalk

TINY = ("dit", "unet2dcondition")
MODELS = ("emoji", "digits", *TINY, UNET)
MARGINS = (1.0, 1.25, 1.5, 2.0, 3.0)
Kept = dict[str, tuple[Scheme, ...]]


class Reach:
    """Losses, bytes and times of every scheme of every layer of a measured run."""

    def __init__(self, run: Run) -> None:
        self.run, self.solver = run, PlanSolver(run)
        self.layers = run.exported.graph.layers
        self.choices: Kept = {
            name: c.schemes for name, c in choices_of(run, run.exported.graph).items()
        }
        controls = control_plans(run.exported.graph, run.target, run.calibration.stats)
        self._always = {n.name: {plan[n.name] for plan in controls.values()} for n in self.layers}
        self._rows = {layer.name: self._costs(layer) for layer in self.layers}

    def _costs(self, layer: Layer) -> tuple[Array, Array, Array]:
        schemes, costs = self.choices[layer.name], self.solver.costs
        assert costs is not None, "the target's speed is known"
        losses = self.solver.table.losses[layer.name]
        size = [s.weight_bytes(layer) + s.input_bytes(layer) for s in schemes]
        time = [
            costs.layer_ns(layer, s) + sum(costs.quantizers_ns(layer, s).values()) for s in schemes
        ]
        return np.array([losses[s.name] for s in schemes]), np.array(size), np.array(time)

    def kept(self, margin: float, timed: bool) -> Kept:
        """Return the schemes of each layer within reach by ``margin``; not ``timed``: at prices of bytes alone."""
        return {n.name: tuple(self._within(n, margin, timed)) for n in self.layers}

    def _within(self, layer: Layer, margin: float, timed: bool) -> Iterator[Scheme]:
        loss, size, time = self._rows[layer.name]
        within = np.zeros(len(loss), bool)
        of_time = _prices(loss, time, TIME_PRICES) if timed else [0.0]
        for of_byte in _prices(loss, size, BYTE_PRICES):
            for of_nanosecond in of_time:
                paid = of_byte * size + of_nanosecond * time
                within |= loss / margin + paid <= (loss + paid).min() * (1 + 1e-9)
        for scheme, near in zip(self.choices[layer.name], within):
            if near or scheme in self._always[layer.name]:
                yield scheme

    def rounded(self, kept: Kept) -> int:
        """Count the elements of the weight forms that ``kept`` needs."""
        return sum(n.weights * len(_forms(kept[n.name])) for n in self.layers)

    def ranked(self) -> dict[int, Array]:
        """Return the loss of the best of the first 1, 2, 3 exponents over that of the best, by activation and body."""
        totals: dict[Any, dict[int, float]] = defaultdict(lambda: defaultdict(float))
        first: dict[Any, dict[int, int]] = defaultdict(dict)
        for layer in self.layers:
            stats = self.run.calibration.stats.activations[layer.inputs[0]]
            for scheme in filter(lambda s: s.branch.rescales, self.choices[layer.name]):
                key, amount = (layer.inputs, scheme.body.name), scheme.branch.amount
                totals[key][amount] += self.solver.table.losses[layer.name][scheme.name]
                first[key][amount] = scheme.branch.rank(stats)
        several = [key for key in totals if len(totals[key]) > 2 and min(totals[key].values()) > 0]
        return {
            count: np.array(
                [
                    min(v for a, v in totals[key].items() if first[key][a] < count)
                    / min(totals[key].values())
                    for key in several
                ]
            )
            for count in (1, 2, 3)
        }


def _prices(loss: Array, cost: Array, count: int) -> list[float]:
    """Return prices of a unit of ``cost`` at which choices may change, and 0."""
    more, less = np.subtract.outer(loss, loss), np.subtract.outer(cost, cost)
    slopes = more[(more > 0) & (less < 0)] / -less[(more > 0) & (less < 0)]
    if not len(slopes):
        return [0.0]
    return [0.0, *np.geomspace(slopes.min() / 2, slopes.max() * 2, count).tolist()]


def _forms(schemes: tuple[Scheme, ...]) -> set[str]:
    return {one.weight_form for s in schemes if s.quantized for one in s.branch.rounds_first(s)} | {
        W8A16.weight_form
    }


def described(model: str, out: Path) -> dict[str, Any]:
    """Return what the recipe says of a model; makes those of random weights."""
    if model in TINY:
        from transformer_engines import write_model

        return {**write_model(model, out / f"{model}-source", 0)}
    return {"model": source_of(model, out)}


def judge(model: str, chosen: argparse.Namespace, page: Page) -> None:
    """Build a model to its plan, and say its tables."""
    values = {**SETTINGS, **described(model, chosen.out), "engine.build": False}
    recipe = bench_recipe(None, chosen.set, values)
    with open_pipeline(recipe, chosen.out / model / "run", PlainTalk()) as pipeline:
        reach = Reach(pipeline.current("measure"))
    everything, pairs = reach.rounded(reach.choices), sum(map(len, reach.choices.values()))
    rows = []
    for margin in MARGINS:
        shares = [reach.rounded(reach.kept(margin, timed)) / everything for timed in (True, False)]
        rows.append([f"{margin:g}", *(f"{share:.0%}" for share in shares)])
    page.say(f"## {model}\n\n{len(reach.layers)} layers, {pairs} pairs of a layer and a scheme.")
    page.say(markdown(("margin", "within reach, bytes and time", "bytes alone"), rows))
    ranked = [
        [str(n), f"{v.mean():.2f}", f"{np.quantile(v, 0.9):.2f}", f"{v.max():.2f}"]
        for n, v in reach.ranked().items()
        if len(v)
    ]
    page.say(markdown(("first exponents", "mean", "90 %", "worst"), ranked))


def main() -> None:
    parser = bench_parser(__doc__)
    parser.add_argument("models", nargs="*", default=MODELS, help=f"of {', '.join(MODELS)}")
    parser.add_argument("-o", "--out", type=Path, default=Path("runs") / "bench-pruned")
    chosen = parser.parse_args()
    unknown = set(chosen.models) - set(MODELS)
    if unknown:
        sys.exit(f"Unknown model '{unknown.pop()}'. Known: {', '.join(MODELS)}.")
    page = Page("Left unrounded")
    for model in chosen.models:
        judge(model, chosen, page)
    page.save(chosen.page)


if __name__ == "__main__":
    main()
