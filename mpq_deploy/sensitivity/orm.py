"""MPQ-Diff's metric: more bits for layers whose outputs are unlike others' (arXiv 2412.00144).

Gram matrices of the layers' outputs are observed while the float graph runs. ``orthogonality``
computes importances from them, and ``bit_losses`` makes losses of these.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from mpq_deploy.calibrate.activation_shapes import activation_shapes
from mpq_deploy.calibrate.gram import GramGraph
from mpq_deploy.calls.recorded import RecordedCalls
from mpq_deploy.calls.timesteps import adaptive_steps, sampled_steps
from mpq_deploy.errors import UsageError
from mpq_deploy.graph.layers import Layer, LayerGraph
from mpq_deploy.models.spec import Array
from mpq_deploy.recipe import MeasureSettings
from mpq_deploy.sensitivity.bit_losses import table_from_importance
from mpq_deploy.sensitivity.measured_calls import Calls
from mpq_deploy.sensitivity.orthogonality import (
    ENOUGH_CALLS,
    MIN_CALLS,
    dependence,
    gamma,
    importances,
    orthogonality,
)
from mpq_deploy.sensitivity.subject import Subject
from mpq_deploy.sensitivity.table import SensitivityTable
from mpq_deploy.system.progress import Talk
from mpq_deploy.system.sessions import open_session


def measure_orm(subject: Subject) -> SensitivityTable:
    """Return the table of the ORM importances, from Gram matrices of ``batch_size`` calls.

    With more calls than that, HSIC is averaged over several batches (Nguyen et al. 2021). Raises
    UsageError when the model or the settings leave too few calls for one Gram matrix.
    """
    settings, layers = subject.settings.orm, subject.layers
    seen = observe_orthogonality(
        subject.graph, layers, subject.recorded, subject.settings, subject.talk
    )
    orm = orthogonality(seen.hsic)
    notes = []
    if seen.calls < ENOUGH_CALLS:
        notes.append(
            f"ORM compares only {seen.calls} calls at a time: below {ENOUGH_CALLS} it says little (the biased "
            "estimator is large for unrelated layers, the debiased one noisy); raise measure.batch_size and "
            "measure.samples"
        )
        subject.talk.warn(notes[0])
    always = int(seen.constant.all(axis=0).sum())
    if always:
        notes.append(
            f"{always} of {len(layers)} layers give the same output for every call at a timestep (the timestep's "
            "embedding and the like): their ORM with every other layer is taken as 0 (our choice)"
        )
    theta = importances(gamma(orm), settings.beta, settings.importance)
    table = table_from_importance("orm", subject, theta, tuple(notes))
    assert table.importance is not None
    importance = replace(table.importance, constant=seen.constant, calls=seen.calls, orm=orm)
    return replace(table, importance=importance)


@dataclass(frozen=True)
class SeenOrthogonality:
    """What the Gram observers saw at K timesteps of L layers.

    ``hsic`` float64 [K, L, L]: sums over batches. ``constant`` bool [K, L]: the layer's output was
    the same for all calls. ``calls``: the size of the smallest batch.
    """

    hsic: Array
    constant: Array
    calls: int


def observe_orthogonality(
    graph: LayerGraph,
    layers: tuple[Layer, ...],
    recorded: RecordedCalls,
    settings: MeasureSettings,
    talk: Talk,
) -> SeenOrthogonality:
    """Run all measured calls through the graph with Gram observers and sum HSIC over batches."""
    calls = Calls(graph, recorded, settings.calls)
    parts = _batches(calls, settings)
    names = tuple(dict.fromkeys(use.output for layer in layers for use in layer.uses))
    shapes = activation_shapes(graph, recorded, talk, names=names)
    observed = GramGraph.of(graph, layers, shapes)
    steps = len(calls.timesteps)
    hsic = np.zeros((steps, len(layers), len(layers)))
    constant = np.ones((steps, len(layers)), bool)
    with (
        open_session(observed.model, talk) as session,
        talk.bar("orthogonality", steps * calls.count) as advance,
    ):
        for step in range(steps):
            for part in parts:
                count = part.stop - part.start
                grams = observed.grams(
                    session, calls.feeds(step, part), count, float(calls.timesteps[step])
                )
                hsic[step] += dependence(grams, settings.orm.estimator)
                constant[step] &= ~grams.any(axis=(1, 2))
                advance(count)
    return SeenOrthogonality(hsic, constant, min(part.stop - part.start for part in parts))


def adapted_steps(
    graph: LayerGraph,
    recorded: RecordedCalls,
    settings: MeasureSettings,
    talk: Talk,
    count: int,
    coarse: int,
) -> Array:
    """Choose ``count`` timesteps, denser where the importances change faster.

    The importances come from a first pass at ``coarse`` timesteps.
    """
    available = len(recorded.recorded.timesteps)
    first = sampled_steps(available, coarse)
    chosen = replace(recorded, recorded=recorded.recorded.at(first))
    seen = observe_orthogonality(graph, graph.layers, chosen, settings, talk)
    curve = importances(gamma(orthogonality(seen.hsic)), settings.orm.beta, settings.orm.importance)
    return adaptive_steps(curve, first, available, count)


def _batches(calls: Calls, settings: MeasureSettings) -> list[slice]:
    """Split the calls into batches of nearly equal size, each of at most the batch size.

    Raises UsageError when the smallest batch has too few calls for the estimator.
    """
    minimum = MIN_CALLS[settings.orm.estimator]
    size = calls.fixed_batch or min(settings.batch_size, calls.count)
    # 20 calls in batches of 16 are two batches of 10: a rest of 4 would give the debiased estimator
    # mostly noise.
    bounds = np.linspace(0, calls.count, -(-calls.count // size) + 1).astype(int)
    parts = [slice(int(a), int(b)) for a, b in pairwise(bounds)]
    fewest = min(part.stop - part.start for part in parts)
    if fewest < minimum:
        fixed = (
            f"the model takes {calls.fixed_batch} at once"
            if calls.fixed_batch
            else f"{calls.count} are measured"
        )
        raise UsageError(
            f"ORM compares calls that run together: the {settings.orm.estimator} estimator needs {minimum}, "
            f"here are {fewest} ({fixed}, measure.batch_size is {settings.batch_size}).",
            "Export the model with a free batch axis, or take another sensitivity."
            if calls.fixed_batch
            else f"Raise measure.samples and measure.batch_size to {ENOUGH_CALLS} or more.",
        )
    return parts
