"""Images of one pipeline side by side are those that come one after the other, and so are their calls."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("diffusers")

import torch
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler

from mpq_deploy.calls import record_pipeline as record_module
from mpq_deploy.calls.pipeline_lanes import Image, images_in_lanes
from mpq_deploy.calls.pipeline_runs import PipelineRuns
from mpq_deploy.calls.record_pipeline import Runs, record_pipeline
from mpq_deploy.models.spec import Array
from mpq_deploy.system.progress import Talk

pytestmark = pytest.mark.torch
STEPS = 5


class NoisyPipeline(DiffusionPipeline):  # type: ignore[misc]
    """Draws noise from torch's own generator, and has a scheduler with state between steps."""

    def __init__(self, unet: torch.nn.Module, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    def __call__(self, num_inference_steps: int, generator: Any) -> Any:
        self.scheduler.set_timesteps(num_inference_steps)
        self._x = torch.randn(1, 3, 4, 4, generator=generator)
        for timestep in self.scheduler.timesteps:
            output = self.unet(self._x, timestep)
            self._x = self.scheduler.step(output, timestep, self._x).prev_sample
            self._x = self._x + 0.1 * torch.randn(self._x.shape)
        return (self._x,)


def runs() -> PipelineRuns:
    made = object.__new__(PipelineRuns)

    class Unet(torch.nn.Module):  # type: ignore[misc]
        def forward(self, x: Any, timestep: Any) -> Any:
            feeds = {"sample": x.numpy(), "timestep": np.full(1, float(timestep))}
            return torch.from_numpy(made._computed(feeds))

    made._pipeline = NoisyPipeline(Unet(), DPMSolverMultistepScheduler())
    made._calls, made.correction_note = [{}], ""
    return made


def compute(feeds: dict[str, Array]) -> Array:
    """Take the longer the smaller the sample's first value: images overtake each other."""
    sample = feeds["sample"]
    time.sleep(0.003 * float(1 / (1 + np.exp(sample.flat[0]))))
    return np.asarray(np.tanh(sample) + 1e-3 * feeds["timestep"][0], np.float32)


def images(lanes: int, of: Any = compute) -> list[Array]:
    wanted = [Image(0, seed, of) for seed in range(7)]
    return list(images_in_lanes(runs(), wanted, STEPS, lanes))


def test_images_are_the_same_in_any_number_of_lanes() -> None:
    state = torch.get_rng_state()
    alone = images(1)
    for lanes in (2, 4):
        np.testing.assert_array_equal(images(lanes), alone)
    assert torch.equal(torch.get_rng_state(), state)
    assert np.abs(alone[0] - alone[1]).max() > 0.1


def test_a_pipeline_within_a_pipeline_and_a_correction_go_one_by_one() -> None:
    plain = runs()
    assert plain.apart() is not None
    plain.correction_note = "corrected"
    assert plain.apart() is None
    nested = runs()
    nested._pipeline.inner = nested._pipeline
    assert nested.apart() is None


def test_the_first_image_that_fails_is_raised() -> None:
    def failing(feeds: dict[str, Array]) -> Array:
        if feeds["timestep"][0] < 500:
            raise ArithmeticError("not finite")
        return compute(feeds)

    for lanes in (1, 3):
        with pytest.raises(Exception, match="not finite"):
            images(lanes, failing)


def test_calls_are_recorded_in_the_order_of_the_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record_module, "PipelineRuns", lambda *_: runs())
    monkeypatch.setattr(record_module, "pipeline_folder", lambda model: Path())
    model: Any = SimpleNamespace(
        spec=SimpleNamespace(timestep_name="timestep", conditions=(), sizes=())
    )
    found = []
    for lanes in (1, 3):
        (folder := tmp_path / str(lanes)).mkdir()
        wanted = Runs([0] * 4, STEPS, 9)
        made = record_pipeline(model, wanted, 3, folder, Talk(), compute, True, lanes)
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        found.append((files, made.outputs.tobytes(), made.images.tobytes(), made.calls.timesteps))
    assert found[0][:3] == found[1][:3]
    np.testing.assert_array_equal(found[0][3], found[1][3])
