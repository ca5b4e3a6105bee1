"""Independent pieces of work side by side: forward passes of one session, each on threads of its own.

In: work and its items. Out: the results, in the items' order. Two passes of one thread each take
less time than one pass of two threads after the other: no thread waits for another within an
operator, and each pass gives the bits that it gives alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from mpq_deploy.system.compute import Compute, computing_on
from mpq_deploy.system.threads import runtime_threads

# Each lane holds the activations of a pass, so there are few, and fewer for larger models (our choice).
MOST_LANES = 4
LARGEST_SHARED_BYTES = 1 << 30

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Lanes:
    """``count`` passes at once, each with ``threads`` threads (0: as ONNX Runtime has them here)."""

    count: int = 1
    threads: int = 0


def lanes_for(model_bytes: int) -> Lanes:
    """Return the lanes for forward passes of a model of so many bytes; a GPU has one."""
    threads = runtime_threads()
    count = min(threads, MOST_LANES, LARGEST_SHARED_BYTES // max(model_bytes, 1))
    if count < 2 or computing_on() != Compute():
        return Lanes()
    return Lanes(count, threads // count)


def in_lanes(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    lanes: int,
    stop: Callable[[], None] = lambda: None,
) -> Iterator[Result]:
    """Yield ``work(item)`` for every item, in their order; at most ``lanes`` at once.

    No more than one result for each lane waits to be taken. An error is raised in its item's turn, after
    ``stop`` was called, which may end what still runs.
    """
    if lanes < 2:
        yield from map(work, items)
        return
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(lanes) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) > lanes:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BaseException:
            stop()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
