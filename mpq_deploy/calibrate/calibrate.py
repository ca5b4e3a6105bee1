"""Calibrate: record calls of the float model, observe its activations, choose INT8 scales."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from mpq_deploy.calibrate.kept_observation import KeptObservation, observe_parts
from mpq_deploy.calibrate.observers import Observation, observe
from mpq_deploy.calibrate.scales import SMALLEST_SCALE, activation_scale
from mpq_deploy.calibrate.shifted_inputs import (
    shiftable_inputs,
    shifts_within_fp16,
    with_shifts,
)
from mpq_deploy.calibrate.spread_calibration import (
    CalibrationSetup,
    KeptCalls,
    ObservingInShards,
    calibration_job,
    kept_observed,
    kept_samples,
    record_in_shards,
    recorded_after,
    with_kept_timesteps,
)
from mpq_deploy.calibrate.stats import ActivationStats, CalibrationStats
from mpq_deploy.calls.recorded import CallSet, RecordedCalls, joined
from mpq_deploy.calls.recorder import with_strata
from mpq_deploy.calls.script_calls import ScriptCalls, check_recorded_model
from mpq_deploy.calls.timesteps import KEPT_TIMESTEPS
from mpq_deploy.calls.trajectories import cycled, record_trajectories
from mpq_deploy.formats.branches.cols import SHARES
from mpq_deploy.formats.branches.prescaled import TENTHS, exponent_order, scale_factors
from mpq_deploy.formats.sizes import outlier_count
from mpq_deploy.graph.layers import LayerGraph
from mpq_deploy.graph.writers.quantize_layers import weight_array
from mpq_deploy.models.spec import Array
from mpq_deploy.recipe import CalibrateSettings
from mpq_deploy.runtime.not_finite import CheckedDenoiser
from mpq_deploy.runtime.ort import OrtDenoiser
from mpq_deploy.system.lanes import in_lanes, lanes_for
from mpq_deploy.system.mapped import drop_pages
from mpq_deploy.system.parallel.work import Alone, Crew
from mpq_deploy.system.progress import Talk


def calibrate(
    setup: CalibrationSetup,
    graph: LayerGraph,
    talk: Talk,
    *,
    scratch: Path | None = None,
    crew: Crew | None = None,
    kept: KeptCalls | None = None,
) -> tuple[CallSet, CalibrationStats, KeptObservation | None]:
    """Return the recorded calls, the statistics of every activation that a layer reads, and the
    observation that a later calibration on more calls can continue from.

    Calls are recorded at more timesteps than ``settings.timesteps`` where those are few
    (``kept_timesteps``). ``graph``: the layers of the setup's model. ``scratch``: an existing
    folder, best on the disk of the weights, for a temporary graph file (None: the system's).
    ``crew``: the workers (None: this process). ``kept``: an earlier calibration's calls and
    observation. Raises UsageError for more timesteps than steps, ModelError for an activation that
    is not finite.
    """
    settings, before = setup.settings, kept_observed(kept, setup)
    graph = replace(graph, watched=setup.watched)
    alone = crew is None or isinstance(crew, Alone)
    spec = setup.source.spec
    if spec.pipeline is not None or spec.recorded or spec.sizes or alone:
        recorded = _recorded(setup, talk, scratch, kept)
        order, calls = _order(recorded, settings), setup.calls(recorded.used(settings.timesteps))
        seen, known = observe_parts(
            order,
            before,
            lambda part: observe(graph, calls, settings, talk, scratch=scratch, chosen=part),
        )
    else:
        assert crew is not None
        wide = with_kept_timesteps(setup)
        with crew.open(calibration_job(wide, scratch), talk) as pool:
            recorded = record_in_shards(pool, wide, talk, kept)
            order = _order(recorded, settings)
            calls = setup.calls(recorded.used(settings.timesteps))
            shards = ObservingInShards(pool, graph, calls, settings, talk, scratch)
            seen, known = observe_parts(order, before, shards.observe)
    timesteps = timestep_values(setup.calls(calls.recorded.take(order)))
    shiftable = shiftable_inputs(graph) if settings.shifts else ()
    stats = summarise(seen, weight_ranges(graph), settings, timesteps, shiftable)
    return recorded, shifts_within_fp16(stats, graph), known


def _recorded(
    setup: CalibrationSetup, talk: Talk, scratch: Path | None, kept: KeptCalls | None
) -> CallSet:
    """Record the calls of a script, of our sampler, or of the model's pipeline.

    Of a pipeline each of the user's calls is recorded equally often, as far as possible.
    """
    from mpq_deploy.calls.record_pipeline import Runs, record_pipeline

    source, settings = setup.source, setup.settings
    if source.calls is not None:
        calls = ScriptCalls.open(source.calls).parts(settings.timesteps)[0].only(source.spec)
        check_recorded_model(OrtDenoiser(source.path, source.spec).run, calls, source)
        return calls.take(np.arange(min(settings.samples, calls.count)))
    if source.spec.pipeline is None:
        wide = with_kept_timesteps(setup)
        return recorded_after(
            kept,
            wide,
            lambda part: record_trajectories(
                wide.denoiser(source.path), wide.make_sampler(), wide.settings, talk, part
            ),
        )
    # ``pipeline.calls`` lists each call once per image size.
    sizes = len(source.spec.sizes) or 1
    calls_of_one = np.arange(len(source.spec.pipeline.calls) // sizes)
    dealt_out = cycled(calls_of_one, settings.samples, settings.seed)
    numbers = (sizes * dealt_out + np.arange(settings.samples) % sizes).tolist()
    timesteps = max(settings.timesteps, KEPT_TIMESTEPS)
    first = kept_samples(kept, setup)
    parts = [kept.calls] if kept is not None and first else []
    if first < settings.samples:
        folder = Path(tempfile.mkdtemp(dir=scratch, prefix="calls-"))
        denoiser = OrtDenoiser.in_lanes(source.path, source.spec)
        compute = CheckedDenoiser(source.path, denoiser).run
        runs = Runs(numbers[first:], settings.steps, settings.seed, first)
        made = record_pipeline(source, runs, timesteps, folder, talk, compute, lanes=denoiser.lanes)
        parts.append(made.calls)
    recorded = with_strata(joined(parts), [item.name for item in source.spec.conditions])
    if len(recorded.timesteps) < settings.timesteps:
        talk.line(f"  the pipeline takes {len(recorded.timesteps)} steps: all are recorded")
    return recorded


def _order(recorded: CallSet, settings: CalibrateSettings) -> Array:
    """Return the indices of the calls to observe, int64, all conditions about equally often."""
    return recorded.dealt(np.arange(recorded.count))[: settings.observed]


def timestep_values(calls: RecordedCalls) -> Array:
    """Return the timestep input's value at each recorded timestep, float32 [K]; empty without one.

    Where the calls of one timestep have several values: the largest, as for ranges by timestep.
    """
    name, steps = calls.spec.timestep_name, range(len(calls.recorded.timesteps))
    if not name:
        return np.empty(0, np.float32)
    given = [calls.recorded.values(name, step, slice(None)) for step in steps]
    return np.array([values.max() for values in given], np.float32)


def weight_ranges(graph: LayerGraph) -> dict[str, Array]:
    """Return the largest weight magnitude per channel of an activation: tensor -> float64 [C].

    The maximum is over all layers that read the tensor, so that they can share one factor. Left out
    are grouped convolutions, and MatMul or Gemm that read a tensor which a Conv reads, too: their
    channels are on another axis.
    """
    ranges: dict[str, Array] = {}
    convolved = {tensor for layer in graph.layers if layer.op == "Conv" for tensor in layer.inputs}
    for layer in graph.layers:
        if layer.group > 1 or (layer.op != "Conv" and convolved.intersection(layer.inputs)):
            continue
        axis = 1 - layer.out_axis
        weight = np.abs(weight_array(graph.model, layer))
        largest = weight.max(axis=tuple(a for a in range(weight.ndim) if a != axis)).astype(
            np.float64
        )
        drop_pages(graph.model.graph.initializers[layer.weight].const_value)
        for tensor in layer.inputs:
            ranges[tensor] = np.maximum(ranges[tensor], largest) if tensor in ranges else largest
    return ranges


def summarise(
    seen: Observation,
    weights: Mapping[str, Array],
    settings: CalibrateSettings,
    timesteps: Array,
    shiftable: Collection[str] = (),
) -> CalibrationStats:
    """Turn sums into moments and choose each tensor's INT8 scale over all timesteps and samples.

    ``weights``: from ``weight_ranges``; ``timesteps``: from ``timestep_values``; ``shiftable``: the
    tensors whose channels may be shifted.
    """

    def summary(number: int) -> ActivationStats:
        name, place = seen.names[number], slice(seen.offsets[number], seen.offsets[number + 1])
        amax, count = seen.amax[place], seen.counts[number]
        values = seen.values[number]
        scale = activation_scale(
            settings.scale, values, float(amax.max()), count * len(amax), settings.percentile
        )
        # Rank channels by how much they stretch the range, rarely (amax) or often (fourth moment).
        stretch = amax * np.sqrt(np.sqrt(seen.fourth_sum[place] / count))
        outliers = np.argsort(-stretch, kind="stable").astype(np.int32)
        rests = [outliers[outlier_count(len(amax), share) :] for share in SHARES]
        # Tensors that only grouped convolutions read have no weight ranges: amax replaces them.
        ranges, by_timestep = weights.get(name, amax), seen.amax_by_timestep[:, place]
        factors = np.array([scale_factors(ranges, amax, tenths / 10) for tenths in TENTHS])
        stats = ActivationStats(
            amax,
            seen.square_sum[place] / count,
            seen.fourth_sum[place] / count,
            np.asarray(values, np.float32),
            by_timestep,
            scale,
            outliers,
            np.array([_scale_of(rest, seen, number, settings) for rest in rests]),
            factors,
            np.array(
                [_rescaled_scale(row.astype(np.float64), seen, number, settings) for row in factors]
            ),
            float(count * len(amax)),
            timesteps,
            exponent_order(ranges, by_timestep, factors),
        )
        return with_shifts(stats, seen, number, settings) if name in shiftable else stats

    made = in_lanes(summary, range(len(seen.names)), lanes_for(0).count)
    return CalibrationStats(dict(zip(seen.names, made, strict=True)))


def _rescaled_scale(
    factors: Array, seen: Observation, number: int, settings: CalibrateSettings
) -> float:
    """Choose the INT8 scale of activation ``number`` with its channels times ``factors`` [C]."""
    amax = seen.amax[seen.offsets[number] : seen.offsets[number + 1]] * factors
    sample = seen.values[number] * factors[seen.channels[number]]
    count = seen.counts[number] * len(factors)
    return activation_scale(settings.scale, sample, float(amax.max()), count, settings.percentile)


def _scale_of(
    channels: Array, seen: Observation, number: int, settings: CalibrateSettings
) -> float:
    """Choose the INT8 scale of only ``channels`` of activation ``number``; the smallest if none."""
    if not len(channels):
        return SMALLEST_SCALE
    amax = seen.amax[seen.offsets[number] : seen.offsets[number + 1]][channels]
    sample = seen.values[number][np.isin(seen.channels[number], channels)]
    count = seen.counts[number] * len(channels)
    return activation_scale(settings.scale, sample, float(amax.max()), count, settings.percentile)
