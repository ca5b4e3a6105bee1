"""Recover a plan's model: train, keep the best state, write it in the forms of the plan.

In: the exported float model, a plan's codes and scales. Out: the graphs of the plan with other
numbers in them, and a ``Recovery`` that says what it brought. Nothing is added to the graph, so the
bytes are the plan's.
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

# The written graph's error may differ from the trained one's by this share of it: values on a
# rounding boundary.
WRITTEN_TOLERANCE = 0.02
# Calls on which the adapters' start is chosen.
INITIAL_CALLS, INITIAL_STEPS = 8, 4
# Where a GPU cannot hold even so small a part of the values at once, the CPU trains.
MOST_SEGMENTS = 32


@dataclass(frozen=True)
class RecoverTask:
    """What is recovered: the exported ``model``, its description, and a plan's ``starts``.

    ``recorded``, ``stats`` and ``beyond_fp16`` are calibration's.
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
    """The student in its best state, what was measured, and the trajectories that decided."""

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
    """Train and return the student in its best state, with what was measured.

    ``checkpoint``: where to save the state after every check, and to go on from if a state of the
    same ``key`` is there; removed at the end by whoever keeps the result. Where the GPU's memory
    runs out, more of the graph is computed again, and the CPU trains at last. Raises UsageError
    where memory will not do.
    """

    def train(_: None, fitting: RecoverSettings) -> Recovered:
        return _trained(task, fitting, recorder, talk, checkpoint, key)

    (recovered,) = Shrinking(lambda: None, "recovery", talk).run(options, _more_segments, train)
    return recovered


def _more_segments(options: RecoverSettings) -> list[RecoverSettings]:
    """Halve what the backward pass holds of the values."""
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
    """Write the graphs of the best state into ``folder``; return their bytes of constants.

    Raises MpqError when ONNX Runtime does not measure on the written graph what torch measured
    while training.
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
    """Return the NMSE of a written graph on ``held_out``, mean over timesteps, by ONNX Runtime."""
    denoiser = OrtDenoiser(graph, task.spec, fake_quant_only=True)
    calls = RecordedCalls(held_out.calls, task.spec)
    squares = np.zeros(len(held_out.energy))
    for batch in calls.batches(16):
        error = denoiser.run(batch.feed) - held_out.outputs[batch.step, batch.calls]
        squares[batch.step] += float(np.square(error, dtype=np.float64).sum())
    return float(np.mean(squares / (held_out.energy * held_out.calls.count)))


def _training_type(device: torch.device, options: RecoverSettings) -> torch.dtype:
    """Return bfloat16 on a GPU that has it, elsewhere on demand."""
    own = options.precision == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported()
    return torch.bfloat16 if own or options.precision == "bfloat16" else torch.float32


def expected_memory(
    task: RecoverTask, options: RecoverSettings, steps: int, talk: Talk
) -> MemoryEstimate:
    """Estimate the memory of training from the layers' shapes and one forward pass.

    ``steps``: calls of a trajectory, or twice as many with guidance.
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
        # Inputs and outputs.
        2
        * FLOAT32_BYTES
        * math.prod(task.spec.sample.shape)
        * steps
        * options.trajectories
        * options.replay,
    )


def check_memory(task: RecoverTask, options: RecoverSettings, steps: int, talk: Talk) -> None:
    """Refuse training that will not fit into the memory that is free. Raises UsageError."""
    estimate = expected_memory(task, options, steps, talk)
    free = free_bytes(computing_on().torch_device())
    if free is not None:
        estimate.refuse_too_large(Room(free, "the GPU"))
    else:
        estimate.refuse_too_large(memory_room(), held_memory())


def _some_calls(student: Student, trainer: Trainer, pool: Trajectories) -> list[dict[str, Any]]:
    """Return inputs at four timesteps spread over the trajectory."""
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
