"""Recorded calls of a model: every input at K timesteps of N calls; split, saved, and fed again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mpq_deploy.calls.shards import ShardRows, ShardWriter, read_shards
from mpq_deploy.calls.timesteps import sampled_steps
from mpq_deploy.errors import InputError, ModelError
from mpq_deploy.models.spec import Array, DenoiserSpec, cut_to, fill_to

SPLIT_SEED = 3
# Columns of the index beside ``index.NAME``.
STEP, TIMESTEP, ROW = "step", "timestep", "row"
INDEX, VALUES = "index.", "values."
# Of the float model's output for each call, where it was seen when the call was recorded.
OUTPUT_MEAN, OUTPUT_RMS = "output.mean", "output.rms"
# The number of each call's size, of a model of several.
SIZE = "size"


class Rows(Protocol):
    """Rows of one input: an array in memory, or files that rows are read from."""

    @property
    def shape(self) -> tuple[int, ...]:
        """[U, *shape of one call]."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """The rows' type."""

    def __getitem__(self, rows: Any) -> Array:
        """Return the given rows."""


@dataclass(frozen=True)
class InputCalls:
    """What one input was given: ``values`` [U, ...], each once, and ``index`` int64 [K, N]."""

    values: Rows
    index: Array

    def compact(self) -> InputCalls:
        """Return the same with only the rows that are used, in memory."""
        used, index = np.unique(self.index, return_inverse=True)
        return InputCalls(np.asarray(self.values[used]), index.reshape(self.index.shape))


