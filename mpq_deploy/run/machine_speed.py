"""How fast this machine is on one model: a call of the float graph, a backward pass, products, rounding.

In: an exported run. Out: a ``Speed``, which the run folder keeps beside its stages, never in them:
what a clock says is not part of what must repeat byte for byte, and what is decided by it (counts of
an effort) must not change at the next call.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable
from copy import copy
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
from threadpoolctl import ThreadpoolController

from mpq_deploy.calibrate.stats import ActivationStats, CalibrationStats
from mpq_deploy.errors import InputError
from mpq_deploy.evaluate.decode import decoder_path
from mpq_deploy.formats.branches.cols import SHARES
from mpq_deploy.formats.branches.prescaled import TENTHS
from mpq_deploy.models.spec import Array, FloatModel
from mpq_deploy.onnx_torch.pass_memory import DISTINCT_SHARE, PASS_COPIES
from mpq_deploy.rounding.earlier_forms import EarlierForms
from mpq_deploy.rounding.hessian import Hessian
from mpq_deploy.rounding.rounder import Rounder
from mpq_deploy.run.stage_work import LayerWork, ModelWork, has_torch
from mpq_deploy.runtime.ort import OrtDenoiser, make_session
from mpq_deploy.sensitivity.chosen_method import AUTO
from mpq_deploy.sensitivity.measured_calls import MEMORY_BYTES
from mpq_deploy.sensitivity.methods import METHODS
from mpq_deploy.system.compute import CPU, computing_on
from mpq_deploy.system.files import sealed_json, unsealed, write_text
from mpq_deploy.system.inputs import read_text
from mpq_deploy.system.release import __version__
from mpq_deploy.system.typed import typed

if TYPE_CHECKING:
    from mpq_deploy.graph.layers import Layer
    from mpq_deploy.recipe import Recipe
    from mpq_deploy.run.view import Run

FILE = "forecast.json"
# A larger batch or the layer to round is timed where it takes about so many seconds. Calls are
# repeated, after a first that is not counted, until all of them took so many (our choice).
LONGEST, ENOUGH, WARM_CALLS = 0.5, 1.5, 3
# Multiplications in a product of matrices that is timed.
PRODUCT = 512

Clock = Callable[[], float]


@dataclass(frozen=True)
class Speed:
    """Seconds on this machine. ``rows``: of a row of the float graph, by the batch that it is in.

    ``forward`` and ``back``: of a call in torch without gradients, and of one pass back (0: not
    timed); ``opening``: of a session; ``product``: of a multiplication within products of matrices;
    ``pace``: of rounding a layer, over what ``forecast.rounding_seconds`` says; ``decoding``: of an
    image's decoder.
    """

    rows: dict[str, float]
    forward: float
    back: float
    opening: float
    product: float
    pace: float
    decoding: float = 0.0

    def row(self, batch: int) -> float:
        """Return the seconds of a row in batches of about so many."""
        nearest = min(self.rows, key=lambda known: abs(int(known) - batch))
        return self.rows[nearest]


@dataclass(frozen=True)
class _Kept:
    key: dict[str, str]
    speed: Speed


def speed_of(run: Run, model: ModelWork, rounding: Callable[[LayerWork], float]) -> Speed:
    """Return the run's speed, timed unless its folder holds it for this graph, device and version."""
    path = run.path / FILE
    key = {"export": run.digest("export"), "device": str(computing_on()), "version": __version__}
    key["torch"] = str(_wants_torch(run.recipe))
    try:
        kept = typed(_Kept, unsealed(read_text(path)))
    except (InputError, ValueError):
        kept = None
    if kept is None or kept.key != key:
        kept = _Kept(key, time_machine(run, model, rounding))
        write_text(path, sealed_json(asdict(kept)))
    return kept.speed


def _wants_torch(recipe: Recipe) -> bool:
    method = recipe.measure.method
    probed = method == AUTO or METHODS[method].probes or recipe.quantize.salience == "probe"
    return has_torch() and probed


