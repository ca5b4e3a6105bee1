"""The stage candidates: every weight form of every layer, rounded once for all budgets."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mpq_deploy.calibrate.stats import CalibrationSet, CalibrationStats
from mpq_deploy.engine.target import Target
from mpq_deploy.formats.candidates import (
    Choices,
    LayerCandidates,
    choices_for,
    load_candidates,
    load_choices,
    round_candidates,
    save_candidates,
    weight_matrix,
    with_promoted_rows,
)
from mpq_deploy.formats.scheme import FP16, Scheme, branches_of, schemes_named
from mpq_deploy.graph.layers import Layer, LayerGraph
from mpq_deploy.graph.writers.branches import bias_refusal
from mpq_deploy.graph.writers.quantize_layers import weight_array
from mpq_deploy.models.spec import Array, DenoiserSpec
from mpq_deploy.run.common import settings, version_of
from mpq_deploy.run.stage_memory import check_memory
from mpq_deploy.run.view import Exported
from mpq_deploy.system.files import Fields
from mpq_deploy.system.mapped import drop_pages
from mpq_deploy.system.parallel.work import Alone

if TYPE_CHECKING:
    from threadpoolctl import ThreadpoolController

    from mpq_deploy.recipe import Recipe
    from mpq_deploy.rounding.hessian import Hessian, HessianOptions
    from mpq_deploy.run.view import Run
    from mpq_deploy.sensitivity.measured_calls import MeasureOptions


# Layer number -> its output channels, most salient first, beside the candidates' files.
ROW_ORDERS = "row-orders.npz"
# Ranking channels needs fewer calls than measuring schemes.
SALIENCE_TIMESTEPS, SALIENCE_SAMPLES = 8, 12
# Candidates that are kept in memory once they were read (our choice).
HELD_BYTES = 512 << 20
# Raised with every change of what the candidates' files hold, so that older run folders make theirs again.
CANDIDATES_FORMAT = 7
# Controls: what a user would get without this tool, at the same rounding: one scheme for every layer that may
# take it (FP16 for the others).
# The last of each is what the target simulate takes instead.
CONTROLS = {
    "int8": ("w8a8", "w8a16", "w8a8-sim"),
    "int4": ("w4a16-b32", "w4a16-b64", "w4a16-b128", "w4a16-sim"),
}


def candidates_inputs(run: Run) -> Fields:
    """Return what the stage candidates reads: digests and settings."""
    target = run.target
    return {
        "export": run.digest("export"),
        "calibrate": run.digest("calibrate"),
        "recipe.allocate.schemes": list(run.recipe.allocate.schemes),
        "recipe.allocate.branches": list(run.recipe.allocate.branches),
        "recipe.measure.samples": run.recipe.measure.samples,
        "candidates.format": CANDIDATES_FORMAT,
        "target.schemes": target.model_dump(mode="json", include={"schemes", "branches", "rules"}),
        **settings(run.recipe.quantize, "quantize"),
        **version_of("onnxruntime", "numpy", "torch"),
    }


def make_candidates(run: Run, folder: Path) -> str:
    """Make the stage candidates in ``folder``; return a few words for the log."""
    exported = run.exported
    check_memory(run, "candidates")
    if isinstance(run.crew, Alone):
        rounder = Rounder.of(run, exported)
        for moments in _moments(run, exported, rounder):
            rounder.into(folder, moments)
    else:
        from mpq_deploy.rounding.spread_rounding import round_over_workers

        round_over_workers(run, exported, folder)
    orders, how = _salient_first(run, exported, folder)
    numbers = {layer.name: number for number, layer in enumerate(exported.graph.layers)}
    np.savez(folder / ROW_ORDERS, **{str(numbers[name]): order for name, order in orders.items()})  # type: ignore[arg-type]
    return f"{len(wanted_schemes(run.recipe))} schemes, rounding {run.recipe.quantize.rounding}{how}"


@dataclass(frozen=True)
class Rounder:
    """Rounds the layers of ``exported`` one by one: the same bytes in any process, with one thread of NumPy's BLAS.

    With other threads some products round otherwise. Nor do more help where another process uses the cores: threads
    that wait for each other thousands of times in a layer then take many times as long as one.
    """

    exported: Exported
    recipe: Recipe
    target: Target
    stats: CalibrationStats
    numbers: Mapping[str, int]
    blas: ThreadpoolController

    @classmethod
    def of(cls, run: Run, exported: Exported) -> Rounder:
        """Read what rounding depends on."""
        from threadpoolctl import ThreadpoolController

        numbers = {layer.name: number for number, layer in enumerate(exported.graph.layers)}
        stats = run.calibration.stats
        return cls(exported, run.recipe, run.target, stats, numbers, ThreadpoolController())

    def into(self, folder: Path, moments: Hessian) -> Path:
        """Round the layer of ``moments`` for all its schemes; return its new file in ``folder``."""
        layer, graph, section = moments.layer, self.exported.graph, self.recipe.quantize
        activations = self.stats.activations[layer.inputs[0]]
        with self.blas.limit(limits=1, user_api="blas"):
            candidates = round_candidates(
                layer,
                choices_for(layer, wanted_schemes(self.recipe), self._refusal),
                weight_matrix(layer, weight_array(graph.model, layer)),
                moments.blocks,
                widths=moments.widths,
                gptq=section.rounding == "gptq",
                damping=section.damping,
                refinements=section.refinements,
                # The controls are what they say whatever the recipe allows the plan.
                outliers=activations.outliers,
                factors=activations.factors[0],
                input_amax=_column_amax(layer, self.stats) if layer.group == 1 else None,
                also=tuple(s for names in CONTROLS.values() if (s := control_scheme(layer, names, self.target)).weight),
            )
        path = _file(folder, self.numbers[layer.name])
        save_candidates(candidates, path)
        drop_pages(graph.model.graph.initializers[layer.weight].const_value)
        return path

    def diagonal(self, layer: Layer) -> Hessian:
        """Return the second moments of the layer's input channels: what rounding to nearest looks at."""
        from mpq_deploy.rounding.hessian import Hessian

        return Hessian(layer, _diagonal_moments(layer, self.stats), (1,) * layer.reduction, 0)

    def _refusal(self, layer: Layer, scheme: Scheme) -> str:
        reason = self.target.refusal(layer, scheme)
        if reason or not scheme.branch or scheme.simulated:
            return reason
        if scheme.activation_form and layer.op != "Conv" and self._convolved.intersection(layer.inputs):
            return "convolutions read its input too, whose channels lie on another axis"
        return bias_refusal(self.exported.graph.model, layer)

    @cached_property
    def _convolved(self) -> frozenset[str]:
        return frozenset(t for layer in self.exported.graph.layers if layer.op == "Conv" for t in layer.inputs)


