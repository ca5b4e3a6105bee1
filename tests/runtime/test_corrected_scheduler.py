"""The wrapped scheduler: the same bits with nothing to correct, and the float model's moments with something."""

from __future__ import annotations

import copy
import inspect
import math
from typing import Any

import numpy as np
import pytest

from mpq_deploy.errors import ModelError, UsageError
from mpq_deploy.runtime.corrected_scheduler import (
    PREDICTIONS,
    clean_slope,
    ddim_effect,
    ddpm_effect,
    noise_slope,
)
from mpq_deploy.runtime.correction import Correction, CorrectionStep

pytestmark = pytest.mark.torch

SLOPE, BIAS, SIGMA = 0.1, 0.3, 0.25
CLASSES = [
    "DDPMScheduler",
    "DDPMParallelScheduler",
    "DDIMScheduler",
    "DDIMParallelScheduler",
    "PNDMScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
    "LCMScheduler",
    "FlowMatchEulerDiscreteScheduler",
]
RANDOM = (
    "DDPMScheduler",
    "DDPMParallelScheduler",
    "EulerAncestralDiscreteScheduler",
    "LCMScheduler",
)


def identity(channels: int, prediction: str = "epsilon") -> Correction:
    """Return the correction that changes nothing."""
    step = CorrectionStep(
        timestep=0.0,
        slope=0.0,
        bias=(0.0,),
        residual_variance=0.0,
        applied=False,
        heldout_nmse_before=0.0,
        heldout_nmse_fitted=0.0,
    )
    return Correction(
        models={"m": ""},
        prediction_type=prediction,
        channels=channels,
        bias_per="scalar",
        steps=(step,),
    )


def known(
    slope: float, bias: float, variance: float, prediction: str = "epsilon", channels: int = 1
) -> Correction:
    """The same correction at every timestep; ``variance`` of the residual before the division by 1 + slope."""
    step = CorrectionStep(
        timestep=500.0,
        slope=slope,
        bias=(bias,),
        residual_variance=variance,
        applied=True,
        heldout_nmse_before=1.0,
        heldout_nmse_fitted=0.5,
    )
    return Correction(
        models={"m": "0"},
        prediction_type=prediction,
        channels=channels,
        bias_per="scalar",
        steps=(step,),
    )


def scheduler(name: str, **config: Any) -> Any:
    import diffusers

    return getattr(diffusers, name)(**config)


def wrapped(inner: Any, correction: Correction, **options: Any) -> Any:
    from mpq_deploy.runtime.corrected_scheduler import CorrectedScheduler

    return CorrectedScheduler(inner, correction, **options)


def sampled(moving: Any, name: str, steps: int = 5, **options: Any) -> Any:
    """A trajectory of a toy denoiser."""
    import torch

    moving.set_timesteps(steps)
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 3, 4, 4)).astype(np.float32))
    x = x * getattr(moving, "init_noise_sigma", 1.0)
    if name in RANDOM or options.get("eta"):
        options["generator"] = torch.Generator().manual_seed(3)
    for t in moving.timesteps:
        fed = moving.scale_model_input(x, t) if hasattr(moving, "scale_model_input") else x
        x = moving.step(
            torch.tanh(fed * (1 + float(t) / 1000)), t, x, return_dict=False, **options
        )[0]
    return x.numpy()


@pytest.mark.parametrize("name", CLASSES)
def test_nothing_to_correct_gives_the_same_bits(name: str) -> None:
    plain = sampled(scheduler(name), name)
    same = sampled(wrapped(scheduler(name), identity(3)), name)
    np.testing.assert_array_equal(same, plain)
    other = sampled(wrapped(scheduler(name), known(SLOPE, BIAS, 0.0, channels=3)), name)
    assert np.abs(other - plain).max() > 1e-3


