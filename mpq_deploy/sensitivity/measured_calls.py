"""The calibration set as inputs of the graph: which calls are measured, and what each feeds."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from mpq_deploy.calls.recorded import RecordedCalls
from mpq_deploy.errors import ModelError
from mpq_deploy.graph.layers import LayerGraph
from mpq_deploy.models.spec import Array

# Memory for the values of one forward pass, and for the stacked weight errors that probes cache.
MEMORY_BYTES, STACK_BYTES = 1 << 30, 2 << 30
# Where all stacks take this many times the memory for them, none is cached: caching the part that
# fits would save hardly any time.
HELD_SHARE = 2
# Arrays of a layer's size that stacking its weight errors holds, beside one per form.
STACK_ARRAYS = 2
# Where a layer's stacked weight errors would take more, each is computed when it is used. Layers so
# large are measured one sample at a time, so that this is repeated for each sample.
LARGE_STACK_BYTES = 1 << 30
# Most calls evaluated at once when output channels are ranked by salience.
SALIENCE_BATCH = 4


class Calls:
    """The calls that are measured: ``count`` of the recorded calls at every timestep.

    ``picked`` int64 [K, count]: indices of the measured calls. ``turns`` int64 [K, count]: their
    positions in an order in which any stretch has all conditions about equally often. ``rotate``:
    measure other calls at each timestep, as far as there are others, because a call's errors at
    neighbouring timesteps are much alike and tell little about other calls. ``fixed_batch``: how
    many calls the graph takes at once, where the ONNX file or an input without a batch axis fixes
    that; else None. Raises ModelError when there are fewer calls than one fixed batch.
    """

    def __init__(
        self, graph: LayerGraph, calls: RecordedCalls, samples: int, rotate: bool = False
    ) -> None:
        calibration = calls.recorded
        self.fixed_batch = _fixed_batch(graph, calls)
        recorded, sizes = calibration.count, _by_size(calls)
        multiple, least = self.fixed_batch or 1, len(sizes) if len(sizes) > 1 else 0
        self.count = max(min(samples, recorded), least) // multiple * multiple
        if not self.count:
            raise ModelError(
                f"The model takes {multiple} samples at once, but only {min(samples, recorded)} would be measured.",
                "Export it with a free batch axis, or calibrate and measure more samples.",
            )
        self.timesteps = calibration.timesteps
        self.first = slice(0, multiple)
        self.spec = calls.spec
        self._recorded = calls
        order = calibration.dealt(np.arange(recorded)).astype(np.int64)
        shares = [(self.count + place) // len(sizes) for place in reversed(range(len(sizes)))]
        picked = [
            _picked(some, order[np.isin(order, some)], share, len(self.timesteps), rotate)
            for some, share in zip(sizes, shares, strict=True)
        ]
        self.picked = np.concatenate(picked, axis=1)
        self.count = self.picked.shape[1]
        # Columns of calls of one size are adjacent, those of the largest size first.
        self._ends = np.cumsum([one.shape[1] for one in picked]).tolist()
        self.turns = np.argsort(order)[self.picked]

    def chunks(self, batch: int) -> Iterator[tuple[int, slice]]:
        """Yield (step index, slice of at most ``batch`` calls) over all timesteps."""
        for step_index in range(len(self.timesteps)):
            for chunk in self.chunks_of_step(batch):
                yield step_index, chunk

    def chunks_of_step(self, batch: int) -> Iterator[slice]:
        """Yield the slices of the calls of one timestep, each of one size."""
        for begin, end in zip((0, *self._ends), self._ends):
            for start in range(begin, end, batch):
                yield slice(start, min(start + batch, end))

    @property
    def paired(self) -> bool:
        """Whether the first two calls may run together."""
        return not self.fixed_batch and self._ends[0] > 1

    def halves(self, calls: slice) -> list[slice]:
        """Cut a slice of calls in two; empty where it is one call or one fixed batch."""
        fixed = self.fixed_batch or 1
        middle = calls.start + (calls.stop - calls.start) // (2 * fixed) * fixed
        whole = middle == calls.start
        return [] if whole else [slice(calls.start, middle), slice(middle, calls.stop)]

    def feeds(self, step_index: int, calls: slice) -> dict[str, Array]:
        """Return the graph's inputs of ``calls`` (a slice of 0..count) at a timestep."""
        return self._recorded.feed(step_index, self.picked[step_index, calls])


def _by_size(calls: RecordedCalls) -> list[Array]:
    """Return one int64 array of recorded calls per image size, the largest size first."""
    found = calls.recorded.of_one_size(0, np.arange(calls.recorded.count))
    if len(found) == 1 or (sizes := calls.recorded.sizes) is None:
        return found
    return sorted(found, key=lambda some: calls.spec.largest_first.index(int(sizes[0, some[0]])))


def _picked(calls: Array, order: Array, count: int, steps: int, rotate: bool) -> Array:
    """Choose ``count`` of the ``calls`` of one size at each timestep, int64 [steps, count].

    ``order``: the same calls with their conditions interleaved (``CallSet.dealt``).
    """
    count = min(count, len(calls))
    even = calls[np.linspace(0, len(calls) - 1, count).round().astype(np.int64)]
    if not rotate or count == len(calls):
        return np.tile(even, (steps, 1))
    return order[np.arange(steps * count).reshape(steps, count) % len(calls)]


def _fixed_batch(graph: LayerGraph, calls: RecordedCalls) -> int | None:
    if not calls.together:
        return 1
    for value in graph.model.graph.inputs:
        if (
            value.name == calls.spec.sample.name
            and value.shape is not None
            and isinstance(value.shape[0], int)
        ):
            return int(value.shape[0])
    return None
