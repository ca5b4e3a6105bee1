"""Recover a plan's model: train the student, keep its best state, write the plan's graphs again.

In: the exported float model, a plan's codes and scales. Out: the plan's graphs with other codes,
scales and constants, and a ``Recovery`` with the errors before and after. Nothing is added to the
graph, so its bytes are the plan's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mpq_deploy.calibrate.activation_shapes import activation_shapes, tensors_of
from mpq_deploy.calibrate.stats import CalibrationStats
from mpq_deploy.calls.recorded import CallSet, RecordedCalls
from mpq_deploy.errors import MpqError
from mpq_deploy.graph.dialects import Dialect
from mpq_deploy.graph.layers import LayerGraph
from mpq_deploy.graph.writers.deployed_graphs import SIMULATED, FloatGraph, write_quantized
from mpq_deploy.models.spec import DenoiserSpec
from mpq_deploy.recipe import RecoverSettings
from mpq_deploy.recover.checkpoint import restore_checkpoint, save_checkpoint
from mpq_deploy.recover.estimate import FLOAT32_BYTES, MemoryEstimate, estimate_memory
from mpq_deploy.recover.initialization import initialize_from_error
from mpq_deploy.recover.recovery_result import Recovery
from mpq_deploy.recover.student import Student
from mpq_deploy.recover.train import INITIAL_ROUND, Progress, Trainer
from mpq_deploy.recover.trained_weights import StartingWeight
from mpq_deploy.recover.training_trajectories import Trajectories, TrajectoryRecorder
from mpq_deploy.runtime.ort import OrtDenoiser
from mpq_deploy.system.compute import computing_on
from mpq_deploy.system.gpu_memory import Shrinking, free_bytes
from mpq_deploy.system.memory import Room, held_memory, memory_room
from mpq_deploy.system.progress import Talk

# Relative tolerance between the errors of the written graph and of the trained student: values on a
# rounding boundary may round differently.
WRITTEN_TOLERANCE = 0.02
# Trajectories, and timesteps of each, on which the gain of the adapters' start is chosen.
INITIAL_CALLS, INITIAL_STEPS = 8, 4
# Where a GPU runs out of memory even with this many segments, the CPU trains.
MOST_SEGMENTS = 32


@dataclass(frozen=True)
class RecoverTask:
    """What is recovered: the exported ``model``, its graph and spec, and a plan's ``starts``.

    ``recorded``, ``stats`` and ``beyond_fp16``: the results of calibration.
    """

    model: Path
    graph: LayerGraph
    spec: DenoiserSpec
    starts: Sequence[StartingWeight]
    recorded: CallSet
    stats: CalibrationStats
    beyond_fp16: tuple[str, ...] = ()


@dataclass(frozen=True)
class Recovered:
    """The student in its best state, the errors, and the held-out trajectories behind them."""

    student: Student
    recovery: Recovery
    held_out: Trajectories


def recover(
    task: RecoverTask,
    options: RecoverSettings,
    recorder: TrajectoryRecorder,
    talk: Talk,
    checkpoint: Path,
    key: str,
) -> Recovered:
    """Train and return the student in its best state, with the measured errors.

    ``checkpoint``: the file that gets the state after every check; training continues from it if it
    has the same ``key``. The caller removes it. Where the GPU's memory runs out, training continues
    with twice the segments (more recomputation in the backward pass), at last on the CPU. Raises
    UsageError where the estimated memory is not free.
    """

    def train(_: None, fitting: RecoverSettings) -> Recovered:
        return _trained(task, fitting, recorder, talk, checkpoint, key)

    (recovered,) = Shrinking(lambda: None, "recovery", talk).run(options, _more_segments, train)
    return recovered


def _more_segments(options: RecoverSettings) -> list[RecoverSettings]:
    """Return ``options`` with twice the segments, which halves the values held; [] at the limit."""
    segments = 2 * options.segments
    return [options.replace(segments=segments)] if segments <= MOST_SEGMENTS else []


def _trained(
    task: RecoverTask,
    options: RecoverSettings,
    recorder: TrajectoryRecorder,
    talk: Talk,
    checkpoint: Path,
    key: str,
) -> Recovered:
    check_memory(task, options, recorder.calls, talk)
    student = Student(task.model, task.spec, task.starts, task.stats, options)
    student.training_type = _training_type(student.device, options)
    starts: dict[str, int] | None = None
    trainer = Trainer(student, recorder, task.spec, options, talk)
    if options.initialization == "svd":
        pool = recorder.record(INITIAL_CALLS, options.seed, INITIAL_ROUND)
        chosen = initialize_from_error(student, _some_calls(student, trainer, pool))
        starts = {f"{gain:g}": count for gain, count in sorted(chosen.items())}
    if restore_checkpoint(trainer, checkpoint, key, talk):
        talk.line(f"  recovery continues from step {trainer.progress.step}")
    progress = trainer.train(lambda: save_checkpoint(trainer, checkpoint, key))
    if progress.stopped:
        talk.warn(f"recovery stopped: {progress.stopped}; the best state before it is kept")
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            parameter.copy_(progress.best[name])
    return Recovered(
        student, _recovery(progress, options, trainer.held_out, starts), trainer.held_out
    )


def write_recovered(
    task: RecoverTask, recovered: Recovered, folder: Path, dialect: Dialect | None = None
) -> int:
    """Write the graphs of the best state into ``folder``; return the bytes of their constants.

    Raises MpqError when the error of the written graph in ONNX Runtime is not the one that torch
    measured while training.
    """
    student, after = recovered.student, recovered.recovery.after
    written = write_quantized(
        FloatGraph(
            task.model,
            task.spec.timestep_name,
            task.spec.sample.name,
            student.learned_constants(),
            task.beyond_fp16,
        ),
        student.rewrites(task.starts),
        student.activation_scales(),
        folder,
        dialect,
    )
    error = measured_error(folder / SIMULATED, task, recovered.held_out)
    if abs(error - after) > WRITTEN_TOLERANCE * after:
        raise MpqError(
            f"The recovered graph has a held-out NMSE of {error:.3e} in ONNX Runtime, {after:.3e} in torch.",
            "This is a bug: please report it with the model's structure.",
        )
    return written


def measured_error(graph: Path, task: RecoverTask, held_out: Trajectories) -> float:
    """Return a written graph's NMSE on ``held_out`` in ONNX Runtime, mean over timesteps."""
    denoiser = OrtDenoiser(graph, task.spec, fake_quant_only=True)
    calls = RecordedCalls(held_out.calls, task.spec)
    squares = np.zeros(len(held_out.energy))
    for batch in calls.batches(16):
        error = denoiser.run(batch.feed) - held_out.outputs[batch.step, batch.calls]
        squares[batch.step] += float(np.square(error, dtype=np.float64).sum())
    return float(np.mean(squares / (held_out.energy * held_out.calls.count)))


