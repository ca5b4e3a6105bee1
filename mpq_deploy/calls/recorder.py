"""Record calls as they come: each input row by row, equal rows once, to a folder.

In: every call's inputs by name with the run and step that it belongs to. Out: the columns and rows
that ``recorded_grid`` makes a set of K timesteps by N calls of.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from mpq_deploy.calls.recorded import (
    INDEX,
    OUTPUT_MEAN,
    OUTPUT_RMS,
    SIZE,
    STEP,
    TIMESTEP,
    CallSet,
    InputCalls,
)
from mpq_deploy.calls.shards import DIGEST_BYTES, ShardWriter, read_shards
from mpq_deploy.calls.timesteps import sampled_steps
from mpq_deploy.errors import InputError, UsageError
from mpq_deploy.models.spec import Array

RUN, PLACE = "run", "place"


@dataclass
class CallRecorder:
    """Writes calls into ``folder``; ``close`` finishes it.

    One call of a batch of M is M calls of one sample. Memory holds a digest per row, and no rows.
    """

    folder: Path
    _columns: dict[str, list[Any]] = field(default_factory=dict)
    _known: dict[tuple[str, bytes], int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._writer = ShardWriter(self.folder)

    def add(
        self,
        run: int,
        step: int,
        timestep: float,
        feeds: Mapping[str, Array],
        output: Array | None = None,
        size: int | None = None,
    ) -> None:
        """Record a call at ``step`` of a ``run``: ``feeds`` [M, ...] by input name.

        ``output``: what the float model answered, [M, ...]; its statistics are kept. ``size``: its
        number, of a model of several.
        """
        count = min(len(values) for values in feeds.values())
        means, sizes = output_statistics(output, count)
        for place in range(count):
            for name, value in (
                (RUN, run),
                (STEP, step),
                (TIMESTEP, timestep),
                (PLACE, place),
                (OUTPUT_MEAN, means[place]),
                (OUTPUT_RMS, sizes[place]),
            ):
                self._columns.setdefault(name, []).append(value)
            if size is not None:
                self._columns.setdefault(SIZE, []).append(size)
            for name, values in feeds.items():
                self._columns.setdefault(f"{INDEX}{name}", []).append(
                    self._row(name, values[place])
                )

    def set_timestep(self, run: int, step: int, timestep: float) -> None:
        """Say what the sampler calls the timestep of the calls just recorded at ``step``."""
        for at in range(len(self._columns.get(STEP, ())) - 1, -1, -1):
            if (self._columns[RUN][at], self._columns[STEP][at]) != (run, step):
                break
            self._columns[TIMESTEP][at] = timestep

    def regroup(self, places: Sequence[tuple[int, int]]) -> None:
        """Say run and step of each call, in their order, where only the end tells them."""
        calls = self._columns.get(STEP, [])
        self._columns[RUN], self._columns[STEP] = (
            [places[call][part] for call in calls] for part in (0, 1)
        )

    def close(self) -> None:
        """Write the rest and the index. Raises UsageError where nothing was recorded."""
        if not self._columns.get(STEP):
            raise UsageError(
                f"Nothing was recorded into {self.folder}: the model was never called.",
                "Call the model inside the 'with' block.",
            )
        lengths = {len(values) for values in self._columns.values()}
        if len(lengths) != 1:
            raise UsageError(
                f"The calls recorded into {self.folder} do not all have the same inputs: "
                f"{', '.join(n.removeprefix(INDEX) for n in self._columns if n.startswith(INDEX))}.",
                "Record only calls with the same inputs.",
            )
        self._writer.finish({name: np.asarray(values) for name, values in self._columns.items()})

    def _row(self, name: str, row: Array) -> int:
        key = (name, blake2b(np.ascontiguousarray(row).data, digest_size=DIGEST_BYTES).digest())
        if key not in self._known:
            self._known[key] = self._writer.add(name, np.array(row))
        return self._known[key]


def output_statistics(output: Array | None, count: int) -> tuple[Array, Array]:
    """Return mean and root mean square of each of ``count`` samples' output, float64 [count].

    NaN where there is no output, or none with a row for each sample.
    """
    if output is None or len(output) != count or output.dtype.kind != "f":
        return np.full(count, np.nan), np.full(count, np.nan)
    flat = output.reshape(count, -1).astype(np.float64)
    return flat.mean(axis=1), np.sqrt(np.square(flat).mean(axis=1))


def recorded_grid(
    folder: Path,
    timesteps: int | None,
    conditions: Sequence[str],
    runs: Iterable[int] | None = None,
) -> CallSet:
    """Return the calls of ``timesteps`` steps, spread evenly over each run's, side by side.

    All steps of the shortest run where it has no more.

    ``conditions``: the inputs that say what a call is conditioned on; ``runs``: these alone. Where
    a run has more calls at one step than at another (guidance that begins late), as many as at
    every step are taken. Raises InputError for a folder that holds no recorded calls.
    """
    columns, rows = read_shards(folder)
    if missing := {RUN, STEP, TIMESTEP, PLACE, OUTPUT_MEAN, OUTPUT_RMS} - set(columns):
        raise InputError(f"{folder} holds no recorded calls: no '{min(missing)}'.", "Record again.")
    every = [
        _by_step(columns, int(run)) for run in (np.unique(columns[RUN]) if runs is None else runs)
    ]
    shortest = min(map(len, every))
    timesteps = shortest if timesteps is None else min(timesteps, shortest)
    chosen: list[Array] = []
    for steps in every:
        at = [steps[place] for place in sampled_steps(len(steps), timesteps)]
        count = min(map(len, at))
        chosen.append(np.stack([one[np.arange(count) * len(one) // count] for one in at]))
    calls = np.concatenate(chosen, axis=1)
    index = {name: columns[f"{INDEX}{name}"][calls].astype(np.int64) for name in rows}
    inputs = {name: InputCalls(values, index[name]) for name, values in rows.items()}
    found = CallSet(
        columns[TIMESTEP][calls].mean(axis=1).astype(np.float32),
        np.zeros(calls.shape[1], np.int64),
        inputs,
        {name: columns[name][calls] for name in (OUTPUT_MEAN, OUTPUT_RMS, SIZE) if name in columns},
    )
    return with_strata(found, conditions)


def _by_step(columns: Mapping[str, Array], run: int) -> list[Array]:
    """Return the calls of each step of a run, in their order."""
    here = np.flatnonzero(columns[RUN] == run)
    return [here[columns[STEP][here] == step] for step in np.unique(columns[STEP][here])]


def with_strata(calls: CallSet, conditions: Sequence[str]) -> CallSet:
    """Return ``calls`` with equal ``rows`` for equal ``conditions``, numbered in the order of the calls."""
    known: dict[bytes, int] = {}
    rows = []
    for call in range(calls.count):
        digest = blake2b(digest_size=DIGEST_BYTES)
        for name in conditions:
            if name in calls.inputs:
                digest.update(calls.values(name, 0, call).tobytes())
        rows.append(known.setdefault(digest.digest(), len(known)))
    return replace(calls, rows=np.array(rows, np.int64))
