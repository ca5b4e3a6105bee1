"""Trajectories of the float model for training, sampled in ONNX Runtime with new noise every round.

Teacher and student get the same x_t, and the float model makes the next x_t (as in EfficientDM). So
trajectories do not depend on the student and are recorded before training.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mpq_deploy.calls.loop import GuidedDenoiser, denoise, first_samples
from mpq_deploy.calls.recorded import CallSet, RecordedCalls, joined
from mpq_deploy.calls.sampler import make_sampler
from mpq_deploy.calls.script_calls import ScriptCalls
from mpq_deploy.calls.trajectories import cycled, cycled_rows
from mpq_deploy.errors import UsageError
from mpq_deploy.models.spec import Array, DenoiserSpec, FloatModel
from mpq_deploy.recipe import SamplerKind
from mpq_deploy.runtime.ort import OrtDenoiser
from mpq_deploy.system.progress import Talk


@dataclass(frozen=True)
class Trajectories:
    """Calls of the float denoiser along M trajectories of K steps.

    ``outputs`` float32 [K, N, ...] of the ``calls``, in denoising order; N = M, or 2 M with
    guidance.
    """

    calls: CallSet
    outputs: Array

    @property
    def energy(self) -> Array:
        """Mean over calls of the squared norm of the output, float64 [K]."""
        axes = tuple(range(2, self.outputs.ndim))
        return np.asarray(np.square(self.outputs, dtype=np.float64).sum(axis=axes).mean(axis=1))

    def followed_by(self, other: Trajectories, most: int) -> Trajectories:
        """Return these calls and those of ``other``; the last ``most`` rounds of that size."""
        first = max(0, self.calls.count - (most - 1) * other.calls.count)
        return Trajectories(
            joined([self.calls.take(np.arange(first, self.calls.count)), other.calls]),
            np.concatenate([self.outputs[:, first:], other.outputs], axis=1),
        )


class TrajectoryRecorder:
    """Samples trajectories of the float denoiser; (seed, round) determines the noise."""

    def __init__(
        self,
        model: FloatModel,
        steps: int,
        sampler: SamplerKind,
    ) -> None:
        self._model = model
        self._denoiser = OrtDenoiser.in_lanes(model.path, model.spec)
        self._spec, self._conditions = model.spec, model.conditions
        self._steps, self._kind = steps, sampler

    @property
    def calls(self) -> int:
        """How many calls one trajectory has: one per step, two with guidance."""
        if self._spec.pipeline is not None:
            # Most pipelines guide, with two calls per step.
            return 2 * self._steps
        guided = self._spec.uncond_row is not None and self._spec.guidance_scale != 1
        return (1 if self._spec.timestep is None else self._steps) * (1 + guided)

    def record(self, count: int, seed: int, number: int, held_out: bool = False) -> Trajectories:
        """Return ``count`` trajectories from the noise of round ``number``.

        A component without timesteps has given inputs in place of noise. The last fourth of its
        calibration inputs is for ``held_out``, which may give fewer than ``count``. Raises
        UsageError where there are fewer than two inputs.
        """
        noise_seed = int(np.random.SeedSequence((seed, number)).generate_state(1)[0])
        if self._model.calls is not None:
            return self._take_recorded(count, noise_seed, held_out)
        if self._model.pipeline is not None:
            return self._record_pipeline(count, noise_seed)
        sampler = make_sampler(self._spec.scheduler, self._steps, noise_seed, self._kind)
        recording = _Recording()
        batch = 16 if all(item.batched for item in self._spec.conditions) else 1
        rows = self._rows(count, noise_seed, held_out)
        denoiser = self._denoiser
        model = GuidedDenoiser(
            denoiser, self._spec, self._conditions, recording.on_call, denoiser.lanes
        )
        denoise(
            model,
            sampler,
            first_samples(self._spec, rows, self._conditions, noise_seed),
            rows,
            batch,
        )
        return recording.finish(self._spec, self._conditions)

    def _take_recorded(self, count: int, seed: int, held_out: bool) -> Trajectories:
        """Return calls that a script recorded; the last fourth of them are for ``held_out``."""
        assert self._model.calls is not None
        calls = ScriptCalls.open(self._model.calls).parts(self._steps)[0].only(self._spec)
        apart = max(1, calls.count // 4)
        if calls.count < 2:
            raise UsageError(
                "Recovery needs two recorded calls at least.", "Record more calls of the model."
            )
        if held_out:
            taken = np.arange(calls.count - apart, calls.count)[:count]
        else:
            taken = cycled(np.arange(calls.count - apart), count, seed)
        calls = calls.take(taken).compact()
        batches = RecordedCalls(calls, self._spec).batches(16)
        outputs: list[list[Array]] = [[] for _ in calls.timesteps]
        for batch in batches:
            outputs[batch.step].append(self._denoiser.run(batch.feed))
        return Trajectories(calls, np.stack([np.concatenate(step) for step in outputs]))

    def _record_pipeline(self, count: int, seed: int) -> Trajectories:
        """Return the calls of ``count`` images of the model's own pipeline."""
        from mpq_deploy.calls.record_pipeline import Runs, record_pipeline

        assert self._spec.pipeline is not None
        numbers = cycled(np.arange(len(self._spec.pipeline.calls)), count, seed)
        runs = Runs([int(one) for one in numbers], self._steps, seed)
        with tempfile.TemporaryDirectory() as folder:
            made = record_pipeline(
                self._model,
                runs,
                None,
                Path(folder),
                Talk(),
                self._denoiser.run,
                outputs=True,
                lanes=self._denoiser.lanes,
            )
            return Trajectories(made.calls.compact(), made.outputs)

    def _rows(self, count: int, seed: int, held_out: bool) -> Array:
        known = self._spec.calibration_rows
        if known is None:
            return cycled_rows(self._spec, self._conditions, count, seed)
        if known < 2:
            raise UsageError(
                f"Recovery needs at least two inputs, one to learn from and one held out; there is {known}.",
                "Raise component_samples.",
            )
        apart = max(1, known // 4)
        if held_out:
            return np.arange(known - apart, known, dtype=np.int64)[:count]
        return cycled_rows(
            self._spec.model_copy(update={"calibration_rows": known - apart}),
            self._conditions,
            count,
            seed,
        )


@dataclass
class _Recording:
    """Collects the denoiser's inputs and outputs by step index."""

    steps: dict[int, list[tuple[float, Array, Array, Array]]] = field(default_factory=dict)

    def on_call(
        self, step_index: int, timestep: float, model_input: Array, rows: Array, output: Array
    ) -> None:
        call = (timestep, model_input.astype(np.float32), output, rows.copy())
        self.steps.setdefault(step_index, []).append(call)

    def finish(self, spec: DenoiserSpec, conditions: dict[str, Array]) -> Trajectories:
        calls = list(self.steps.values())
        inputs, outputs = (
            np.stack([np.concatenate([call[place] for call in step]) for step in calls])
            for place in (1, 2)
        )
        timesteps = np.array([step[0][0] for step in calls], np.float32)
        rows = np.concatenate([call[3] for call in calls[0]]).astype(np.int64)
        return Trajectories(CallSet.of_samples(spec, inputs, timesteps, rows, conditions), outputs)