def time_machine(
    run: Run,
    model: ModelWork,
    rounding: Callable[[LayerWork], float],
    clock: Clock = time.perf_counter,
) -> Speed:
    """Time one call of each kind. ``rounding``: what a layer should take to be rounded."""
    recipe, exported = run.recipe, run.exported
    sizes = {recipe.calibrate.batch_size, recipe.evaluate.batch_size}
    rows, opening = _time_rows(exported.model, sizes, clock)
    timed = Speed(rows, 0.0, 0.0, opening, _time_product(clock), 1.0)
    timed = replace(timed, pace=_time_rounding(run, model, rounding, clock))
    decoder = None if exported.spec.pipeline else decoder_path(exported.spec, exported.path.parent)
    if decoder is not None:
        timed = replace(timed, decoding=_time_decoder(decoder, exported.model, clock))
    if _wants_torch(recipe):
        forward, back = _time_torch(run, model, clock)
        timed = replace(timed, forward=forward, back=back)
    return timed


def example_feed(model: FloatModel, rows: int) -> dict[str, Array]:
    """Return inputs of the right shapes for ``rows`` calls; only their time is looked at."""
    random, feed = np.random.default_rng(0), {}
    for item in model.spec.inputs:
        shape = (rows, *item.shape) if item.batched else item.shape
        given = model.conditions.get(item.name)
        if given is not None and len(given):
            first = np.asarray(given[0]).reshape(item.shape)
            values = np.broadcast_to(first, shape)
        elif item.dtype.startswith("float"):
            values = random.standard_normal(shape)
        else:
            # Every table has a first row.
            values = np.zeros(shape)
        feed[item.name] = np.array(values, item.dtype)
    return feed


def _timed(what: Callable[[], Any], clock: Clock) -> float:
    """Return the seconds of a call: the median of those after the first, of as few as ``ENOUGH`` allows."""
    seconds: list[float] = []
    while len(seconds) <= WARM_CALLS and sum(seconds) < ENOUGH:
        started = clock()
        what()
        seconds.append(clock() - started)
    return median(seconds[1:] or seconds)


def _time_rows(
    model: FloatModel, sizes: Iterable[int], clock: Clock
) -> tuple[dict[str, float], float]:
    """Return the seconds of a row by batch, and of opening the session."""
    started = clock()
    denoiser = OrtDenoiser(model.path, model.spec)
    opening = clock() - started
    one = _timed(lambda: denoiser.run(example_feed(model, 1)), clock)
    rows = {"1": one}
    together = all(item.batched for item in model.spec.conditions)
    for size in sorted(sizes) if together else ():
        if size > 1 and one * size <= 4 * LONGEST:
            feed = example_feed(model, size)
            rows[str(size)] = _timed(partial(denoiser.run, feed), clock) / size
    return rows, opening


def _time_product(clock: Clock) -> float:
    """Return the seconds of a multiplication in a product of matrices, as NumPy computes it."""
    matrix = np.ones((PRODUCT, PRODUCT), np.float32)
    return _timed(lambda: matrix @ matrix, clock) / PRODUCT**3


def _time_decoder(path: Path, model: FloatModel, clock: Clock) -> float:
    session = make_session(path)
    sample = example_feed(model, 1)[model.spec.sample.name]
    name = session.get_inputs()[0].name
    return _timed(lambda: session.run(None, {name: sample.astype(np.float32)}), clock)


def _time_rounding(
    run: Run, model: ModelWork, rounding: Callable[[LayerWork], float], clock: Clock
) -> float:
    """Round the largest layer of those that take less than ``LONGEST``, on made-up inputs.

    Returns what it takes over what ``rounding`` says.
    """
    exported, layers = run.exported, run.exported.graph.layers
    costs = [rounding(layer) for layer in model.layers]
    short = [number for number, cost in enumerate(costs) if cost <= LONGEST]
    chosen = max(short, key=costs.__getitem__, default=int(np.argmin(costs)))
    layer, alone = layers[chosen], copy(exported)
    alone.graph = replace(exported.graph, layers=(layer,))
    stats, blas = CalibrationStats(_made_up_stats(layer)), ThreadpoolController()
    read = alone, run.recipe, run.target, stats, {layer.name: 0}, blas
    rounder = Rounder(*read, run.talk, run.root, EarlierForms())
    moments = rounder.diagonal(layer)
    if run.recipe.quantize.rounding != "nearest":
        moments = _made_up_moments(layer)
    with tempfile.TemporaryDirectory() as folder:
        # Loops are compiled in the first call, which may take longer than ENOUGH.
        rounder.into(Path(folder), moments)
        taken = _timed(lambda: rounder.into(Path(folder), moments), clock)
    return taken / costs[chosen]


