"""Several images of one pipeline at once: one runs the pipeline's code while the model computes the others.

In: a loaded pipeline, and the images to make. Out: the images in their order, each as it comes alone:
only the image whose turn it is has torch's generator, and every image has a scheduler of its own.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from mpq_deploy.calls.pipeline_runs import OnStep, PipelineRuns
from mpq_deploy.calls.stand_in import Compute
from mpq_deploy.models.spec import Array
from mpq_deploy.system.lanes import in_lanes
from mpq_deploy.system.libraries import no_bars


@dataclass(frozen=True)
class Image:
    """An image to make: its call's ``number``, the ``seed`` of its noise, what computes its denoiser."""

    number: int
    seed: int
    compute: Compute
    on_step: OnStep | None = None


class _Stopped(BaseException):
    """Another image failed: no error, so that no pipeline catches it."""


def images_in_lanes(
    runs: PipelineRuns, wanted: Iterable[Image], steps: int, lanes: int
) -> Iterator[Array]:
    """Yield what the pipeline gives for each of ``wanted``; at most ``lanes`` of them are made at once."""
    if lanes < 2 or runs.apart() is None:
        for one in wanted:
            runs.compute = one.compute
            yield runs.image(one.number, steps, one.seed, one.on_step)
        return
    turn, stopped, here = threading.Lock(), threading.Event(), threading.local()

    def compute(feeds: dict[str, Array]) -> Array:
        """Run the model while another image has its turn."""
        state = torch.get_rng_state()
        turn.release()
        try:
            output: Array = here.compute(feeds)
        finally:
            turn.acquire()
            torch.set_rng_state(state)
        if stopped.is_set():
            raise _Stopped
        return output

    def make(one: Image) -> Array:
        here.compute = one.compute
        with turn:
            apart = runs.apart()
            if apart is None or stopped.is_set():
                raise _Stopped
            return apart.image(one.number, steps, one.seed, one.on_step)

    runs.compute = compute
    with torch.random.fork_rng(devices=[]), no_bars("diffusers"):
        yield from in_lanes(make, wanted, lanes, stopped.set)
