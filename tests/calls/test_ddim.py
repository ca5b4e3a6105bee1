"""The NumPy DDIM against diffusers' DDIMScheduler, over every option that both have."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mpq_deploy.calls.ddim import DdimSampler, betas_from_config, spaced_timesteps
from mpq_deploy.calls.sampler import make_sampler
from mpq_deploy.errors import UsageError
from tests.tiny_models import tiny_scheduler

OPTIONS: list[dict[str, Any]] = [
    {},
    {
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "clip_sample": False,
    },
    {"beta_schedule": "squaredcos_cap_v2"},
    {"trained_betas": np.linspace(1e-4, 0.03, 500).tolist(), "num_train_timesteps": 500},
    {"timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False},
    {"timestep_spacing": "trailing"},
    {"timestep_spacing": "linspace"},
    {"clip_sample": False},
    {"clip_sample_range": 2.5},
    {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 3.0},
    {"rescale_betas_zero_snr": True, "timestep_spacing": "leading"},
]
PREDICTIONS = ["epsilon", "v_prediction", "sample"]


def trajectory(sampler: Any, x: np.ndarray[Any, Any]) -> list[np.ndarray[Any, Any]]:
    """Samples after each step with a made-up denoiser that depends on sample and timestep."""
    seen = []
    for i, t in enumerate(sampler.timesteps):
        fed = sampler.scale_model_input(x, i)
        x = sampler.step(np.tanh(fed * np.float32(1 + t / 1000)), i, x)
        seen.append(x)
    return seen


@pytest.mark.torch
@pytest.mark.parametrize("steps", [7, 20])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")
def test_equals_diffusers(options: dict[str, Any], prediction: str, steps: int) -> None:
    config = tiny_scheduler(**options, prediction_type=prediction)
    ours = make_sampler(config, steps, kind="ddim")
    theirs = make_sampler(config, steps, kind="folder")
    np.testing.assert_array_equal(ours.timesteps, theirs.timesteps)
    assert ours.init_noise_sigma == theirs.init_noise_sigma
    noise = np.random.default_rng(0).standard_normal((3, 2, 4, 4), np.float32)
    for mine, other in zip(trajectory(ours, noise), trajectory(theirs, noise), strict=True):
        assert mine.dtype == np.float32
        assert np.abs(mine - other).max() <= 1e-5 * max(1.0, np.abs(other).max())


@pytest.mark.torch
@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_equals_diffusers_from_pure_noise(prediction: str) -> None:
    config = tiny_scheduler(
        rescale_betas_zero_snr=True, timestep_spacing="trailing", prediction_type=prediction
    )
    noise = np.random.default_rng(1).standard_normal((2, 1, 4, 4), np.float32)
    ours, theirs = (
        trajectory(make_sampler(config, 10, kind=k), noise)[-1] for k in ("ddim", "folder")
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.torch
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"])
def test_betas_equal_diffusers(schedule: str) -> None:
    from diffusers import DDPMScheduler

    theirs = DDPMScheduler(beta_schedule=schedule).betas.numpy()
    np.testing.assert_allclose(
        betas_from_config({"beta_schedule": schedule}), theirs, rtol=2e-6, atol=1e-9
    )


def test_a_perfect_noise_prediction_recovers_the_image() -> None:
    sampler = DdimSampler(tiny_scheduler(clip_sample=False, timestep_spacing="trailing"), 10)
    rng = np.random.default_rng(2)
    clean, noise = (rng.standard_normal((2, 3, 4, 4), np.float32) for _ in range(2))
    power = np.float32(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[-1])
    x = np.sqrt(power) * clean + np.sqrt(1 - power) * noise
    for i in range(10):
        x = sampler.step(noise, i, x)
    np.testing.assert_allclose(x, clean, atol=2e-3)


def test_ddpm_configuration_is_sampled_by_the_built_in_ddim() -> None:
    assert "built in" in make_sampler({"_class_name": "DDPMScheduler"}, 5).name


def test_latents_of_other_classes_are_not_clipped_by_default() -> None:
    sampler = make_sampler(
        {"_class_name": "PNDMScheduler", "prediction_type": "sample"}, 4, kind="ddim"
    )
    x = np.full((1, 1, 2, 2), 5.0, np.float32)
    last = len(sampler.timesteps) - 1
    np.testing.assert_allclose(sampler.step(x, last, x), x)


@pytest.mark.parametrize(
    ("config", "steps", "said"),
    [
        ({"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linaer"}, 5, "scaled_linear"),
        ({"_class_name": "DDIMScheduler", "timestep_spacing": "trailling"}, 5, "trailing"),
        ({"_class_name": "DDIMScheduler", "prediction_type": "epsilom"}, 5, "epsilon"),
        ({"_class_name": "DDIMScheduler"}, 1001, "1 to 1000"),
        ({"_class_name": "DDIMScheduler"}, 0, "at least 1"),
        ({"_class_name": "DDIMScheduler", "steps_offset": 1}, 1000, "fewer steps"),
        ({}, 5, "_class_name"),
        (
            {
                "_class_name": "DDIMScheduler",
                "rescale_betas_zero_snr": True,
                "timestep_spacing": "trailing",
            },
            5,
            "noise",
        ),
    ],
)
def test_wrong_configurations_are_named(config: dict[str, Any], steps: int, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        make_sampler(config, steps)


def test_flow_matching_has_no_ddim() -> None:
    with pytest.raises(UsageError, match="flow"):
        make_sampler({"_class_name": "FlowMatchEulerDiscreteScheduler"}, 5, kind="ddim")


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [1, 3, 50, 1000])
def test_timesteps_fall(spacing: str, steps: int) -> None:
    timesteps = spaced_timesteps({"timestep_spacing": spacing}, steps)
    assert len(timesteps) == steps
    assert (np.diff(timesteps) < 0).all() and timesteps[0] <= 999 and timesteps[-1] >= 0