@pytest.mark.parametrize("variance", [0.0, 1e-30])
def test_ddim_with_eta_draws_the_same_noise(variance: float) -> None:
    plain = sampled(scheduler("DDIMScheduler"), "DDIMScheduler", eta=1.0)
    inner = wrapped(scheduler("DDIMScheduler"), known(0.0, 0.0, variance, channels=3))
    np.testing.assert_array_equal(sampled(inner, "DDIMScheduler", eta=1.0), plain)


@pytest.mark.parametrize("name", CLASSES)
def test_a_known_slope_and_bias_are_undone_in_every_sampler(name: str) -> None:
    class Quantized:
        """Puts slope and bias on the output before the scheduler under test sees it."""

        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def __getattr__(self, attribute: str) -> Any:
            return getattr(self.inner, attribute)

        def step(self, output: Any, t: Any, x: Any, **options: Any) -> Any:
            return self.inner.step(output * (1 + SLOPE) + BIAS, t, x, **options)

    plain = sampled(scheduler(name), name)
    corrected = sampled(
        Quantized(wrapped(scheduler(name), known(SLOPE, BIAS, 0.0, channels=3))), name
    )
    wrong = sampled(Quantized(scheduler(name)), name)
    assert np.abs(corrected - plain).max() < 1e-4 * np.abs(plain).max()
    assert np.abs(wrong - plain).max() > 1e-2 * np.abs(plain).max()


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(("power", "previous"), [(0.3, 0.5), (0.01, 0.02), (0.9, 0.99)])
def test_ddim_of_eta_one_and_ddpm_have_the_same_effect(
    prediction: str, power: float, previous: float
) -> None:
    sigma = math.sqrt((1 - previous) / (1 - power) * (1 - power / previous))
    assert sum(ddim_effect(prediction, power, previous, sigma)) == pytest.approx(
        ddpm_effect(prediction, power, previous)
    )


def test_the_papers_formulas_for_epsilon() -> None:
    power, previous, sigma = 0.3, 0.5, 0.2
    alpha = power / previous
    assert ddpm_effect("epsilon", power, previous) ** 2 == pytest.approx(
        (1 - alpha) ** 2 / (alpha * (1 - power))
    )
    code = math.sqrt(1 - previous - sigma**2) - math.sqrt(previous * (1 - power) / power)
    assert sum(ddim_effect("epsilon", power, previous, sigma)) == pytest.approx(code)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_x_stays_the_sum_of_image_and_noise(prediction: str) -> None:
    power = 0.3
    together = math.sqrt(power) * clean_slope(prediction, power)
    assert together + math.sqrt(1 - power) * noise_slope(prediction, power) == pytest.approx(0.0)
    with pytest.raises(UsageError, match="flow"):
        clean_slope("flow_prediction", power)


def moments(moving: Any, output: Any, x: Any, timestep: int, **options: Any) -> tuple[float, float]:
    import torch

    generator = torch.Generator().manual_seed(5)
    found = moving.step(output, timestep, x, return_dict=False, generator=generator, **options)[0]
    return float(found.mean()), float(found.var())


