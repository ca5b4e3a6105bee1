"""Rounds the weights of all layers for all their schemes.

In: a calibrated run. Out: one file of candidates per layer, the same bytes in any process.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mpq_deploy.calibrate.stats import CalibrationStats
from mpq_deploy.calls.recorded import RecordedCalls
from mpq_deploy.calls.trajectories import has_forward_process, renoised
from mpq_deploy.engine.target import Target
from mpq_deploy.formats.candidates import (
    Choices,
    LayerCandidates,
    choices_for,
    round_candidates,
    save_candidates,
    weight_matrix,
)
from mpq_deploy.formats.layer_rounding import InputMoments
from mpq_deploy.formats.scheme import Scheme
from mpq_deploy.graph.layers import Layer
from mpq_deploy.graph.writers.quantize_layers import bias_refusals, weight_array
from mpq_deploy.models.spec import Array
from mpq_deploy.rounding.arrays import rows_that_fit
from mpq_deploy.rounding.candidate_store import (
    candidate_file,
    wanted_schemes,
)
from mpq_deploy.rounding.control_schemes import (
    beyond_scales,
    control_plans,
    rank_refusal,
    tensor_ranks,
)
from mpq_deploy.rounding.earlier_forms import EarlierForms
from mpq_deploy.rounding.hessian import Hessian, HessianPlan
from mpq_deploy.rounding.quantizers import (
    TOGETHER_BYTES,
    Rounding,
    lanes_of,
    rounding_bytes,
    rounding_threads,
)
from mpq_deploy.run.view import Exported
from mpq_deploy.system.compute import compute_on, computing_on, free_cached_memory, out_of_memory
from mpq_deploy.system.mapped import drop_pages
from mpq_deploy.system.progress import Talk
from mpq_deploy.system.threads import threads_here

if TYPE_CHECKING:
    from threadpoolctl import ThreadpoolController

    from mpq_deploy.recipe import Recipe
    from mpq_deploy.run.view import Run


# Layers with more than LARGE_WEIGHTS weights are rounded for the LARGE_VARIANTS exponents of a
# branch's factors with the smallest expected error. All four exponents would double the candidates
# of a Stable Diffusion (our choice; two leave 0 to 7 % more error on the bundled models).
LARGE_WEIGHTS, LARGE_VARIANTS = 1 << 20, 2
# Where the GPU's memory runs out, rounding is tried again with this many times fewer rows.
FEWER = 8


@dataclass(frozen=True)
class Rounder:
    """Rounds the layers of ``exported`` one by one, with the same bytes in any process.

    Each layer uses one BLAS thread. With several, some products would round differently; and their
    thousands of synchronizations per layer are slow while other processes use the cores. Instead,
    several layers, or parts of a large one, are rounded at once, one thread each. ``numbers``:
    layer name -> index in the graph; ``base``: the run's folder, under which ``earlier`` finds other
    targets' weights.
    """

    exported: Exported
    recipe: Recipe
    target: Target
    stats: CalibrationStats
    numbers: Mapping[str, int]
    blas: ThreadpoolController
    talk: Talk
    root: Path = Path()
    earlier: EarlierForms = field(default_factory=EarlierForms)

    @classmethod
    def of(cls, run: Run, earlier: EarlierForms) -> Rounder:
        """Read the inputs of rounding from ``run``."""
        from threadpoolctl import ThreadpoolController

        numbers = {layer.name: number for number, layer in enumerate(run.exported.graph.layers)}
        stats = run.calibration.stats
        blas = ThreadpoolController()
        read = run.exported, run.recipe, run.target, stats
        return cls(*read, numbers, blas, run.talk, run.root, earlier)

    def unknown(self) -> tuple[Layer, ...]:
        """Return the layers with a form that no other target has rounded."""
        layers, known = self.exported.graph.layers, self.earlier.cover
        if not self.earlier.folders:
            return layers
        return tuple(
            layer
            for layer in layers
            if not known(self.root, layer, self.numbers[layer.name], self._choices(layer).forms)
        )

    def _choices(self, layer: Layer) -> Choices:
        choices = choices_for(layer, wanted_schemes(self.recipe), self._refusal)
        # Controls use their own schemes, even those that the recipe does not allow in the plan.
        return replace(choices, also=tuple(plan[layer.name] for plan in self._controls.values()))

    def into(self, folder: Path, moments: Hessian, lanes: int = 1) -> Path:
        """Round the layer of ``moments`` for all its schemes; return its new file in ``folder``.

        ``lanes``: how many parts of it at once.
        """
        graph = self.exported.graph
        layer = graph.layers[self.numbers[moments.layer.name]]
        # ``moments`` may be of another target's graph, where this layer may be a MatMul or a Conv.
        moments = replace(moments, layer=layer)
        with self.blas.limit(limits=1, user_api="blas"):
            candidates = self._candidates(moments, lanes)
        path = candidate_file(folder, self.numbers[layer.name])
        save_candidates(candidates, path)
        drop_pages(graph.model.graph.initializers[layer.weight].const_value)
        return path

    def _candidates(self, moments: Hessian, lanes: int = 1) -> LayerCandidates:
        """Round on this process' device; if GPU memory runs out, with fewer rows, then on CPU."""
        layer, place, section = moments.layer, computing_on(), self.recipe.quantize
        how = Rounding(section.rounding == "gptq", section.damping, section.refinements)
        if place.torch is None:
            return self._rounded(moments, replace(how, lanes=lanes))
        rows = rows_that_fit(place.torch_device(), layer.out_channels, layer.reduction)
        for number, then in ((rows, "with fewer forms at once"), (rows // FEWER, "on the CPU")):
            try:
                return self._rounded(moments, replace(how, rows=number))
            except Exception as error:
                if not out_of_memory(error):
                    raise
            free_cached_memory()
            self.talk.line(f"  {layer.name}: the GPU's memory ran out; rounded again {then}")
        with compute_on(replace(place, torch=None)):
            return self._rounded(moments, how)

    def _rounded(self, moments: Hessian, how: Rounding) -> LayerCandidates:
        layer = moments.layer
        activations = self.stats.activations[layer.inputs[0]]
        choices = self._choices(layer)
        weight = weight_matrix(layer, weight_array(self.exported.graph.model, layer))
        number = self.numbers[layer.name]
        return round_candidates(
            layer,
            choices,
            weight,
            InputMoments(
                moments.blocks,
                moments.widths,
                outliers=activations.outliers,
                factors=activations.factors,
                amax=_column_amax(layer, self.stats) if layer.group == 1 else None,
            ),
            how,
            self.earlier.of(self.root, layer, number, weight, choices.forms),
        )

    def diagonal(self, layer: Layer) -> Hessian:
        """Return the diagonal of the layer's Hessian from calibration, for rounding to nearest."""
        return Hessian(layer, _diagonal_moments(layer, self.stats), (1,) * layer.reduction, 0)

    def _refusal(self, layer: Layer, scheme: Scheme) -> str:
        reason = (
            self.target.refusal(layer, scheme)
            or beyond_scales(layer, scheme, self.stats)
            or self._left_out(layer, scheme)
            or rank_refusal(layer, scheme, self._ranks)
        )
        if reason or scheme.simulated or not (scheme.branch or scheme.range.moves):
            return reason
        if (
            scheme.activation_form
            and layer.op != "Conv"
            and self._convolved.intersection(layer.inputs)
        ):
            return "convolutions read its input too, whose channels lie on another axis"
        return self._bias_refusals[layer.name]

    @cached_property
    def _bias_refusals(self) -> dict[str, str]:
        graph = self.exported.graph
        return bias_refusals(graph.model, graph.layers)

    def _left_out(self, layer: Layer, scheme: Scheme) -> str:
        if scheme.range.by_timestep and self.exported.spec.timestep is None:
            return "the model has no timestep input"
        stats = self.stats.activations[layer.inputs[0]]
        if layer.weights > LARGE_WEIGHTS and scheme.branch.rank(stats) >= LARGE_VARIANTS:
            return f"of a layer this large, {LARGE_VARIANTS} exponents of the factors are rounded"
        return ""

    @cached_property
    def _ranks(self) -> dict[str, int]:
        return tensor_ranks(self.exported.graph)

    @cached_property
    def _controls(self) -> dict[str, dict[str, Scheme]]:
        return control_plans(self.exported.graph, self.target, self.stats)

    @cached_property
    def _convolved(self) -> frozenset[str]:
        return frozenset(
            t for layer in self.exported.graph.layers if layer.op == "Conv" for t in layer.inputs
        )


def _column_amax(layer: Layer, stats: CalibrationStats) -> Array:
    """Return the absolute maximum of each weight column's input, [K]; for one group only."""
    amax = np.max([stats.activations[tensor].amax for tensor in layer.inputs], axis=0)
    return np.repeat(amax, layer.reduction // len(amax))


def rounding_calls(run: Run) -> RecordedCalls:
    """Return the calls that weights are rounded on, with fresh noise where possible."""
    exported = run.exported
    rounded_on, _ = run.calibration.inputs.split(run.recipe.measure.samples)
    if run.recipe.quantize.noise_draws and not has_forward_process(exported.spec):
        run.talk.line(
            "  weights are rounded on the recorded calls only: no fresh noise can be added"
        )
    rounded_on = renoised(rounded_on, exported.spec, run.recipe.quantize.noise_draws)
    return RecordedCalls(rounded_on, exported.spec)


def round_layers(run: Run, rounders: Sequence[tuple[Rounder, Path]], free: int = 0) -> None:
    """Write the candidates of every layer into the folder of each of ``rounders``.

    Several layers are rounded at once, up to one per core and TOGETHER_BYTES of memory. ``free``:
    bytes that more Hessians at once may take (``HessianPlan.of``).
    """
    gptq, blas = run.recipe.quantize.rounding == "gptq", rounders[0][0].blas
    every = [wanted_schemes(rounder.recipe) for rounder, _ in rounders]
    forms = max(len({s.weight_form for s in schemes if not s.branch}) for schemes in every)
    threads = 1 if computing_on().torch is not None else rounding_threads(threads_here().blas)
    pending: dict[Future[None], int] = {}

    def finish(needed: int) -> None:
        """Wait until a thread is free and ``needed`` bytes fit beside the layers in work."""
        while pending and (
            len(pending) >= threads or sum(pending.values()) + needed > TOGETHER_BYTES
        ):
            for done in wait(pending, return_when=FIRST_COMPLETED).done:
                del pending[done]
                done.result()

    def rounded(moments: Hessian, lanes: int = 1) -> None:
        for rounder, folder in rounders:
            rounder.into(folder, moments, lanes)

    with ThreadPoolExecutor(threads) as pool:
        for group in layer_moments(run, [rounder for rounder, _ in rounders], free):
            # Fetching a group's first layer computes the group's Hessians, with all BLAS threads.
            for first in group:
                with blas.limit(limits=1, user_api="blas"):
                    for one in chain([first], group):
                        if threads == 1:
                            rounded(one)
                            continue
                        layer, width = one.layer, one.blocks.shape[-1]
                        needed = rounding_bytes(layer.weights, width, forms, gptq)
                        lanes = lanes_of(needed, threads)
                        needed = rounding_bytes(layer.weights, width, forms, gptq, lanes)
                        finish(needed)
                        pending[pool.submit(rounded, one, lanes)] = needed
                        del one
                    finish(TOGETHER_BYTES)


def layer_moments(
    run: Run, rounders: Sequence[Rounder], free: int = 0
) -> Iterator[Iterator[Hessian]]:
    """Yield groups of Hessians of the layers' inputs, together one per layer.

    The first group has diagonals only: for all layers when rounding to nearest; for GPTQ those of
    which every form is known to all ``rounders``. The other groups are those of ``HessianPlan``.
    """
    graph, names = run.exported.graph, set[str]()
    if run.recipe.quantize.rounding != "nearest":
        names = {layer.name for rounder in rounders for layer in rounder.unknown()}
    yield map(rounders[0].diagonal, (one for one in graph.layers if one.name not in names))
    if names:
        calls, settings = rounding_calls(run), run.recipe.quantize
        graph = replace(graph, layers=tuple(one for one in graph.layers if one.name in names))
        plan = HessianPlan.of(graph, calls, settings, run.talk, scratch=run.scratch(), free=free)
        yield from map(plan.hessians, range(len(plan)))


def _diagonal_moments(layer: Layer, stats: CalibrationStats) -> Array:
    """Return the second moments of each weight column's input as blocks [group * K, 1, 1]."""
    by_channel = sum(stats.activations[tensor].second_moment for tensor in layer.inputs)
    channels = np.asarray(by_channel).reshape(layer.group, -1)
    return np.repeat(channels, layer.reduction // channels.shape[1], axis=1).reshape(-1, 1, 1)
