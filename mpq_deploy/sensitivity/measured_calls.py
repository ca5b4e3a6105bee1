"""The calibration set as inputs of the graph: which calls are measured, and what each feeds."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from mpq_deploy.calls.recorded import RecordedCalls
from mpq_deploy.errors import ModelError
from mpq_deploy.graph.layers import LayerGraph
from mpq_deploy.models.spec import Array

# Memory for the values of a pass through the graph, and for what probes keep of the layers' errors.
MEMORY_BYTES, STACK_BYTES = 1 << 30, 2 << 30
# Where so many times the memory for stacks would be needed, keeping that part of them saves hardly
# any time.
HELD_SHARE = 2
# Arrays of a layer's size that stacking its errors holds, beside those of each form.
STACK_ARRAYS = 2
# A layer whose stacked errors would take more has them made one by one: again for each sample, which
# large layers are measured on alone.
LARGE_STACK_BYTES = 1 << 30
# Samples evaluated at once for the order of salient channels.
SALIENCE_BATCH = 4


class Calls:
    """The calls that are measured: ``count`` of the recorded ones at every timestep.

    ``picked`` int64 [K, count]: which ones; ``turns`` int64 [K, count]: their places in an order in
    which any stretch has all conditions about equally often. ``rotate``: others at each timestep,
    as far as there are others; a call's error at one timestep says much about its error at the
    next, and little about that of other calls. ``fixed_batch``: how many calls the graph takes at
    once, where its file or an input without a batch axis fixes that; else None. Raises ModelError
    for too few calls for the batch.
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
        # Columns of one size lie together, those of the largest first.
        self._ends = np.cumsum([one.shape[1] for one in picked]).tolist()
        self.turns = np.argsort(order)[self.picked]

    def chunks(self, batch: int) -> Iterator[tuple[int, slice]]:
        """Yield (step index, slice of calls) over all timesteps, at most ``batch`` calls at a time."""
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
        """Cut a slice of calls in two; none where the graph takes no fewer at once."""
        fixed = self.fixed_batch or 1
        middle = calls.start + (calls.stop - calls.start) // (2 * fixed) * fixed
        whole = middle == calls.start
        return [] if whole else [slice(calls.start, middle), slice(middle, calls.stop)]

    def feeds(self, step_index: int, calls: slice) -> dict[str, Array]:
        """Return the graph's inputs of ``calls`` (a slice of 0..count) at a timestep."""
        return self._recorded.feed(step_index, self.picked[step_index, calls])


def _by_size(calls: RecordedCalls) -> list[Array]:
    """Return the recorded calls of each size, int64, those of the largest first."""
    found = calls.recorded.of_one_size(0, np.arange(calls.recorded.count))
    if len(found) == 1 or (sizes := calls.recorded.sizes) is None:
        return found
    return sorted(found, key=lambda some: calls.spec.largest_first.index(int(sizes[0, some[0]])))


def _picked(calls: Array, order: Array, count: int, steps: int, rotate: bool) -> Array:
    """Choose ``count`` of the ``calls`` of one size at each timestep, int64 [steps, count].

    ``order``: the same calls, dealt out.
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
