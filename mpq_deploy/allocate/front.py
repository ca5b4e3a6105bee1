"""The Pareto front of size, predicted error and latency.

In: an allocation problem, whose limits are ignored. Out: plans with exact bytes and nanoseconds.
For each pair of prices, of a byte and of a nanosecond, the Lagrangian relaxation separates into the
layers and takes milliseconds. Its plan has the minimum error of all plans of at most its size and
time (Everett, 1963), except for quantizers that layers share: their cost is split evenly among the
layers that may read them. Between two neighbours a MILP may find plans that no price gives.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mpq_deploy.allocate.problem import LayerChoice, Problem
from mpq_deploy.models.spec import Array

# How many prices of a byte, and of a nanosecond, are tried, spaced logarithmically (our choice).
BYTE_PRICES, TIME_PRICES = 48, 12
# Plans within these factors of size, error and latency count as alike (our choice).
ALIKE = np.array([1.002, 1.05, 1.005])


@dataclass(frozen=True)
class FrontPlan:
    """A plan of the front. ``loss``: sum over layers; ``latency_ns``: 0 where unknown."""

    schemes: dict[str, str]
    size_bytes: int
    loss: float
    latency_ns: int


def front(problem: Problem, most: int | None = None) -> list[FrontPlan]:
    """Return plans that no other equals or beats in size, error and latency, smallest first.

    ``most`` (3 or more): return at most so many, and none that is nearly like another: the
    smallest, the largest, the fastest, then plans of lowest error for their size, then others, each
    spread evenly over the sizes. The problem's limits are ignored.
    """
    choices = _Choices(problem)
    distinct = {chosen.tobytes(): chosen for chosen in choices.chosen_by_prices()}
    plans = []
    for chosen in distinct.values():
        schemes = choices.schemes(chosen)
        size, time = problem.plan_bytes(schemes), problem.plan_ns(schemes)
        plans.append(FrontPlan(schemes, size, problem.plan_loss(schemes), time))
    plans.sort(key=lambda one: (one.size_bytes, one.loss, one.latency_ns))
    kept = undominated([(p.size_bytes, p.loss, p.latency_ns) for p in plans])
    return _some([plans[number] for number in kept], most)


def undominated(values: Sequence[tuple[float, float, float]]) -> list[int]:
    """Return the positions of those of ``values``, sorted ascending, that no other dominates."""
    rows = np.array(values, np.float64).reshape(-1, 3)
    kept: list[int] = []
    for number, row in enumerate(rows):
        if not kept or not (rows[kept] <= row).all(axis=1).any():
            kept.append(number)
    return kept


def least_so_far(losses: Sequence[float | None]) -> list[int]:
    """Return the positions of losses that are smaller than all before them.

    Of plans in ascending size these are the lower envelope. A loss of None counts as smaller.
    """
    found: list[int] = []
    for number, loss in enumerate(losses):
        lowest = losses[found[-1]] if found else None
        if lowest is None or loss is None or loss < lowest:
            found.append(number)
    return found


def _some(plans: list[FrontPlan], most: int | None) -> list[FrontPlan]:
    if most is None:
        return plans
    plans = _distinct(plans)
    if len(plans) <= most:
        return plans
    kept = _ends(plans)
    kept.update(_evenly(least_so_far([plan.loss for plan in plans]), most - len(kept)))
    rest = [number for number in range(len(plans)) if number not in kept]
    kept.update(_evenly(rest, most - len(kept)))
    return [plans[number] for number in sorted(kept)]


def _ends(plans: Sequence[FrontPlan]) -> set[int]:
    """Return the positions of the smallest, the largest and the fastest plan."""
    return {0, len(plans) - 1, min(range(len(plans)), key=lambda i: plans[i].latency_ns)}


def _distinct(plans: list[FrontPlan]) -> list[FrontPlan]:
    """Leave out plans where another is hardly larger, worse or slower (``ALIKE``)."""
    rows = np.array([(p.size_bytes, p.loss, p.latency_ns) for p in plans], np.float64)
    kept = sorted(_ends(plans))
    for number in np.argsort(rows[:, 1], kind="stable"):
        if not (rows[kept] <= rows[number] * ALIKE).all(axis=1).any():
            kept.append(int(number))
    return [plans[number] for number in sorted(set(kept))]


def _evenly(numbers: Sequence[int], count: int) -> list[int]:
    """Return at most ``count`` of ``numbers``, evenly spaced, first and last included."""
    places = np.linspace(0, len(numbers) - 1, min(count, len(numbers))).round().astype(int)
    return [numbers[place] for place in places]


class _Choices:
    """All (layer, scheme) pairs as arrays, layer after layer.

    The cost of a quantizer is split evenly among the layers that may read it.
    """

    def __init__(self, problem: Problem) -> None:
        self._layers = problem.layers
        self._schemes = [scheme for layer in problem.layers for scheme in layer.bytes]
        sizes = [len(layer.bytes) for layer in problem.layers]
        self._starts = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int64)
        self._sizes = np.asarray(sizes, np.int64)
        readers = Counter(
            name
            for layer in problem.layers
            for name in {name for scheme in layer.bytes for name in layer.quantizers(scheme)}
        )
        rows = [_pair(problem, layer, s, readers) for layer in problem.layers for s in layer.bytes]
        self._loss, self._bytes, self._time = np.array(rows, np.float64).T

    def schemes(self, chosen: Array) -> dict[str, str]:
        """Return the plan (layer -> scheme) of the ``chosen`` pairs, int [layers]."""
        return {layer.name: self._schemes[i] for layer, i in zip(self._layers, chosen)}

    def chosen_by_prices(self) -> Iterator[Array]:
        """Yield each layer's pair of minimum loss + price x bytes + price x time, by prices."""
        of_time = [0.0, *_prices(self._slopes(self._time), TIME_PRICES)]
        for of_byte in (0.0, *_prices(self._slopes(self._bytes), BYTE_PRICES)):
            for price in of_time:
                paid = self._loss + of_byte * self._bytes + price * self._time
                least = np.repeat(np.minimum.reduceat(paid, self._starts), self._sizes)
                # Ties go to the first scheme, as schemes have a fixed order.
                first = np.where(paid <= least, np.arange(len(paid)), len(paid))
                yield np.minimum.reduceat(first, self._starts)

    def _slopes(self, cost: Array) -> Array:
        """Return the loss added per unit of ``cost`` saved, of every pair.

        Relative to the layer's pair of minimum loss, and of its cheapest pair relative to the pair:
        together they bound every price at which a layer's choice changes.
        """
        best, cheapest = self._first_least(self._loss), self._first_least(cost)
        saved = np.concatenate([cost[best] - cost, cost - cost[cheapest]])
        added = np.concatenate([self._loss - self._loss[best], self._loss[cheapest] - self._loss])
        useful = (saved > 0) & (added > 0)
        return np.asarray(added[useful] / saved[useful])

    def _first_least(self, values: Array) -> Array:
        least = np.repeat(np.minimum.reduceat(values, self._starts), self._sizes)
        first = np.where(values <= least, np.arange(len(values)), len(values))
        return np.repeat(np.minimum.reduceat(first, self._starts), self._sizes)


def _pair(
    problem: Problem, layer: LayerChoice, scheme: str, readers: Mapping[str, int]
) -> tuple[float, float, float]:
    """Return a pair's loss, bytes and nanoseconds, with its share of the quantizers' costs."""
    quantizers = layer.quantizers(scheme)
    size = sum(bytes_ / readers[name] for name, bytes_ in quantizers.items())
    time = sum(problem.quantizer_ns.get(name, 0) / readers[name] for name in quantizers)
    own = layer.latency_ns.get(scheme, 0)
    return layer.loss[scheme], layer.bytes[scheme] + size, own + time


def _prices(slopes: Array, count: int) -> list[float]:
    """Return ``count`` prices that span all ``slopes``; [] where nothing can be saved."""
    if not len(slopes):
        return []
    # A little beyond both ends, where nothing and everything is saved. Halving may underflow to 0.
    first, last = np.maximum((slopes.min() / 2, slopes.max() * 2), np.finfo(np.float64).tiny)
    return [float(price) for price in np.geomspace(first, last, count)]