def _made_up_moments(layer: Layer) -> Hessian:
    """Return moments of a layer's inputs that are correlated as real ones are."""
    width = layer.reduction
    rows = np.random.default_rng(0).standard_normal((64, width), np.float32)
    block = rows.T @ rows / 64
    block[np.diag_indices(width)] += 0.1
    return Hessian(layer, np.tile(block, (layer.group, 1, 1)), (width,), 64)


def _made_up_stats(layer: Layer) -> dict[str, ActivationStats]:
    """Return statistics of the activations that ``layer`` reads, which nobody has seen, by tensor."""
    channels = layer.weight_shape[1] * layer.group if layer.op == "Conv" else layer.reduction
    one, ratios = np.ones(channels), np.linspace(0.5, 2, channels)
    made_up = ActivationStats(
        amax=one,
        second_moment=one,
        fourth_moment=one,
        reservoir=np.ones(64, np.float32),
        amax_by_timestep=np.ones((1, channels), np.float32),
        scale=0.01,
        outliers=np.arange(channels, dtype=np.int32),
        scales_without=np.full(len(SHARES), 0.01),
        factors=np.array([ratios**share for share in range(len(TENTHS))], np.float16),
        scales_rescaled=np.full(len(TENTHS), 0.01),
        count=float(channels),
        timesteps=np.zeros(1, np.float32),
        exponents=np.arange(len(TENTHS), dtype=np.int32),
    )
    return dict.fromkeys(layer.inputs, made_up)


def _time_torch(run: Run, model: ModelWork, clock: Clock) -> tuple[float, float]:
    """Return the seconds of a call in torch, and of one pass back through it; zeros where torch cannot."""
    import torch

    from mpq_deploy.onnx_torch.adjoint import gradient_bytes, layer_gradients, parts_within
    from mpq_deploy.onnx_torch.torch_graph import TorchGraph, UnsupportedOperator

    exported = run.exported
    try:
        graph = TorchGraph(exported.graph.model)
    except UnsupportedOperator:
        return 0.0, 0.0
    uses = [use for layer in exported.graph.layers for use in layer.uses]

    def finished(_: object = None) -> None:
        # A GPU answers before it has computed.
        if graph.device.type != CPU:
            torch.cuda.synchronize(graph.device)

    with torch.no_grad():
        one = graph.feed(example_feed(exported.model, 1))
        single = _timed(lambda: finished(graph.run(one)), clock)
        footprint, _ = graph.footprint(one, lambda *_: None)
    gradients = gradient_bytes(footprint, uses, run.recipe.measure.directions, range(len(uses)))
    parts = parts_within(footprint, gradients, MEMORY_BYTES)
    batch = probe_batch(run.recipe, model) if 3 * single <= LONGEST and len(parts) == 1 else 1
    feeds = graph.feed(example_feed(exported.model, batch))

    def back() -> None:
        wanted = {exported.spec.output: lambda value: [torch.ones_like(value)]}
        for _ in layer_gradients(graph, feeds, parts, uses, wanted, range(len(uses))):
            pass
        finished()

    with torch.no_grad():
        forward = (
            single if batch == 1 else _timed(lambda: finished(graph.run(feeds)), clock) / batch
        )
    # Parts are run twice, but for the last.
    forward *= 1 if len(parts) == 1 else 2
    return forward, max(_timed(back, clock) / batch - forward, forward / 2)


def probe_batch(recipe: Recipe, model: ModelWork) -> int:
    """Return how many calls are probed at once, as the probes choose it."""
    if not all(item.batched for item in model.spec.conditions):
        return 1
    gradients = 2 * recipe.measure.directions * model.size.outputs
    most = MEMORY_BYTES // max(int(PASS_COPIES * DISTINCT_SHARE * model.size.values) + gradients, 1)
    return max(1, min(recipe.measure.batch_size, recipe.measure.calls, most))
