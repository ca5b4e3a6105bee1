"""Recorded calls for tests: a sampler's samples as a set of calls, and back."""

from __future__ import annotations

from typing import Any

import numpy as np

from mpq_deploy.calls.recorded import CallSet
from mpq_deploy.models.spec import Array, DenoiserSpec, InputSpec


def call_set(
    samples: Any, timesteps: Any, rows: Any, spec: DenoiserSpec | None = None, **conditions: Array
) -> CallSet:
    """The calls of ``samples`` [K, N, ...]; without a spec of a model of sample and timestep."""
    spec = spec or DenoiserSpec(
        name="tiny",
        source="test",
        sample=InputSpec(name="sample", shape=np.shape(samples)[2:]),
        timestep=InputSpec(name="timestep"),
        scheduler={},
    )
    return CallSet.of_samples(spec, samples, np.asarray(timesteps), np.asarray(rows), conditions)


def samples_of(recorded: CallSet, name: str = "sample") -> Array:
    """The samples [K, N, ...] of a set; of one that ``call_set`` made those that it holds."""
    given = recorded.inputs[name]
    each = np.arange(len(np.asarray(given.values)))
    if isinstance(given.values, np.ndarray) and np.array_equal(given.index.ravel(), each):
        return given.values.reshape(*given.index.shape, *given.values.shape[1:])
    return np.asarray(given.values[given.index])
