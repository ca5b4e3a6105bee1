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
seed ``measure.seed``, and not taken from the recorded calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from mpq_deploy.calls.loop import first_samples, guided
from mpq_deploy.calls.recorded import CallSet, RecordedCalls
from mpq_deploy.calls.sampler import make_sampler
from mpq_deploy.calls.sampler_tape import NoTrajectory, Tape
from mpq_deploy.calls.trajectories import cycled_rows
from mpq_deploy.models.spec import Array, DenoiserSpec
from mpq_deploy.sensitivity.probe import (
    Piece,
    Probing,
    batch_plan,
    measured_pairs,
    smaller_pieces,
)
from mpq_deploy.sensitivity.subject import Sampling, Subject
from mpq_deploy.sensitivity.table import (
    COHERENT,
    Nested,
    SensitivityTable,
    table_from_projections,
)
from mpq_deploy.system.gpu_memory import Shrinking
from mpq_deploy.system.parallel.work import Result, Work, run_shards
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
    """Measure the products by step. Raises as ``measure_trajectory`` does."""
    if not subject.spec.sampled or subject.sampling is None:
        raise NoTrajectory("the model's calls are not made by a sampler that is known here")
    count, pairs = subject.calls().count, measured_pairs(subject)
    with subject.crew.open(subject.job("trajectories", trajectory_work), subject.talk) as pool:
        batch, ends, notes = batch_plan(subject, pool, _Task(), "trajectories")
        # With guidance the model computes two rows per trajectory.
        size = max(batch // 2, subject.calls().first.stop) if guided(subject.spec) else batch
        key = {"part": "trajectories", "batch": batch, "ends": list(ends)}
        shards = []
        for start in range(0, count, size):
            part = slice(start, min(start + size, count))
            task = _Task(part, batch, ends)
            name = f"trajectories {part.start} to {part.stop - 1}"
            steps = subject.sampling.steps * (part.stop - part.start)
            named = {"trajectories": [part.start, part.stop]}
            shards.append(subject.shard(name, task, steps, **named, **key))
        results = list(run_shards(pool, "trajectories", shards, subject.talk, subject.store))
    values: Nested = {name: {} for name, _ in pairs}
    for number, (layer, scheme) in enumerate(pairs):
        values[layer][scheme] = np.concatenate([one["values"][number] for one in results], -1)
    power = np.concatenate([one["power"] for one in results])
    low, high = (f(float(one[n]) for one in results) for f, n in ((min, "low"), (max, "high")))
    spec, elements = subject.spec, int(results[0]["elements"])
    mean_square = float(power.mean()) / elements if spec.decoder is None else None
    if mean_square is not None and spec.pixel_range is None and high > low:
        mean_square /= (high - low) ** 2
    return StepProducts(values, power, mean_square, notes)


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

    def compute(task: _Task, talk: Talk) -> Result:
        if task.part is None:
            return work.run(None, lambda _: (), lambda probing, _: probing.plan())[0]
        parts = tuple(slice(start, end) for start, end in zip((0, *task.ends), task.ends))
        run = _Trajectories(subject, work, task.part, task.batch, parts)
        with talk.bar("trajectories", run.size * run.steps) as advance:
            values = run.products(lambda: advance(run.size))
        final = run.image.detach().numpy().reshape(run.size, -1)
        power = np.square(final, dtype=np.float64).sum(1)
        ends = {"low": np.array(final.min()), "high": np.array(final.max())}
        return {"values": values, "power": power, "elements": np.array(final.shape[1]), **ends}

    return compute


def to_image(final: Any, spec: DenoiserSpec) -> Any:
    """Return final samples (a tensor) as evaluation compares them.

    Pixels are clipped and mapped to [0, 1]; latents stay as they are.
    """
    if spec.pixel_range is None:
        return final
    low, high = spec.pixel_range
    return ((final - low) / (high - low)).clip(0, 1)


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
        part: slice,
        batch: int,
        parts: tuple[slice, ...],
    ) -> None:
        assert subject.sampling is not None
        self._subject, self._work, self._parts = subject, work, parts
        self._spec, self._batch, self._place = subject.spec, batch, part
        self.size = part.stop - part.start
        conditions = dict(subject.sampling.conditions)
        self._conditions, seed = conditions, subject.settings.seed
        rows = cycled_rows(self._spec, conditions, part.stop, seed)[part]
        noise = first_samples(self._spec, np.zeros(part.stop, np.int64), conditions, seed)[part]
        self._rows = (
            np.concatenate([np.full_like(rows, self._spec.uncond_row), rows])
            if guided(self._spec)
            else rows
        )
        self._sampler = _sampler(subject, subject.sampling, part)
        self.steps = len(self._sampler.timesteps)
        self._tape = Tape.of(self._spec, self._sampler, noise, self._output)
        self.image = to_image(self._tape.final, self._spec)

    def products(self, advance: Any) -> Array:
        """Return inner products float32 [pairs, T, P, N]; calls ``advance`` after each step."""
        pairs = {pair: n for n, pair in enumerate(measured_pairs(self._subject))}
        probes = self._subject.settings.probes
        values = np.zeros((len(pairs), self.steps, probes, self.size), np.float32)
        numbers = range(self._place.start, self._place.stop)
        shape = (probes, *self.image.shape[1:])
        drawn = drawn_probes(self._subject.settings.seed, numbers, shape)
        ends = [self._image_gradient(one) for one in torch.from_numpy(drawn)]
        later: list[list[Any]] = [[] for _ in range(probes)]
        for step in reversed(range(self.steps)):
            wanted = [self._tape.back(step, *each) for each in zip(ends, later, strict=True)]
            into: list[Any] = []
            for chunk, products, back in self._back(step, torch.stack(wanted)):
                columns = np.arange(chunk.start, chunk.stop) % self.size
                for layer, scheme, found in products:
                    held = values[pairs[layer, scheme], step]
                    np.add.at(held.T, columns, found.T)
                into.append(back)
            for number, rows in enumerate(later):
                rows.insert(0, torch.cat([one[number] for one in into]) if step else None)
            advance()
        return values

    def _image_gradient(self, end: Any) -> Any:
        final = self._tape.final
        return torch.autograd.grad(self.image, [final], [end], retain_graph=True)[0]

    def _chunks(self) -> list[slice]:
        rows = len(self._rows)
        return [slice(at, min(at + self._batch, rows)) for at in range(0, rows, self._batch)]

    def _calls(self, step: int, given: Array) -> RecordedCalls:
        """Return the model's calls at a step as if they had been recorded."""
        timestep = np.asarray(self._sampler.timesteps[step : step + 1], np.float32)
        calls = CallSet.of_samples(self._spec, given[None], timestep, self._rows, self._conditions)
        return RecordedCalls(calls, self._spec)

    def _output(self, step: int, given: Array) -> Array:
        calls, smaller = self._calls(step, given), partial(smaller_pieces, self._subject.calls())

        def run(probing: Probing, piece: Piece) -> Array:
            return probing.run(calls.feed(0, piece[0]))

        found = [self._work.run((chunk, self._parts), smaller, run) for chunk in self._chunks()]
        return np.concatenate([one for row in found for one in row])

    def _back(self, step: int, wanted: Any) -> list[tuple[slice, list[Any], Sequence[Any]]]:
        """Backpropagate the output gradients ``wanted`` [P, M, ...] of a step.

        Returns (chunk of rows, inner products, input gradients) for each chunk.
        """
        given = self._tape.fed[step].detach().numpy()
        calls, smaller = self._calls(step, given), partial(smaller_pieces, self._subject.calls())
        into = self._spec.sample.name if step else ""

        def back(probing: Probing, piece: Piece) -> tuple[slice, list[Any], list[Any]]:
            chunk, parts = piece

            def seeds(output: Any) -> list[Any]:
                return [one[chunk].to(output).reshape(output.shape) for one in wanted]

            size = chunk.stop - chunk.start
            products, rows = probing.back(calls.feed(0, chunk), parts, seeds, size, into)
            shape = (size, *given.shape[1:])
            zeros = [torch.zeros(shape)] * len(wanted) if into and not rows else []
            return chunk, products, zeros or [row.float().cpu().reshape(shape) for row in rows]

        found = [self._work.run((chunk, self._parts), smaller, back) for chunk in self._chunks()]
        return [one for row in found for one in row]


def _sampler(subject: Subject, sampling: Sampling, part: slice) -> Any:
    # Trajectories of different shards must get different noise from a stochastic sampler.
    seed = subject.settings.seed + part.start
    return make_sampler(subject.spec.scheduler, sampling.steps, seed, sampling.kind)
