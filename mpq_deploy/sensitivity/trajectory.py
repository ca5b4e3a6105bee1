"""Trajectory probes: the expected error of the final images for every scheme.

To first order, the errors d_t of the denoiser's outputs along a float trajectory change the final
image by e = sum_t K_t d_t. K_t is the Jacobian through all later steps of sampler and denoiser.
With a probe r ~ N(0, I) at the final image, g_t = K_t^T r is computed backwards, step by step:
through the sampler by torch's autograd, and through the denoiser by the backward pass that also
gives G_{l,t} = d<g_t, output>/dY_l for every layer l. With dY_{l,s,t} the local error of scheme s,

    E_r (sum_t <G_{l,t}, dY_{l,s,t}>)^2 = ||change of the final image||^2.

Errors of different steps add with their signs, which probes at single outputs cannot show. The loss
is the mean of this square over images and probes, divided by the mean of ||image||^2 (our choice).
Images are clipped to their range, as in evaluation. The trajectories are sampled here, with the
seed ``measure.seed``, and not taken from the recorded calls: by our own loop, or by the pipeline
that calls the model, whose images are then those of its decoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from mpq_deploy.calls.loop import guided
from mpq_deploy.calls.recorded import RecordedCalls
from mpq_deploy.models.spec import Array
from mpq_deploy.sensitivity.probe import (
    Piece,
    Probing,
    batch_plan,
    measured_pairs,
    smaller_pieces,
)
from mpq_deploy.sensitivity.subject import Subject
from mpq_deploy.sensitivity.table import (
    COHERENT,
    Nested,
    SensitivityTable,
    table_from_projections,
)
from mpq_deploy.sensitivity.trajectory_sources import TrajectorySource
from mpq_deploy.system.gpu_memory import Shrinking
from mpq_deploy.system.parallel.work import Alone, Result, Shard, Work, run_shards
from mpq_deploy.system.progress import Talk

# Part of the probes' seeds, so that their random numbers are not those of the first noise.
APART = 0x7261


def measure_trajectory(subject: Subject) -> SensitivityTable:
    """Return the table of all schemes of all layers, from as many trajectories as measured calls.

    Raises NoTrajectory where there is no sampler that torch can differentiate, and the errors of
    ``measure_probe``.
    """
    return measured_products(subject).table()


@dataclass(frozen=True)
class StepProducts:
    """Inner products <G_{l,t}, dY_{l,s,t}> of T steps, P probes, N trajectories.

    ``values``: layer -> scheme -> float32 [T, P, N]. ``power`` float64 [N]: ||image||^2.
    ``mean_square``: mean square of the image values with peak 1; None where a decoder makes images.
    """

    values: Nested
    power: Array
    mean_square: float | None
    notes: tuple[str, ...] = ()

    def table(self, apart: bool = True) -> SensitivityTable:
        """Return the table of the products.

        ``apart``: the loss is half the square of the sum over steps, half the sum of the steps'
        squares. The sum alone is the image's error, but of a dozen trajectories a plan is chosen
        better by both: there are as many more squares as steps. Without it, sums alone.
        """
        norm = np.float32(np.sqrt(self.power.mean()) or 1.0)

        def entries(steps: Array) -> Array:
            coherent: Array = steps.sum(0, keepdims=True) / norm
            if not apart:
                return coherent
            alone = steps * ((1 - COHERENT) ** 0.5 / norm)
            rows = np.concatenate([coherent * COHERENT**0.5, alone])
            # A loss is a mean over the entries of a trajectory, whose probes alone are to count.
            return np.asarray(rows.reshape(1, -1, steps.shape[-1]) * len(rows) ** 0.5, np.float32)

        rows = {
            layer: {scheme: entries(steps) for scheme, steps in row.items()}
            for layer, row in self.values.items()
        }
        calls = np.arange(len(self.power))[None]
        # The final image has no timestep: the table has one, 0.
        table = table_from_projections(np.zeros(1, np.float32), rows, self.notes, calls)
        probes = next((z.shape[1] for row in self.values.values() for z in row.values()), 0)
        of_images = replace(table, metric="trajectory", mean_square=self.mean_square)
        return replace(of_images, image_probes=probes if apart else 0)


def measured_products(subject: Subject) -> StepProducts:
    """Measure the products by call. Raises as ``measure_trajectory`` does."""
    by_pipeline = TrajectorySource(subject).by_pipeline
    if by_pipeline and subject.spread is not None:
        # The pipeline's folder is on this machine alone.
        subject = replace(subject, spread=replace(subject.spread, crew=Alone()))
    with subject.crew.open(subject.job("trajectories", trajectory_work), subject.talk) as pool:
        batch, ends, notes = batch_plan(subject, pool, _Task(), "trajectories")
        # With guidance the model computes two rows per trajectory.
        size = max(batch // 2, subject.calls().first.stop) if guided(subject.spec) else batch
        shards = _shards(subject, _Task(None, batch, ends), 1 if by_pipeline else size)
        results = list(run_shards(pool, "trajectories", shards, subject.talk, subject.store))
    values: Nested = {}
    calls = max(one["values"].shape[1] for one in results)
    for number, (layer, scheme) in enumerate(measured_pairs(subject)):
        # Images of a pipeline may take different numbers of calls.
        rows = [one["values"][number] for one in results]
        rows = [np.pad(row, ((0, calls - len(row)), (0, 0), (0, 0))) for row in rows]
        values.setdefault(layer, {})[scheme] = np.concatenate(rows, -1)
    power = np.concatenate([one["power"] for one in results])
    return StepProducts(values, power, _mean_square(subject, results, by_pipeline), notes)


def _shards(subject: Subject, task: _Task, size: int) -> list[Shard]:
    """Return a shard for every ``size`` trajectories."""
    assert subject.sampling is not None
    count, shards = subject.calls().count, []
    for start in range(0, count, size):
        stop = min(start + size, count)
        key = {"part": "trajectories", "batch": task.batch, "ends": list(task.ends)}
        shard = subject.shard(
            f"trajectories {start} to {stop - 1}",
            replace(task, part=slice(start, stop)),
            subject.sampling.steps * (stop - start),
            trajectories=[start, stop],
            **key,
        )
        shards.append(shard)
    return shards


def _mean_square(subject: Subject, results: Sequence[Result], by_pipeline: bool) -> float | None:
    """Return the mean square of the image values with the peak that evaluation takes as 1.

    None where a decoder makes images of the samples.
    """
    spec = subject.spec
    if spec.decoder is not None and not by_pipeline:
        return None
    low = min(float(one["low"]) for one in results)
    high = max(float(one["high"]) for one in results)
    power = np.concatenate([one["power"] for one in results])
    found = float(power.mean()) / int(results[0]["elements"])
    pictures = low >= 0 and high <= 1 if by_pipeline else spec.pixel_range is not None
    return found if pictures or high <= low else found / (high - low) ** 2


@dataclass(frozen=True)
class _Task:
    """A slice of trajectories, computed in batches of ``batch`` rows; None: plan the batch."""

    part: slice | None = None
    batch: int = 0
    ends: tuple[int, ...] = ()


def trajectory_work(subject: Subject) -> Work:
    """Return the function that computes a ``_Task``.

    A plan is that of ``Probing.plan``. Trajectories give ``values`` float32 [pairs, T, P, N],
    ``power`` float64 [N], the lowest and highest image value (``low``, ``high``), and ``elements``,
    the number of values of an image.
    """
    work = Shrinking(partial(Probing, subject), "trajectories", subject.talk)
    source = TrajectorySource(subject)

    def compute(task: _Task, talk: Talk) -> Result:
        if task.part is None:
            return work.run(None, lambda _: (), lambda probing, _: probing.plan())[0]
        run = _Trajectories(subject, work, task, source)
        with talk.bar("trajectories", run.size * run.calls) as advance:
            values = run.products(lambda: advance(run.size))
        final = run.image.detach().numpy().reshape(run.size, -1)
        power = np.square(final, dtype=np.float64).sum(1)
        ends = {"low": np.array(final.min()), "high": np.array(final.max())}
        return {"values": values, "power": power, "elements": np.array(final.shape[1]), **ends}

    return compute


def drawn_probes(seed: int, numbers: range, shape: tuple[int, ...]) -> Array:
    """Draw the probes [P, N, ...] of N trajectories, ``shape`` [P, ...] for each.

    Each trajectory has its own seed, (seed, APART, number). Its first noise is drawn from (seed,
    number), and probes must be independent of that noise because the errors depend on it.
    """
    rows = [
        np.random.default_rng((seed, APART, number)).standard_normal(shape, np.float32)
        for number in numbers
    ]
    return np.stack(rows, 1)


class _Trajectories:
    """Samples some float trajectories and backpropagates probes through them."""

    def __init__(
        self,
        subject: Subject,
        work: Shrinking[Probing],
        task: _Task,
        source: TrajectorySource,
    ) -> None:
        assert task.part is not None
        part, ends = task.part, task.ends
        self._subject, self._work, self._place = subject, work, part
        self._batch = task.batch
        self._parts = tuple(slice(start, end) for start, end in zip((0, *ends), ends))
        self._made = source.made(part, self._output)
        self.size, self.image = part.stop - part.start, self._made.image
        self.calls = len(self._made.tape.outputs)

    def products(self, advance: Any) -> Array:
        """Return inner products float32 [pairs, T, P, N]; calls ``advance`` after each call."""
        pairs = {pair: n for n, pair in enumerate(measured_pairs(self._subject))}
        probes, seed = self._subject.settings.directions, self._subject.settings.seed
        values = np.zeros((len(pairs), self.calls, probes, self.size), np.float32)
        numbers = range(self._place.start, self._place.stop)
        drawn = drawn_probes(seed, numbers, (probes, *self.image.shape[1:]))
        tape = self._made.tape

        def through(call: int, wanted: Any) -> dict[str, list[Any]]:
            into: dict[str, list[Any]] = {}
            for chunk, products, back in self._back(call, wanted):
                columns = np.arange(chunk.start, chunk.stop) % self.size
                for layer, scheme, found in products:
                    np.add.at(values[pairs[layer, scheme], call].T, columns, found[0].T)
                for name, rows in back.items():
                    into.setdefault(name, []).append(torch.stack(rows))
            advance()
            return {name: list(torch.cat(rows, 1)) for name, rows in into.items()}

        image = self.image
        ends = [torch.from_numpy(one) for one in drawn]
        if image is not tape.final:
            ends = [
                torch.autograd.grad(image, [tape.final], [end], retain_graph=True)[0]
                for end in ends
            ]
        tape.back(ends, through)
        return values

    def _chunks(self, rows: int) -> list[slice]:
        return [slice(at, min(at + self._batch, rows)) for at in range(0, rows, self._batch)]

    def _output(self, calls: RecordedCalls) -> Array:
        """Return the model's output for ``calls`` of one timestep, [M, ...]."""
        smaller = partial(smaller_pieces, self._subject.calls())

        def run(probing: Probing, piece: Piece) -> Array:
            return probing.run(calls.feed(0, piece[0]))

        chunks = self._chunks(calls.recorded.count)
        found = [self._work.run((chunk, self._parts), smaller, run) for chunk in chunks]
        return np.concatenate([one for row in found for one in row])

    def _back(self, call: int, wanted: Any) -> list[tuple[slice, list[Any], dict[str, list[Any]]]]:
        """Backpropagate the output gradients ``wanted`` [P, M, ...] of a call.

        Returns (chunk of rows, inner products, input gradients by name) for each chunk.
        """
        calls, smaller = self._made.calls(call), partial(smaller_pieces, self._subject.calls())
        given = self._made.tape.given[call]

        def back(probing: Probing, piece: Piece) -> tuple[slice, list[Any], dict[str, list[Any]]]:
            chunk, parts = piece

            def seeds(output: Any) -> list[Any]:
                return [one[chunk].to(output).reshape(output.shape) for one in wanted]

            size = chunk.stop - chunk.start
            products, into = probing.back(calls.feed(0, chunk), parts, seeds, size, tuple(given))
            rows = {
                name: [row.float().cpu().reshape(size, *value.shape[1:]) for row in into[name]]
                if name in into
                else [torch.zeros(size, *value.shape[1:])] * len(wanted)
                for name, value in given.items()
            }
            return chunk, products, rows

        chunks = self._chunks(calls.recorded.count)
        found = [self._work.run((chunk, self._parts), smaller, back) for chunk in chunks]
        return [one for row in found for one in row]