CASES = [
    ("DDPMScheduler", {"variance_type": "fixed_small"}, {}),
    ("DDPMScheduler", {"variance_type": "fixed_large"}, {}),
    ("DDPMScheduler", {"variance_type": "fixed_small_log"}, {}),
    ("DDIMScheduler", {}, {"eta": 1.0}),
    ("DDIMScheduler", {}, {"eta": 0.7}),
]


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(("name", "config", "options"), CASES)
def test_a_step_has_the_float_models_moments(
    name: str, config: dict[str, Any], options: dict[str, Any], prediction: str
) -> None:
    """400,000 elements with the same x and float output: all variance is the sampler's and the residual's."""
    import torch

    inner = scheduler(name, clip_sample=False, prediction_type=prediction, **config)
    inner.set_timesteps(20)
    timestep, count = 500, 400_000
    x, clean = torch.full((1, 1, count), 0.8), torch.full((1, 1, count), -0.4)
    mean, spread = moments(inner, clean, x, timestep, **options)
    # What the output does to the next sample, from the scheduler itself; the residual is to bring 0.4 of the noise.
    effect = moments(inner, clean + 1, x, timestep, **options)[0] - mean
    variance = 0.4 * spread / effect**2
    residual = variance**0.5 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))
    quantized = (1 + SLOPE) * (clean + residual) + BIAS
    held = (1 + SLOPE) ** 2 * variance
    moving = wrapped(inner, known(SLOPE, BIAS, held, prediction))
    corrected = moments(moving, quantized, x, timestep, **options)
    left_in = moments(
        wrapped(inner, known(SLOPE, BIAS, 0.0, prediction)), quantized, x, timestep, **options
    )
    error = math.sqrt(2 / count)
    assert moving.last_step.noise_share == pytest.approx(0.4, rel=0.01)
    assert corrected[0] == pytest.approx(mean, abs=5 * math.sqrt(spread / count))
    assert corrected[1] == pytest.approx(spread, rel=5 * error)
    assert left_in[1] == pytest.approx(1.4 * spread, rel=5 * error)


def test_more_residual_than_noise_leaves_no_noise() -> None:
    import torch

    inner = scheduler("DDPMScheduler", clip_sample=False)
    inner.set_timesteps(20)
    moving = wrapped(inner, known(0.0, 0.0, 100.0))
    x = torch.ones(1, 1, 1000)
    _, spread = moments(moving, 0 * x, x, 500)
    assert spread < 1e-10
    assert moving.last_step.noise_share > 1
    # The wrapped scheduler is as it was.
    assert "_get_variance" not in vars(inner)
    assert moments(inner, 0 * x, x, 500)[1] > 0


def test_a_learned_variance_gives_way_too() -> None:
    import torch

    inner = scheduler("DDPMScheduler", clip_sample=False, variance_type="learned_range")
    inner.set_timesteps(20)
    count = 400_000
    x = torch.ones(1, 1, count)
    output = torch.cat([0 * x, 0.2 * x], dim=1)
    residual = SIGMA * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    moving = wrapped(inner, known(0.0, 0.0, SIGMA**2))
    mean, spread = moments(inner, output, x, 500)
    found = moments(moving, torch.cat([residual, 0.2 * x], dim=1), x, 500)
    assert moving.last_step.noise_share > 0.01
    assert found == (
        pytest.approx(mean, abs=5 * (spread / count) ** 0.5),
        pytest.approx(spread, rel=5 * 0.0023),
    )


def test_where_the_image_is_clipped_the_noise_stays() -> None:
    import torch

    inner = scheduler("DDPMScheduler", clip_sample=True)
    inner.set_timesteps(20)
    # epsilon of a large absolute value: every x_0 lies outside [-1, 1].
    output = torch.full((1, 1, 64), 9.0)
    x = torch.ones(1, 1, 64)
    moving = wrapped(inner, known(0.0, 0.0, SIGMA**2))
    assert moments(moving, output, x, 500) == moments(inner, output, x, 500)
    assert moving.last_step.noise_share == 0.0
    moving.step(x * 0.9, 500, x)
    assert moving.last_step.noise_share > 0


@pytest.mark.parametrize(
    ("correlation", "factor"), [(1.0, 1.0), (0.0, (1 - 3.0) ** 2 + 3.0**2), (-1.0, 25.0)]
)
def test_guidance_scales_the_residual(correlation: float, factor: float) -> None:
    """(1 - w) r_u + w r_c by hand, at w = 3."""
    import torch

    generator = torch.Generator().manual_seed(2)
    first, second = (torch.randn(400_000, generator=generator) for _ in range(2))
    other = correlation * first + math.sqrt(1 - correlation**2) * second
    assert float((-2.0 * first + 3.0 * other).var()) == pytest.approx(factor, rel=0.02)
    shares = []
    for options in ({}, {"guidance_scale": 3.0, "residual_correlation": correlation}):
        inner = scheduler("DDPMScheduler", clip_sample=False)
        inner.set_timesteps(20)
        moving = wrapped(inner, known(0.0, 0.0, 1e-4), **options)
        moving.step(torch.zeros(1, 1, 4), 500, torch.zeros(1, 1, 4))
        shares.append(moving.last_step.noise_share)
    assert shares[1] / shares[0] == pytest.approx(factor)