@dataclass(frozen=True)
class CallSet:
    """Calls of the float model: at K timesteps N calls, each the inputs of one sample.

    ``timesteps`` float32 [K] as the sampler counts them, for reports; ``rows`` int64 [N]: what a
    call is conditioned on, equal for equal conditions; ``inputs``: what the model is given, by
    name, in the types that it takes; ``outputs``: mean and root mean square of the float model's
    output, float64 [K, N] by column name, NaN or empty where it was not seen. Of a model of several
    sizes a call's ``SIZE`` is a column there too, and rows are filled up with zeros to one shape.
    """

    timesteps: Array
    rows: Array
    inputs: Mapping[str, InputCalls]
    outputs: Mapping[str, Array] = field(default_factory=dict)

    @classmethod
    def of_samples(
        cls,
        spec: DenoiserSpec,
        samples: Array,
        timesteps: Array,
        rows: Array,
        conditions: Mapping[str, Array],
    ) -> CallSet:
        """Return the calls of a sampler: ``samples`` [K, N, ...], ``rows`` [N] of ``conditions``.

        Raises ModelError for a condition without rows.
        """
        steps, calls = samples.shape[:2]
        each = np.arange(steps * calls).reshape(steps, calls)
        flat = samples.reshape(-1, *samples.shape[2:])
        inputs = {spec.sample.name: InputCalls(flat.astype(spec.sample.dtype, copy=False), each)}
        if (timestep := spec.timestep) is not None:
            values = np.asarray(timesteps).astype(timestep.dtype).reshape(steps, *timestep.shape)
            inputs[timestep.name] = InputCalls(
                values, np.repeat(np.arange(steps)[:, None], calls, 1)
            )
        used, index = np.unique(rows, return_inverse=True)
        for item in spec.conditions:
            if item.name not in conditions:
                raise ModelError(
                    f"No rows were given for the denoiser's condition '{item.name}'.",
                    "Give it with --conditions FILE.npz, one row per condition.",
                )
            taken = np.asarray(conditions[item.name])[used].astype(item.dtype, copy=False)
            inputs[item.name] = InputCalls(taken, np.tile(index, (steps, 1)))
        return cls(np.asarray(timesteps, np.float32), np.asarray(rows, np.int64), inputs)

    @property
    def count(self) -> int:
        """Calls at each timestep."""
        return len(self.rows)

    @property
    def sizes(self) -> Array | None:
        """The number of each call's size, [K, N]; None where there is one size."""
        return self.outputs.get(SIZE)

    def of_one_size(self, at: int, calls: Array) -> list[Array]:
        """Split ``calls`` of a timestep by their size: int64, in the order of the sizes."""
        if self.sizes is None:
            return [calls]
        sizes = self.sizes[at, calls]
        return [calls[sizes == size] for size in np.unique(sizes)]

    def one_of_each(self) -> Array:
        """Return the first call of each size, int64."""
        return np.array([some[0] for some in self.of_one_size(0, np.arange(self.count))])

    def largest(self, spec: DenoiserSpec) -> int:
        """Return the number of the largest size that has calls; 0 where there is one size."""
        sizes = self.sizes
        if sizes is None:
            return 0
        return next(size for size in spec.largest_first if (sizes[0] == size).any())

    def dealt(self, order: Array) -> Array:
        """Return ``order`` dealt out by conditions, and then by sizes (``dealt``)."""
        found = dealt(self.rows, order)
        return found if self.sizes is None else dealt(self.sizes[0], found)

    def filled_up(self, spec: DenoiserSpec, size: int) -> CallSet:
        """Return calls of one size as those of the model ``spec`` of several."""
        inputs = {}
        for item in spec.inputs:
            given = self.inputs[item.name]
            if item.sizes:
                given = replace(given, values=fill_to(np.asarray(given.values), item.shape))
            inputs[item.name] = given
        column = np.full((len(self.timesteps), self.count), size)
        return replace(self, inputs=inputs, outputs={**self.outputs, SIZE: column})

    def at_size(self, spec: DenoiserSpec, size: int) -> CallSet:
        """Return the calls of one size as those of ``spec.at_size(size)``, in memory."""
        assert self.sizes is not None
        some = self.take(np.flatnonzero(self.sizes[0] == size)).compact()
        inputs = dict(some.inputs)
        for item in spec.inputs:
            if item.sizes:
                given = inputs[item.name]
                values = cut_to(np.asarray(given.values), item.sizes[size])
                inputs[item.name] = replace(given, values=values)
        outputs = {name: values for name, values in some.outputs.items() if name != SIZE}
        return replace(some, inputs=inputs, outputs=outputs)

    def take(self, calls: Array) -> CallSet:
        """Return the set with only the given calls, int64 [M], at every timestep."""
        return self._indexed(self.timesteps, self.rows[calls], (slice(None), calls))

    def at(self, steps: Array) -> CallSet:
        """Return the set at only the given positions of its timesteps, int64 [M]."""
        return self._indexed(self.timesteps[steps], self.rows, steps)

    def used(self, timesteps: int) -> CallSet:
        """Return the set at ``timesteps`` of those that were recorded, evenly spread."""
        count = len(self.timesteps)
        return self if timesteps >= count else self.at(sampled_steps(count, timesteps))

    def turns(self, chosen: Array) -> CallSet:
        """Return the set with other calls at each timestep: positions ``chosen``, int64 [K, M]."""
        place = (np.arange(len(self.timesteps))[:, None], chosen)
        return self._indexed(self.timesteps, self.rows[chosen[0]], place)

    def _indexed(self, timesteps: Array, rows: Array, place: Any) -> CallSet:
        inputs = {
            name: replace(given, index=given.index[place]) for name, given in self.inputs.items()
        }
        outputs = {name: values[place] for name, values in self.outputs.items()}
        return CallSet(timesteps, rows, inputs, outputs)

    def arrays(self) -> dict[str, Array]:
        """Return the set as arrays by name, only with what it uses: what a shard gives back."""
        arrays = {"timesteps": self.timesteps, "rows": self.rows, **self.outputs}
        for name, given in self.compact().inputs.items():
            arrays |= {f"{VALUES}{name}": np.asarray(given.values), f"{INDEX}{name}": given.index}
        return arrays

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, Array]) -> CallSet:
        """Return what ``arrays`` gave."""
        inputs = {
            name.removeprefix(INDEX): InputCalls(
                arrays[f"{VALUES}{name.removeprefix(INDEX)}"], index
            )
            for name, index in arrays.items()
            if name.startswith(INDEX)
        }
        return cls(arrays["timesteps"], arrays["rows"], inputs, _outputs(arrays))

    def compact(self) -> CallSet:
        """Return the set with only what it uses, in memory: what a worker is sent."""
        return replace(self, inputs={name: given.compact() for name, given in self.inputs.items()})

    def values(self, name: str, steps: int | Array, calls: Any) -> Array:
        """Return what input ``name`` was given, [M, ...], at one timestep or at one each."""
        given = self.inputs[name]
        return np.asarray(given.values[given.index[steps, calls]])

    def only(self, spec: DenoiserSpec) -> CallSet:
        """Return the set with the inputs of ``spec`` alone."""
        return replace(self, inputs={item.name: self.inputs[item.name] for item in spec.inputs})

    def with_values(self, name: str, values: Array) -> CallSet:
        """Return the set with other ``values`` [K, N, ...] of an input."""
        steps, calls = values.shape[:2]
        each = np.arange(steps * calls).reshape(steps, calls)
        given = InputCalls(values.reshape(-1, *values.shape[2:]), each)
        sizes = {SIZE: self.sizes} if self.sizes is not None else {}
        return replace(self, inputs={**self.inputs, name: given}, outputs=sizes)

    def split(self, measured: int) -> tuple[CallSet, CallSet]:
        """Split the calls into those to round weights on and ``measured`` others, both evenly.

        Rounding fits its own inputs (GPTQ most of all), so a loss measured on them is too small.
        Where the others would leave less than a fifth of the calls to round on, both parts are the
        whole set.
        """
        if self.count - measured < self.count / 5:
            return self, self
        order = self.dealt(np.random.default_rng(SPLIT_SEED).permutation(self.count))
        return self.take(np.sort(order[measured:])), self.take(np.sort(order[:measured]))

    def save(self, folder: Path) -> None:
        """Write the set into ``folder`` (see ``shards``)."""
        steps = len(self.timesteps)
        columns = {
            STEP: np.repeat(np.arange(steps), self.count),
            TIMESTEP: np.repeat(self.timesteps, self.count),
            ROW: np.tile(self.rows, steps),
        }
        writer = ShardWriter(folder)
        for name, given in sorted(self.inputs.items()):
            columns[f"{INDEX}{name}"] = writer.add_all(name, given.values, given.index)
        writer.finish(columns | {name: values.ravel() for name, values in self.outputs.items()})

    @classmethod
    def load(cls, folder: Path) -> CallSet:
        """Read what ``save`` wrote; rows stay in the files. Raises InputError."""
        columns, values = read_shards(folder)
        steps = len(np.unique(columns[STEP])) if STEP in columns else 0
        count = len(columns[STEP]) // steps if steps else 0
        wanted = {STEP, TIMESTEP, ROW, *(f"{INDEX}{name}" for name in values)}
        grid = np.repeat(np.arange(steps), count)
        if (
            not count
            or not values
            or set(columns) - {OUTPUT_MEAN, OUTPUT_RMS, SIZE} != wanted
            or not np.array_equal(columns[STEP], grid)
        ):
            raise InputError(f"{folder} holds no set of recorded calls.", "Calibrate again.")
        shaped = {name: column.reshape(steps, count) for name, column in columns.items()}
        if (shaped[ROW] != shaped[ROW][0]).any():
            raise InputError(f"The calls in {folder} do not fit together.", "Calibrate again.")
        inputs = {
            name: InputCalls(rows, shaped[f"{INDEX}{name}"].astype(np.int64))
            for name, rows in values.items()
        }
        timesteps = shaped[TIMESTEP][:, 0].astype(np.float32)
        return cls(timesteps, shaped[ROW][0], inputs, _outputs(shaped))


