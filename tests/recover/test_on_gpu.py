"""Training on a GPU that only computes shapes: one device, and only losses and results are fetched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mpq_deploy.recipe import RecoverSettings
from mpq_deploy.recover import recover as recover_module
from mpq_deploy.recover.initialization import initialize_from_error
from mpq_deploy.recover.recover import recover
from mpq_deploy.recover.student import Student
from mpq_deploy.recover.train import Trainer
from mpq_deploy.system.compute import Compute, compute_on, computing_on
from mpq_deploy.system.progress import Talk
from tests.fake_gpu import CPU, fake_gpu
from tests.recover.cases import Case, make_case, normed_denoiser

pytestmark = pytest.mark.torch
STEPS = 2
OPTIONS = RecoverSettings(
    steps=STEPS, batch_size=4, trajectories=4, held_out=4, check_every=STEPS, rank=4, warmup=1
)
LOSSES = {"output": 1.0, "relation": 0.01, "memory": 0.1}


@pytest.mark.parametrize("segments", [1, 3])
@pytest.mark.parametrize(
    ("wanted", "losses"),
    [
        ("w8a8", LOSSES),
        ("w8a8-timestep", {"output": 1.0}),
        ("w4a8+rows1", {"output": 1.0}),
        ("w8a8+cols1", {"output": 1.0}),
        ("w4a16+lowrank8", {"output": 1.0}),
        ("w4a8+scale5", {"output": 1.0}),
    ],
)
def test_training_fetches_losses_and_errors(
    case: Case,
    wanted: str,
    losses: dict[str, float],
    segments: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    task = case.planned(wanted)
    assert any(start.matrix is not None for start in task.starts)
    options = OPTIONS.replace(losses=losses, segments=segments)
    with fake_gpu(monkeypatch) as gpu:
        student = Student(task.model, task.spec, task.starts, task.stats, options)
        trainer = Trainer(student, case.recorder(), task.spec, options, Talk())
        monkeypatch.setattr(trainer.optimizer, "step", lambda: None)
        gpu.fetched = 0
        progress = trainer.train()
    assert progress.step == STEPS and not progress.stopped
    # Of every step its losses; of both checks the error of each timestep.
    assert gpu.fetched == STEPS + 2 * len(trainer.held_out.calls.timesteps)


def test_adapters_start_from_errors_that_are_fetched_layer_by_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = make_case(tmp_path, normed_denoiser()).planned("w8a8+scale5")
    arrays = {"sample": np.ones((2, 3, 8, 8), np.float32), "timestep": np.ones(2, np.float32)}
    with fake_gpu(monkeypatch) as gpu:
        student = Student(task.model, task.spec, task.starts, task.stats, OPTIONS)
        initialize_from_error(student, [student.feed(arrays)])
        # The error of its weight, and those of all starts of its adapter.
        assert gpu.fetched == 2 * len(student.layers)


@pytest.mark.parametrize("fails", [1, 99])
def test_where_memory_runs_out_more_is_computed_again(
    case: Case, fails: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In more segments, on the CPU at last: the same state as on the CPU from the start."""
    task, lines, left = case.planned("w4a16"), list[str](), [fails]

    def trained(folder: str) -> Any:
        talk = Talk()
        monkeypatch.setattr(talk, "line", lines.append)
        return recover(task, OPTIONS, case.recorder(), talk, tmp_path / folder, "key").recovery

    expected, original = trained("cpu"), Trainer.train

    def refusing(trainer: Trainer, save: Any) -> Any:
        if computing_on().torch is not None and left[0]:
            left[0] -= 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return original(trainer, save)

    monkeypatch.setattr(Compute, "torch_device", lambda _: CPU)
    monkeypatch.setattr(recover_module.Trainer, "train", refusing)
    with compute_on(Compute(None, 0)):
        found = trained("gpu")
    assert found.after == pytest.approx(expected.after, rel=1e-4)
    told = [line for line in lines if "the GPU's memory ran out" in line]
    assert told[-1].endswith("the batch is halved" if fails == 1 else "the rest runs on the CPU")