def _salient_first(run: Run, exported: Exported, folder: Path) -> tuple[dict[str, Array], str]:
    """Order the output channels of layers with a rows branch, most salient first: layer name -> int32 [O]."""
    chosen = with_rows(folder, exported.graph)
    if not chosen:
        return {}, ""
    stats = run.calibration.stats
    method = run.recipe.quantize.salience
    saliences = _probed_salience(run, exported, chosen) if method == "probe" else None
    if saliences is None:
        saliences = {name: _kurtosis(c, stats) for name, c in chosen.items()}
        why = ", salient rows by kurtosis" + (" (torch cannot evaluate this graph)" if method == "probe" else "")
    else:
        why = ", salient rows by probes"
    # Equal saliences keep the channels' order, so equal inputs give equal plans.
    return {name: np.argsort(-s, kind="stable").astype(np.int32) for name, s in saliences.items()}, why


def with_rows(folder: Path, graph: LayerGraph) -> StoredCandidates:
    """Open the candidates in ``folder`` of the layers with a rows branch."""
    layers = [
        layer
        for number, layer in enumerate(graph.layers)
        if any(s.branch and s.branch.kind == "rows" for s in load_choices(_file(folder, number)).schemes)
    ]
    return StoredCandidates(folder, graph, {}, tuple(layers))


