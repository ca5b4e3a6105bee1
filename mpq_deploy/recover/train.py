"""The training loop: distil the float model into the quantized one, keep the best state.

All random numbers come from (seed, step), so that a step depends only on the state before it:
training that is interrupted continues from its checkpoint with the same result.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from mpq_deploy.models.spec import Array, DenoiserSpec
from mpq_deploy.recipe import RecoverSettings
from mpq_deploy.recover.batches import Batch, Batches, draw_weights, timestep_shares
from mpq_deploy.recover.losses import LossTerms
from mpq_deploy.recover.recovery_result import CurvePoint
from mpq_deploy.recover.student import Student
from mpq_deploy.recover.training_trajectories import Trajectories, TrajectoryRecorder
from mpq_deploy.system.progress import Talk

Tensor = Any  # torch.Tensor; torch is not followed by mypy here
# Numbers of the rounds of noise for held-out trajectories and for initializing adapters; training
# uses the rounds 0, 1, 2, ...
HELD_OUT_ROUND, INITIAL_ROUND = 1 << 30, 1 + (1 << 30)
State = dict[str, Tensor]
BETAS = (0.9, 0.99)
# The plan's NMSE at which the learning rates are the recipe's, and the NMSE below which they do not
# decrease further (``error_factor``).
REFERENCE_ERROR, SMALLEST_ERROR = 1e-3, 1e-7


@dataclass
class Progress:
    """The training state beside parameters, optimizer and pixel memory.

    ``step``: updates made. ``before`` [K]: the plan's NMSE by timestep. ``best``: the parameters of
    minimum held-out error. ``stopped``: why training ended early.
    """

    step: int = 0
    before: Array = field(default_factory=lambda: np.empty(0))
    best_error: float = math.inf
    best_by_timestep: Array = field(default_factory=lambda: np.empty(0))
    best_step: int = 0
    best: State = field(default_factory=dict)
    curve: list[CurvePoint] = field(default_factory=list)
    stopped: str = ""


class Trainer:
    """A student with its optimizer and data; ``train`` runs all remaining steps."""

    def __init__(
        self,
        student: Student,
        recorder: TrajectoryRecorder,
        spec: DenoiserSpec,
        options: RecoverSettings,
        talk: Talk,
    ) -> None:
        self.student, self.options, self.talk = student, options, talk
        self._recorder = recorder
        self.batches = Batches(spec, options.batch_size)
        self.held_out = recorder.record(
            options.held_out, options.seed, HELD_OUT_ROUND, held_out=True
        )
        # The trajectories that batches are drawn from, and the number of their newest round.
        self._pool: Trajectories | None = None
        self._newest = -1
        self.losses = LossTerms(
            spec, options, self.held_out.energy, int(np.prod(self.held_out.outputs.shape[2:]))
        )
        self.optimizer = _optimizer(student, options)
        self.rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        self.progress = Progress()
        self._error_factor = 1.0

    def train(self, save: Callable[[], None] | None = None) -> Progress:
        """Train from ``progress`` to the last step; ``save`` is called after every check."""
        progress, options = self.progress, self.options
        if not len(progress.before):
            self._check()
        self._error_factor = error_factor(float(progress.before.mean()))
        shares = timestep_shares(progress.before, options.timesteps)
        weights = draw_weights(shares)
        started, first = time.monotonic(), progress.step
        with self.talk.bar("recover", options.steps) as advance:
            advance(progress.step)
            while progress.step < options.steps and not progress.stopped:
                rng = np.random.default_rng((options.seed, 1, progress.step))
                batch = self.batches.draw(self._trajectories(progress.step), shares, rng)
                values = self._update(batch, weights[batch.steps], rng)
                bad = [name for name, value in values.items() if not math.isfinite(value)]
                if bad:
                    progress.stopped = (
                        f"the loss '{bad[0]}' is {values[bad[0]]} at step {progress.step + 1}"
                    )
                    break
                progress.step += 1
                advance(1)
                if progress.step % options.check_every == 0 or progress.step == options.steps:
                    self._check(values)
                    self._report(values, (time.monotonic() - started) / (progress.step - first))
                    if save is not None:
                        save()
        return progress

    def _update(self, batch: Batch, weights: Array, rng: np.random.Generator) -> dict[str, float]:
        """Make one optimizer step unless a loss is not finite; return the losses by name."""
        factor = _schedule(self.progress.step, self.options) * self._error_factor
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        self.optimizer.zero_grad(set_to_none=True)
        terms = self.losses.terms(self.student, batch, weights, rng)
        found = torch.stack([term.detach() for term, _ in terms.values()]).cpu().tolist()
        values = dict(zip(terms, found, strict=True))
        if all(math.isfinite(value) for value in values.values()):
            total = sum(weight * term for term, weight in terms.values())
            assert isinstance(total, torch.Tensor)
            total.backward()
            self.optimizer.step()
        return values

    def _trajectories(self, step: int) -> Trajectories:
        """Return the trajectories that ``step`` learns from: the last ``replay`` rounds.

        A round depends on the seed and its number alone, so training that continues from a
        checkpoint records the same rounds again.
        """
        options, number = self.options, step // self.options.round_steps
        if self._pool is None or self._newest != number:
            oldest = max(0, number + 1 - options.replay)
            if not oldest <= self._newest <= number:
                self._pool = None
            for new in range(oldest if self._pool is None else self._newest + 1, number + 1):
                more = self._recorder.record(options.trajectories, options.seed, new)
                self._pool = (
                    more if self._pool is None else self._pool.followed_by(more, options.replay)
                )
            self._newest = number
        assert self._pool is not None
        return self._pool

    def _check(self, losses: dict[str, float] | None = None) -> None:
        """Measure the held-out error, and keep the state if it is the best so far."""
        progress = self.progress
        by_timestep = self.held_out_error()
        error = float(by_timestep.mean())
        if not len(progress.before):
            progress.before = by_timestep
        progress.curve.append(CurvePoint(progress.step, error, dict(losses or {})))
        if error < progress.best_error:
            progress.best_error, progress.best_step, progress.best_by_timestep = (
                error,
                progress.step,
                by_timestep,
            )
            progress.best = {
                name: value.detach().clone() for name, value in self.student.named_parameters()
            }

    def held_out_error(self) -> Array:
        """Return the NMSE of the student's output on the held-out trajectories, float64 [K]."""
        pool, errors = self.held_out, []
        count = pool.calls.count
        with torch.no_grad():
            for step in range(len(pool.calls.timesteps)):
                squared: Tensor = 0.0
                for start in range(0, count, self.batches.size):
                    calls = np.arange(start, min(start + self.batches.size, count))
                    batch = self.batches.of(pool, np.full(len(calls), step), calls)
                    output = self.student.run(self.student.feed(batch.feeds))[self.student.output]
                    expected = self.student.place(batch.expected)
                    squared = squared + (output - expected).double().square().sum()
                # One transfer per timestep: each transfer from a GPU waits for its queue.
                errors.append(float(squared.cpu()) / max(float(pool.energy[step]) * count, 1e-300))
        return np.array(errors)

    def _report(self, values: dict[str, float], seconds_per_step: float) -> None:
        progress = self.progress
        left = (self.options.steps - progress.step) * seconds_per_step
        losses = ", ".join(f"{name} {value:.2e}" for name, value in values.items())
        before, now = float(progress.before.mean()), progress.curve[-1].held_out_nmse
        self.talk.line(
            f"  step {progress.step} of {self.options.steps}: {losses}; held-out NMSE {now:.2e} (plan {before:.2e}); "
            f"{left:.0f} s left"
        )