def _training_type(device: torch.device, options: RecoverSettings) -> torch.dtype:
    """Return the type of training's forward passes: bfloat16 on a GPU that has it, or on demand."""
    own = options.precision == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported()
    return torch.bfloat16 if own or options.precision == "bfloat16" else torch.float32


def expected_memory(
    task: RecoverTask, options: RecoverSettings, steps: int, talk: Talk
) -> MemoryEstimate:
    """Estimate the memory of training from the layers' shapes and one forward pass.

    ``steps``: calls of one trajectory (with guidance two per sampler step).
    """
    names = tuple(name for name in tensors_of(task.graph.model) if name)
    shapes = activation_shapes(
        task.graph, RecordedCalls(task.recorded, task.spec), talk, names=names
    )
    return estimate_memory(
        [(len(start.weight), start.weight.shape[1]) for start in task.starts],
        options.rank,
        FLOAT32_BYTES * sum(shape.elements for shape in shapes.values()),
        options.batch_size,
        options.segments,
        # The factor 2: inputs and outputs.
        2
        * FLOAT32_BYTES
        * math.prod(task.spec.sample.shape)
        * steps
        * options.trajectories
        * options.replay,
    )


def check_memory(task: RecoverTask, options: RecoverSettings, steps: int, talk: Talk) -> None:
    """Raise UsageError for training that does not fit the free memory of the GPU or the machine."""
    estimate = expected_memory(task, options, steps, talk)
    free = free_bytes(computing_on().torch_device())
    if free is not None:
        estimate.refuse_too_large(Room(free, "the GPU"))
    else:
        estimate.refuse_too_large(memory_room(), held_memory())


def _some_calls(student: Student, trainer: Trainer, pool: Trajectories) -> list[dict[str, Any]]:
    """Return feeds of a batch of calls at each of ``INITIAL_STEPS`` evenly spaced timesteps."""
    calls = np.arange(min(trainer.batches.size, pool.calls.count))
    steps = np.linspace(0, len(pool.calls.timesteps) - 1, INITIAL_STEPS).round().astype(np.int64)
    return [
        student.feed(trainer.batches.of(pool, np.full(len(calls), step), calls).feeds)
        for step in steps
    ]


def _recovery(
    progress: Progress,
    options: RecoverSettings,
    held_out: Trajectories,
    starts: dict[str, int] | None,
) -> Recovery:
    return Recovery(
        steps=options.steps,
        best_step=progress.best_step,
        before=float(progress.before.mean()),
        after=progress.best_error,
        timesteps=tuple(float(t) for t in held_out.calls.timesteps),
        before_by_timestep=tuple(float(e) for e in progress.before),
        after_by_timestep=tuple(float(e) for e in progress.best_by_timestep),
        curve=tuple(progress.curve),
        stopped=progress.stopped,
        starts=starts,
    )
