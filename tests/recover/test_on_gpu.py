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
        ("w8a8timestep", {"output": 1.0}),
        ("w4a8+rows1", {"output": 1.0}),
        ("w4a16+cols1", {"output": 1.0}),
        ("w2a16", {"output": 1.0}),
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