def _kurtosis(candidates: LayerCandidates, stats: CalibrationStats) -> Array:
    from mpq_deploy.sensitivity.kurtosis import channel_kurtosis

    return channel_kurtosis(candidates.layer, candidates.weight, stats)


def _column_amax(layer: Layer, stats: CalibrationStats) -> Array:
    """Return the absolute maximum of what each column of the weight multiplies, [K]; for layers of one group."""
    amax = np.max([stats.activations[tensor].amax for tensor in layer.inputs], axis=0)
    return np.repeat(amax, layer.reduction // len(amax))


def _probed_salience(run: Run, exported: Exported, chosen: StoredCandidates) -> dict[str, Array] | None:
    """Return the channels' errors by probes on the calls that weights are rounded on; None where torch cannot."""
    if importlib.util.find_spec("torch") is None:
        return None
    from mpq_deploy.onnx_torch.torch_graph import UnsupportedOperator
    from mpq_deploy.sensitivity.exhaustive import evaluates_in_torch
    from mpq_deploy.sensitivity.salience import channel_errors

    try:
        if isinstance(run.crew, Alone):
            return channel_errors(*salience_inputs(run, exported, chosen), run.talk)
        # No worker is started to find that out.
        if not evaluates_in_torch(exported.graph):
            return None
        from mpq_deploy.rounding.spread_rounding import salience_over_workers

        return salience_over_workers(run, exported, chosen)
    except UnsupportedOperator:
        return None


def salience_inputs(
    run: Run, exported: Exported, chosen: StoredCandidates
) -> tuple[LayerGraph, Mapping[str, Array], CalibrationSet, dict[str, Array], DenoiserSpec, MeasureOptions]:
    """Return what the errors of channels are measured on."""
    from mpq_deploy.calls.timesteps import sampled_steps
    from mpq_deploy.sensitivity.measured_calls import MeasureOptions
    from mpq_deploy.sensitivity.salience import body_weights

    rounded_on, _ = run.calibration.inputs.split(run.recipe.measure.samples)
    count = len(rounded_on.timesteps)
    some = rounded_on.at(sampled_steps(count, min(SALIENCE_TIMESTEPS, count)))
    options = MeasureOptions(probes=1, samples=SALIENCE_SAMPLES)
    return exported.graph, body_weights(chosen), some, exported.conditions, exported.spec, options


def wanted_schemes(recipe: Recipe) -> tuple[Scheme, ...]:
    """Return the schemes that the solver may choose from by the recipe, branches included."""
    bodies = schemes_named(recipe.allocate.schemes)
    return (*bodies, *branches_of(bodies, recipe.allocate.branches))


def control_scheme(layer: Layer, preferred: tuple[str, ...], target: Target) -> Scheme:
    """Return the first of the ``preferred`` schemes that ``layer`` may take on ``target``; FP16 when none."""
    allowed = {s.name: s for s in choices_for(layer, schemes_named(preferred), target.refusal).schemes}
    return next((allowed[name] for name in preferred if name in allowed), FP16)


def _moments(run: Run, exported: Exported, rounder: Rounder) -> Iterator[Hessian]:
    """Yield the second moments of every layer's input: Hessians for GPTQ, else only their diagonals."""
    from mpq_deploy.rounding.hessian import iterate_hessians

    if run.recipe.quantize.rounding == "nearest":
        yield from map(rounder.diagonal, exported.graph.layers)
        return
    rounded_on, options = hessian_inputs(run, exported)
    calls = (exported.graph, rounded_on, exported.conditions, exported.spec, options, run.talk)
    yield from iterate_hessians(*calls, scratch=run.scratch())


def hessian_inputs(run: Run, exported: Exported) -> tuple[CalibrationSet, HessianOptions]:
    """Return the calls that weights are rounded on, and the bounds on their Hessians."""
    from mpq_deploy.calls.trajectories import renoised
    from mpq_deploy.rounding.hessian import HessianOptions

    section = run.recipe.quantize
    rounded_on, _ = run.calibration.inputs.split(run.recipe.measure.samples)
    rounded_on = renoised(rounded_on, exported.spec, section.noise_draws)
    return rounded_on, HessianOptions(
        memory_cap_bytes=section.memory_mb * 2**20,
        min_rows=section.hessian_rows,
        max_width=section.hessian_width,
        max_calls=rounded_on.samples.shape[0] * rounded_on.samples.shape[1],
    )


def _diagonal_moments(layer: Layer, stats: CalibrationStats) -> Array:
    """Second moments of each input channel, as a stack of 1x1 blocks [group * K, 1, 1]."""
    by_channel = sum(stats.activations[tensor].second_moment for tensor in layer.inputs)
    channels = np.asarray(by_channel).reshape(layer.group, -1)
    return np.repeat(channels, layer.reduction // channels.shape[1], axis=1).reshape(-1, 1, 1)


class StoredCandidates(Mapping[str, LayerCandidates]):
    """The candidates of ``layers`` (None: all) in a stage ``folder``, by layer name, read when they are asked for.

    Those asked for first are kept in memory, up to ``limit`` bytes (None: ``HELD_BYTES``): all forms of 860 M weights
    are gigabytes of codes. ``orders``: layer name -> its output channels, most salient first, where a scheme promotes
    them.
    """

    def __init__(
        self,
        folder: Path,
        graph: LayerGraph,
        orders: Mapping[str, Array],
        layers: tuple[Layer, ...] | None = None,
        limit: int | None = None,
    ) -> None:
        self.folder, self._graph, self._orders = folder, graph, orders
        self._limit = HELD_BYTES if limit is None else limit
        chosen = {layer.name for layer in (graph.layers if layers is None else layers)}
        self._numbers = {layer.name: i for i, layer in enumerate(graph.layers) if layer.name in chosen}
        self._held: dict[str, LayerCandidates] = {}
        self._bytes = 0

    @classmethod
    def of(cls, folder: Path, graph: LayerGraph, limit: int | None = None) -> StoredCandidates:
        """Open a finished stage ``folder``."""
        names = {str(number): layer.name for number, layer in enumerate(graph.layers)}
        with np.load(folder / ROW_ORDERS, allow_pickle=False) as orders:
            return cls(folder, graph, {names[number]: orders[number] for number in orders.files}, limit=limit)

    def __getitem__(self, name: str) -> LayerCandidates:
        held = self._held.get(name)
        if held is not None:
            return held
        number = self._numbers[name]
        found = self._read(number)
        size = _file(self.folder, number).stat().st_size + found.weight.nbytes
        if self._bytes + size <= self._limit:
            self._held[name] = found
            self._bytes += size
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._numbers)

    def __len__(self) -> int:
        return len(self._numbers)

    def _read(self, number: int) -> LayerCandidates:
        layer = self._graph.layers[number]
        weight = weight_matrix(layer, weight_array(self._graph.model, layer))
        candidates = load_candidates(layer, weight, _file(self.folder, number))
        order = self._orders.get(layer.name)
        return candidates if order is None else with_promoted_rows(candidates, order)


def _file(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.safetensors"


def candidates_of(run: Run, graph: LayerGraph) -> StoredCandidates:
    """Open the candidates of every layer, by layer name, with the rows that branches promote."""
    return StoredCandidates.of(run.stage("candidates"), graph)


def iterate_candidates(folder: Path, graph: LayerGraph) -> Iterator[LayerCandidates]:
    """Read the candidates stage ``folder`` layer by layer, in graph order; float weights are dropped on the way."""
    stored = StoredCandidates.of(folder, graph, limit=0)
    for layer in graph.layers:
        yield stored[layer.name]
        drop_pages(graph.model.graph.initializers[layer.weight].const_value)


def choices_of(run: Run, graph: LayerGraph) -> dict[str, Choices]:
    """Read which schemes every layer may take, by layer name, without its weights."""
    folder = run.stage("candidates")
    return {layer.name: load_choices(_file(folder, i)) for i, layer in enumerate(graph.layers)}