def _outputs(arrays: Mapping[str, Array]) -> dict[str, Array]:
    return {name: arrays[name] for name in (OUTPUT_MEAN, OUTPUT_RMS, SIZE) if name in arrays}


def joined(parts: Sequence[CallSet]) -> CallSet:
    """Return the calls of all ``parts``, which have the same timesteps, side by side."""
    if len(parts) == 1:
        return parts[0]
    inputs = {}
    for name in parts[0].inputs:
        given = [part.inputs[name] for part in parts]
        starts = np.cumsum([0, *(one.values.shape[0] for one in given)])
        inputs[name] = InputCalls(
            ShardRows([one.values for one in given]),
            np.concatenate([one.index + start for one, start in zip(given, starts)], axis=1),
        )
    outputs = {
        name: np.concatenate([part.outputs[name] for part in parts], axis=1)
        for name in parts[0].outputs
    }
    rows = np.concatenate([part.rows for part in parts])
    return CallSet(parts[0].timesteps, rows, inputs, outputs)


def dealt(rows: Array, order: Array) -> Array:
    """Return ``order`` (int [N]) dealt out so that every stretch has all conditions evenly.

    Conditions differ in how hard they are: each gives its first call before any gives its second.
    """
    seen: dict[int, int] = {}
    turns = []
    for row in rows[order]:
        turns.append(seen.get(int(row), 0))
        seen[int(row)] = turns[-1] + 1
    return np.asarray(order[np.argsort(turns, kind="stable")])


