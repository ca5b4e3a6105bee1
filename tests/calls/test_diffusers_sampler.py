"""Schedulers of diffusers as samplers: they give what diffusers' own loop gives, and repeat."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mpq_deploy.calls.diffusers_sampler import DiffusersSampler
from mpq_deploy.calls.sampler import make_sampler
from mpq_deploy.errors import UsageError
from tests.tiny_models import tiny_flow_scheduler

pytestmark = pytest.mark.torch

CLASSES = [
    "PNDMScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
    "DDPMScheduler",
    "LCMScheduler",
    "FlowMatchEulerDiscreteScheduler",
]


def model(x: np.ndarray[Any, Any], t: float) -> np.ndarray[Any, Any]:
    return np.tanh(x * np.float32(1 + t / 1000))


def ours(sampler: Any, noise: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    x = noise * np.float32(sampler.init_noise_sigma)
    for i, t in enumerate(sampler.timesteps):
        x = sampler.step(model(sampler.scale_model_input(x, i), t), i, x)
    return x


@pytest.mark.parametrize("name", CLASSES)
def test_equals_diffusers_own_loop(name: str) -> None:
    import diffusers
    import torch

    noise = np.random.default_rng(0).standard_normal((2, 3, 4, 4), np.float32)
    sampler = make_sampler({"_class_name": name}, 6, seed=3, kind="folder")
    scheduler = getattr(diffusers, name)()
    scheduler.set_timesteps(6)
    x = torch.from_numpy(noise) * getattr(scheduler, "init_noise_sigma", 1.0)
    generator = torch.Generator().manual_seed(3)
    random = name in ("EulerAncestralDiscreteScheduler", "DDPMScheduler", "LCMScheduler")
    for t in scheduler.timesteps:
        fed = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        output = torch.from_numpy(model(fed.numpy(), float(t)))
        options = {"generator": generator} if random else {}
        x = scheduler.step(output, t, x, return_dict=False, **options)[0]
    first, second = ours(sampler, noise), ours(sampler, noise)
    np.testing.assert_allclose(first, x.numpy(), atol=1e-6)
    np.testing.assert_array_equal(first, second)
    assert name in sampler.name


def test_the_seed_decides_the_noise_of_a_stochastic_sampler() -> None:
    noise = np.zeros((1, 1, 4, 4), np.float32)
    samples = [
        ours(make_sampler({"_class_name": "DDPMScheduler"}, 4, s, "folder"), noise) for s in (0, 1)
    ]
    assert np.abs(samples[0] - samples[1]).max() > 1e-3


def test_auto_takes_the_folders_own_class() -> None:
    assert "Euler" in make_sampler({"_class_name": "EulerDiscreteScheduler"}, 4).name


@pytest.mark.parametrize("name", ["EulerDiscreteSchedular", "UNet2DModel", "os"])
def test_unknown_classes_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match=name):
        make_sampler({"_class_name": name}, 4)


def test_the_nearest_class_is_named() -> None:
    with pytest.raises(UsageError, match="EulerDiscreteScheduler"):
        make_sampler({"_class_name": "EulerDiscreteSchedular"}, 4)


def test_a_learned_variance_is_left_out() -> None:
    sampler = make_sampler(
        {"_class_name": "DDPMScheduler", "variance_type": "learned_range"}, 4, kind="folder"
    )
    assert np.isfinite(ours(sampler, np.ones((1, 1, 2, 2), np.float32))).all()


def test_a_shift_by_image_size_is_left_to_the_pipeline() -> None:
    with pytest.raises(UsageError, match="by image size"):
        DiffusersSampler(tiny_flow_scheduler(use_dynamic_shifting=True), 5, 0)