def test_it_says_what_applies() -> None:
    assert (
        "comes out of DDPMScheduler"
        in wrapped(scheduler("DDPMScheduler"), known(0, 0, 1)).variance_note
    )
    assert "eta > 0" in wrapped(scheduler("DDIMScheduler"), known(0, 0, 1)).variance_note
    for name, config in [
        ("EulerDiscreteScheduler", {}),
        ("DDPMScheduler", {"thresholding": True}),
        ("DDPMScheduler", {"variance_type": "fixed_large_log"}),
    ]:
        assert (
            "slope and bias only"
            in wrapped(scheduler(name, **config), known(0, 0, 1)).variance_note
        )


def test_everything_else_is_the_wrapped_schedulers() -> None:
    inner = scheduler("EulerDiscreteScheduler")
    moving = wrapped(inner, identity(3))
    moving.set_timesteps(4)
    assert moving.config is inner.config
    assert len(moving) == len(inner)
    assert inspect.signature(moving.step) == inspect.signature(inner.step)
    moving.set_begin_index(1)
    assert inner.begin_index == 1
    moving.is_scale_input_called = True
    assert inner.is_scale_input_called
    other = copy.deepcopy(moving)
    other.set_timesteps(7)
    assert (len(other.timesteps), len(moving.timesteps)) == (7, 4)


def test_half_precision_stays_half() -> None:
    import torch

    inner = scheduler("DDIMScheduler")
    inner.set_timesteps(4)
    x = torch.ones(1, 1, 4, 4, dtype=torch.float16)
    moved = wrapped(inner, known(SLOPE, BIAS, 1e-4)).step(
        x, inner.timesteps[0], x, return_dict=False
    )[0]
    assert moved.dtype == torch.float16


@pytest.mark.parametrize(
    ("config", "options", "words"),
    [
        ({"prediction_type": "v_prediction"}, {}, "expects v_prediction"),
        ({}, {"residual_correlation": 2.0}, "residual_correlation is 2"),
    ],
)
def test_mistakes_are_refused(config: dict[str, Any], options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        wrapped(scheduler("DDPMScheduler", **config), known(0, 0, 1), **options)


def test_other_channels_and_mixed_timesteps_are_refused() -> None:
    import torch

    inner = scheduler("DDPMScheduler")
    inner.set_timesteps(4)
    moving = wrapped(inner, identity(3))
    x = torch.zeros(2, 4, 2, 2)
    with pytest.raises(ModelError, match="4 channels"):
        moving.step(x, 500, x)
    with pytest.raises(UsageError, match="2 different timesteps"):
        moving.step(x[:, :3], torch.tensor([500, 250]), x[:, :3])


def test_in_a_pipeline_of_diffusers() -> None:
    import torch
    from diffusers import DDIMPipeline

    from tests.tiny_models import tiny_unet

    pipeline = DDIMPipeline(tiny_unet(num_class_embeds=None), scheduler("DDIMScheduler"))
    pipeline.set_progress_bar_config(disable=True)

    def images() -> Any:
        generator = torch.Generator().manual_seed(0)
        return pipeline(
            num_inference_steps=3, eta=0.5, generator=generator, output_type="np"
        ).images

    plain = images()
    inner = pipeline.scheduler
    pipeline.scheduler = wrapped(inner, identity(3))
    np.testing.assert_array_equal(images(), plain)
    pipeline.scheduler = wrapped(inner, known(SLOPE, BIAS, 0.01, channels=3))
    assert np.abs(images() - plain).max() > 1e-3