@dataclass(frozen=True)
class Batch:
    """Some calls of one timestep: ``step`` indexes the timesteps, ``calls`` int64 [M] the calls.

    ``place``: the timestep's position in ``source``, which the inputs are read from on demand.
    """

    step: int
    timestep: float
    calls: Array
    source: RecordedCalls
    place: int

    @property
    def feed(self) -> dict[str, Array]:
        """The graph's inputs, by name."""
        return self.source.feed(self.place, self.calls)

    @property
    def size(self) -> int:
        """The number of the calls' size; 0 where there is one."""
        sizes = self.source.recorded.sizes
        return 0 if sizes is None else int(sizes[self.place, self.calls[0]])


@dataclass(frozen=True)
class RecordedCalls:
    """Recorded calls of the model ``spec``."""

    recorded: CallSet
    spec: DenoiserSpec

    @property
    def together(self) -> bool:
        """Whether calls may run in one batch: no input is one for all of them."""
        return all(condition.batched for condition in self.spec.conditions)

    def feed(self, steps: int | Array, calls: Any) -> dict[str, Array]:
        """Return the graph's inputs of ``calls`` (positions, or a slice) at a timestep, by name.

        ``steps``: one position of the timesteps, or one for each call; all of one size. Raises
        ModelError for different values of an input that is one for all calls.
        """
        feeds, sizes = {}, self.recorded.sizes
        found = np.empty(0) if sizes is None else np.unique(sizes[steps, calls])
        assert len(found) < 2, "calls of several sizes in one batch"
        for item in self.spec.inputs:
            if item.name not in self.recorded.inputs:
                raise ModelError(
                    f"The recorded calls have no input '{item.name}'.", "Record them again."
                )
            values = self.recorded.values(item.name, steps, calls)
            values = values.reshape(len(values), *item.shape)
            if item.sizes and len(found):
                values = cut_to(values, item.sizes[int(found[0])])
            if not item.batched:
                if (values != values[0]).any():
                    raise ModelError(
                        f"The model takes one '{item.name}' per call, but different ones were given."
                    )
                values = np.asarray(values[0])
            feeds[item.name] = np.asarray(values, item.dtype)
        return feeds

    def batches(
        self, size: int, steps: range | None = None, calls: range | Array | None = None
    ) -> Iterator[Batch]:
        """Yield the calls, ``size`` of one timestep (and one size) at a time, or a part of them."""
        if not self.together:
            size = 1
        chosen = np.asarray(calls if calls is not None else range(self.recorded.count), np.int64)
        for step in steps if steps is not None else range(len(self.recorded.timesteps)):
            timestep = float(self.recorded.timesteps[step])
            for some in self.recorded.of_one_size(step, chosen):
                for start in range(0, len(some), size):
                    yield Batch(step, timestep, some[start : start + size], self, step)