def _optimizer(student: Student, options: RecoverSettings) -> torch.optim.AdamW:
    rates = {
        "adapters": options.adapter_rate / 2500,
        "weight_scales": options.scale_rate,
        "activation_scales": options.scale_rate,
        "constants": options.constant_rate,
        "factors": options.constant_rate,
    }
    groups: dict[float, list[torch.nn.Parameter]] = {}
    for kind, parameters in student.kinds().items():
        for parameter, unit in parameters:
            parameter.requires_grad_(rates[kind] > 0)
            if rates[kind] > 0:
                groups.setdefault(rates[kind] * unit, []).append(parameter)
    made = [{"params": parameters, "lr": rate} for rate, parameters in groups.items()]
    return torch.optim.AdamW(made, betas=BETAS, weight_decay=0.0, fused=True)


def error_factor(error: float) -> float:
    """Return the factor of all learning rates for a plan of NMSE ``error``: sqrt(error / 1e-3).

    The factor is at most 1. An update that changes the output by 1 % is small where the plan's
    error is 10 % of the output, and undoes a plan whose error is 1 %. Above an NMSE of 1e-3 (about
    two bits) larger rates only destabilize codes (our choice, from both bundled models).
    """
    return math.sqrt(min(max(error, SMALLEST_ERROR) / REFERENCE_ERROR, 1.0))


def _schedule(step: int, options: RecoverSettings) -> float:
    """Return the factor of all learning rates: linear warm-up times cosine decay to 0."""
    warm = min(1.0, (step + 1) / max(options.warmup, 1))
    return warm * 0.5 * (1 + math.cos(math.pi * step / options.steps))
