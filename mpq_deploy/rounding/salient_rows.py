"""The order in which ``rows`` branches promote output channels, by probes or by kurtosis.

In: the candidates of the layers with a ``rows`` scheme. Out: layer name -> its output channels,
most salient first. Probes use the calls that weights are rounded on.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np

from mpq_deploy.calibrate.stats import CalibrationStats
from mpq_deploy.calls.recorded import RecordedCalls
from mpq_deploy.formats.candidates import LayerCandidates
from mpq_deploy.graph.layers import LayerGraph
from mpq_deploy.models.spec import Array
from mpq_deploy.rounding.candidate_store import StoredCandidates, with_rows
from mpq_deploy.rounding.earlier_forms import EarlierForms
from mpq_deploy.run.folder import RECIPE
from mpq_deploy.run.stage_memory import salience_worker_bytes
from mpq_deploy.run.view import Run
from mpq_deploy.system.parallel.work import Alone, Job, Result, Shard, Work, run_shards
from mpq_deploy.system.progress import Talk

# Ranking channels needs fewer timesteps and calls than measuring schemes (our choice).
SALIENCE_TIMESTEPS, SALIENCE_SAMPLES = 8, 4


def salient_first(run: Run, folder: Path, earlier: EarlierForms) -> tuple[dict[str, Array], str]:
    """Return layer -> output channels int32 [O], most salient first, and a note on the method."""
    chosen = with_rows(folder, run.exported.graph)
    if not chosen:
        return {}, ""
    known = earlier.orders(run.root, folder, run.exported.graph)
    if known is not None:
        return known, ", salient rows as another target has them"
    stats = run.calibration.stats
    method = run.recipe.quantize.salience
    saliences = _probed_salience(run, chosen) if method == "probe" else None
    if saliences is None:
        saliences = {name: _kurtosis(c, stats) for name, c in chosen.items()}
        why = ", salient rows by kurtosis" + (
            " (torch cannot evaluate this graph)" if method == "probe" else ""
        )
    else:
        why = ", salient rows by probes"
    # A stable sort: with equal saliences the order is still determined.
    return {
        name: np.argsort(-s, kind="stable").astype(np.int32) for name, s in saliences.items()
    }, why


def _kurtosis(candidates: LayerCandidates, stats: CalibrationStats) -> Array:
    from mpq_deploy.sensitivity.kurtosis import channel_kurtosis

    return channel_kurtosis(candidates.layer, candidates.weight, stats)


def _probed_salience(run: Run, chosen: StoredCandidates) -> dict[str, Array] | None:
    """Return layer name -> error of each output channel by probes; None where torch cannot."""
    if importlib.util.find_spec("torch") is None:
        return None
    from mpq_deploy.onnx_torch.torch_graph import UnsupportedOperator
    from mpq_deploy.sensitivity.exhaustive import evaluates_in_torch
    from mpq_deploy.sensitivity.salience import channel_errors

    try:
        if isinstance(run.crew, Alone):
            return channel_errors(*salience_inputs(run, chosen), run.talk)
        # Checked here so that no worker is started in vain.
        if not evaluates_in_torch(run.exported.graph):
            return None
        return salience_over_workers(run, chosen)
    except UnsupportedOperator as error:
        run.talk.warn(f"salient rows are ranked by kurtosis instead of probes: {error.message}")
        return None


def salience_inputs(
    run: Run, chosen: StoredCandidates
) -> tuple[LayerGraph, Mapping[str, Array], RecordedCalls, int]:
    """Return the first arguments of ``channel_errors``: graph, body weights, calls, samples."""
    from mpq_deploy.calls.timesteps import sampled_steps
    from mpq_deploy.sensitivity.salience import body_weights

    rounded_on, _ = run.calibration.inputs.split(run.recipe.measure.samples)
    count = len(rounded_on.timesteps)
    some = rounded_on.at(sampled_steps(count, min(SALIENCE_TIMESTEPS, count)))
    exported = run.exported
    recorded = RecordedCalls(some, exported.spec)
    return exported.graph, body_weights(chosen), recorded, SALIENCE_SAMPLES


def salience_over_workers(run: Run, chosen: StoredCandidates) -> dict[str, Array]:
    """Compute ``sensitivity.salience.channel_errors`` over workers, one shard per timestep."""
    from mpq_deploy.sensitivity.measured_calls import Calls

    folder, size = chosen.folder.relative_to(run.path), salience_worker_bytes(run)
    files = (RECIPE, "export", "calibrate", folder.as_posix())
    place = run.for_workers(partial(_open_salience, folder), *files)
    job = Job("salient channels", *place, size)
    graph, _, recorded, samples = salience_inputs(run, chosen)
    calls = Calls(graph, recorded, samples)
    steps = range(len(calls.timesteps))
    shards = [Shard(f"salient channels, timestep {step + 1}", step, calls.count) for step in steps]
    names = set(chosen)
    found = {
        layer.name: np.zeros(layer.out_channels) for layer in graph.layers if layer.name in names
    }
    with run.crew.open(job, run.talk) as pool:
        for result in run_shards(pool, "salient channels", shards, run.talk):
            for name, parts in result.items():
                for part in parts:
                    found[name] += part
    return found


def _open_salience(folder: Path, root: Path, talk: Talk) -> Work:
    """Return the worker's function: timestep -> the terms of ``ChannelErrors.at``."""
    from mpq_deploy.sensitivity.salience import ChannelErrors

    run = Run.opened(root, talk)
    inputs = salience_inputs(run, with_rows(root / folder, run.exported.graph))
    errors = ChannelErrors(*inputs, talk)

    def work(step: int, inner: Talk) -> Result:
        with inner.bar("salient channels", errors.calls) as advance:
            return errors.at(step, advance)

    return work
