"""Schedulers in NumPy beside diffusers' own, over their settings; the same noise goes into both."""

from __future__ import annotations

from typing import Any
from unittest import mock

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from mpq_deploy.device.generate.schedulers import SCHEDULERS, scheduler_from_config
from mpq_deploy.errors import InputError, UsageError

SHAPE = (2, 4, 4, 4)
BOOL = st.booleans()
COMMON = {
    "num_train_timesteps": st.sampled_from([100, 1000]),
    "beta_start": st.sampled_from([1e-4, 0.00085]),
    "beta_end": st.sampled_from([0.012, 0.02]),
    "beta_schedule": st.sampled_from(["linear", "scaled_linear", "squaredcos_cap_v2"]),
    "prediction_type": st.sampled_from(["epsilon", "v_prediction", "sample"]),
    "timestep_spacing": st.sampled_from(["leading", "trailing", "linspace"]),
    "steps_offset": st.sampled_from([0, 1]),
    "rescale_betas_zero_snr": BOOL,
}
CLIP = {
    "clip_sample": BOOL,
    "clip_sample_range": st.sampled_from([1.0, 2.5]),
    "thresholding": BOOL,
    "sample_max_value": st.sampled_from([1.0, 1.5]),
}
NUMPY_2 = not np.__version__.startswith("1.")
CONVERSIONS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")
ONE_CONVERSION = st.sampled_from([{}, *({name: True} for name in CONVERSIONS[:3])])
FINAL = {"final_sigmas_type": st.sampled_from(["zero", "sigma_min"])}
SOLVER = {
    **COMMON,
    **FINAL,
    "prediction_type": st.sampled_from(["epsilon", "v_prediction", "sample", "flow_prediction"]),
    "solver_order": st.sampled_from([1, 2, 3]),
    "lower_order_final": BOOL,
    "thresholding": BOOL,
    "use_flow_sigmas": BOOL,
    "flow_shift": st.sampled_from([1.0, 3.0]),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "DDIMScheduler": {**COMMON, **CLIP, "set_alpha_to_one": BOOL},
    "DDPMScheduler": {
        **COMMON,
        **CLIP,
        "beta_schedule": st.sampled_from(["linear", "squaredcos_cap_v2", "laplace", "sigmoid"]),
        "variance_type": st.sampled_from(["fixed_small", "fixed_small_log", "fixed_large"]),
    },
    "PNDMScheduler": {
        **{key: COMMON[key] for key in COMMON if key != "rescale_betas_zero_snr"},
        "prediction_type": st.sampled_from(["epsilon", "v_prediction"]),
        "set_alpha_to_one": BOOL,
        "skip_prk_steps": st.just(True),
    },
    "LCMScheduler": {**COMMON, **CLIP, "set_alpha_to_one": BOOL},
    "EulerDiscreteScheduler": {
        **COMMON,
        **FINAL,
        "interpolation_type": st.sampled_from(["linear", "log_linear"]),
        "sigma_max": st.sampled_from([None, 10.0]),
    },
    "EulerAncestralDiscreteScheduler": {
        **COMMON,
        "prediction_type": st.sampled_from(["epsilon", "v_prediction"]),
    },
    "DPMSolverMultistepScheduler": {
        **SOLVER,
        "algorithm_type": st.sampled_from(["dpmsolver++", "sde-dpmsolver++"]),
        "solver_type": st.sampled_from(["midpoint", "heun"]),
        "euler_at_final": BOOL,
        "use_lu_lambdas": BOOL,
        "lambda_min_clipped": st.sampled_from([-float("inf"), -5.1]),
    },
    "UniPCMultistepScheduler": {
        **SOLVER,
        "predict_x0": BOOL,
        "solver_type": st.sampled_from(["bh1", "bh2"]),
        "disable_corrector": st.sampled_from([[], [0], [0, 2]]),
    },
    "FlowMatchEulerDiscreteScheduler": {
        "num_train_timesteps": st.sampled_from([100, 1000]),
        "shift": st.sampled_from([1.0, 3.0]),
        "use_dynamic_shifting": BOOL,
        "shift_terminal": st.sampled_from([None, 0.02]),
        "time_shift_type": st.sampled_from(["exponential", "linear"]),
        "stochastic_sampling": BOOL,
        "invert_sigmas": BOOL,
    },
}
CONVERTS = [name for name in SETTINGS if "final_sigmas_type" in SETTINGS[name]]
CONVERTS.append("FlowMatchEulerDiscreteScheduler")


# Functions that torch rounds otherwise on some processors, in the last bit.
ROUNDED = {getattr(torch.ops.aten, name).default for name in ("sqrt", "log", "exp", "expm1")}


class Rounded(TorchDispatchMode):
    """Elementary functions rounded to nearest, the same on every processor.

    Zero SNR takes differences of roots, and UniPC's weights differences of logarithms: diffusers'
    own samples differ there from machine to machine by more than 1e-5.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        rounds = func in ROUNDED or (func is torch.ops.aten.pow.Tensor_Scalar and args[1] == 0.5)
        if rounds and args[0].is_floating_point():
            return func(args[0].double(), *args[1:]).to(args[0].dtype)
        return func(*args, **(kwargs or {}))


def noises(seed: int, count: int) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [random.standard_normal(SHAPE).astype(np.float32) for _ in range(count)]


def drawn_from(arrays: list[np.ndarray]) -> Any:
    left = iter(arrays)
    return lambda *args, **kwargs: next(left)


def theirs(config: dict[str, Any], steps: int, sigmas: Any, mu: float | None) -> Any:
    """diffusers' scheduler, set to ``steps``; a combination that it refuses is not compared."""
    given = {"sigmas": sigmas, "mu": mu} if mu is not None else {}
    with Rounded():
        scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
        scheduler.set_timesteps(steps, **given)
    return scheduler


def trajectory(scheduler: Any, is_torch: bool, start: int, seed: int) -> list[np.ndarray]:
    """Every sample and every scaled input of a run from noise whose "denoiser" gives other noise."""
    sample, *outputs = noises(seed, 1 + len(scheduler.timesteps))
    added = noises(seed + 1, len(scheduler.timesteps) + 1)
    seen = []
    if is_torch:
        module = type(scheduler).__module__
        draw = drawn_from([torch.from_numpy(one) for one in added])
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(start)
        patched = (
            mock.patch(f"{module}.randn_tensor", draw)
            if hasattr(__import__(module, fromlist=["x"]), "randn_tensor")
            else mock.MagicMock()
        )
        with patched, Rounded():
            value = torch.from_numpy(sample)
            for timestep, output in zip(scheduler.timesteps[start:], outputs):
                if hasattr(scheduler, "scale_model_input"):
                    seen.append(scheduler.scale_model_input(value, timestep).numpy())
                value = scheduler.step(
                    torch.from_numpy(output) * 0.7, timestep, value, return_dict=False
                )[0]
                seen.append(value.numpy())
        return seen
    draw = drawn_from(added)
    scheduler.begin(start)
    for output in outputs[: len(scheduler.timesteps) - start]:
        seen.append(scheduler.scaled_input(sample))
        sample = scheduler.step(output * np.float32(0.7), sample, draw)
        assert sample.dtype == np.float32
        seen.append(sample)
    return seen


def settled(config: dict[str, Any]) -> bool:
    """Whether the timesteps of converted sigmas are no matter of diffusers' own last bits.

    It looks them up in float32 under NumPy 1, in float64 under NumPy 2, and cuts some to integers;
    and a sigma has two where the last alpha, which replaces 0, is not the least.
    """
    if not any(config.get(name) for name in CONVERSIONS):
        return True
    scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
    alphas = getattr(scheduler, "alphas_cumprod", torch.zeros(1))
    return NUMPY_2 and bool((torch.diff(alphas) < 0).all())


def compare(config: dict[str, Any], steps: int, start: int = 0, seed: int = 0) -> None:
    mu = 0.8 if config.get("use_dynamic_shifting") else None
    sigmas = np.linspace(1.0, 1 / steps, steps) if mu else None
    try:
        reference = theirs(config, steps, sigmas, mu)
    except (ValueError, RuntimeError, IndexError, AssertionError):
        assume(False)
    assume(bool(np.isfinite(reference.timesteps.numpy()).all()))
    assume(config.get("prediction_type") != "flow_prediction" or config.get("predict_x0", True))
    own = scheduler_from_config(config)
    own.set_timesteps(steps, sigmas, mu)
    assert own.timesteps.shape == tuple(reference.timesteps.shape)
    np.testing.assert_allclose(own.timesteps, reference.timesteps.numpy(), rtol=1e-5, atol=1e-4)
    start = min(start, len(own.timesteps) - 1)
    try:
        with np.errstate(all="ignore"):
            expected = trajectory(reference, True, start, seed)
    except (IndexError, RuntimeError, ValueError):
        assume(False)
    assume(all(np.isfinite(one).all() for one in expected))
    if hasattr(reference, "init_noise_sigma"):
        np.testing.assert_allclose(
            own.init_noise_sigma, float(reference.init_noise_sigma), rtol=1e-5
        )
    with np.errstate(all="ignore"):
        got = trajectory(own, False, start, seed)
    if not hasattr(reference, "scale_model_input"):
        got = got[1::2]
    # UniPC of order 3 on noise solves for weights that cancel in float32, in torch and here alike.
    cancels = config.get("solver_order") == 3 and not (NUMPY_2 and config.get("predict_x0", True))
    tolerance = 1e-4 if cancels else 1e-5
    for one, other in zip(got, expected, strict=True):
        scale = max(1.0, float(np.abs(other).max()))
        assert float(np.abs(one - other).max()) <= tolerance * scale


@pytest.mark.parametrize("name", SETTINGS)
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_every_step_is_diffusers_own(name: str, data: st.DataObject) -> None:
    config = {key: data.draw(values, key) for key, values in SETTINGS[name].items()}
    if name in CONVERTS:
        config |= data.draw(ONE_CONVERSION, "conversion")
    assume(settled({"_class_name": name, **config}))
    steps = data.draw(st.integers(1, 17), "steps")
    start = data.draw(st.integers(0, 3), "start")
    compare({"_class_name": name, **config}, steps, start, data.draw(st.integers(0, 9), "seed"))


@pytest.mark.parametrize("name", CONVERTS)
@pytest.mark.parametrize("kind", ["karras", "exponential", "beta"])
def test_ends_of_converted_sigmas_are_read_from_the_file_of_any_class(name: str, kind: str) -> None:
    ends = {"sigma_min": 0.05, "sigma_max": 0.9}
    for set_ends in (ends, {"sigma_min": 0.05, "sigma_max": None}):
        compare({"_class_name": name, f"use_{kind}_sigmas": True, **set_ends}, 5)


@pytest.mark.parametrize("name", list(SETTINGS))
def test_added_noise_is_diffusers_own(name: str) -> None:
    config = {"_class_name": name, "skip_prk_steps": True}
    reference = theirs(config, 10, None, None)
    own = scheduler_from_config(config)
    own.set_timesteps(10)
    if hasattr(reference, "set_begin_index"):
        reference.set_begin_index(4)
    own.begin(4)
    image, noise = noises(3, 2)
    add = getattr(reference, "add_noise", None) or (
        lambda original, random, timestep: reference.scale_noise(original, timestep, random)
    )
    expected = add(torch.from_numpy(image), torch.from_numpy(noise), reference.timesteps[4:5])
    np.testing.assert_allclose(own.add_noise(image, noise), expected.numpy(), atol=1e-5)


def test_lcm_schedule_depends_on_the_strength() -> None:
    config = {"_class_name": "LCMScheduler"}
    reference = diffusers.LCMScheduler.from_config(config)
    reference.set_timesteps(4, strength=0.5)
    own = scheduler_from_config(config)
    own.set_timesteps(4, strength=0.5)
    assert own.timesteps.tolist() == reference.timesteps.tolist()


def test_another_scheduler_is_refused_with_the_nearest() -> None:
    with pytest.raises(InputError, match="'DEISMultistepScheduler' is not here") as caught:
        scheduler_from_config({"_class_name": "DEISMultistepScheduler"})
    assert "The nearest is DPMSolverMultistepScheduler" in caught.value.hint
    # Left out, diffusers takes Runge-Kutta steps.
    with pytest.raises(InputError, match="skip_prk_steps = False"):
        scheduler_from_config({"_class_name": "PNDMScheduler"})
    with pytest.raises(InputError) as caught:
        scheduler_from_config({"_class_name": "DDIMInverseScheduler"})
    assert "The nearest is DDIMScheduler" in caught.value.hint


@pytest.mark.parametrize(
    "wrong",
    [
        {"beta_schedule": "sigmoid"},
        {"prediction_type": "flow"},
        {"clip_sample": "yes"},
        {"beta_end": float("nan")},
        {"beta_start": -0.1},
        {"num_train_timesteps": 10**9},
        {"trained_betas": [0.1]},
        {"trained_betas": 3},
        {"zeta": 3},
    ],
)
def test_a_setting_that_is_not_supported_is_refused_by_name_and_value(
    wrong: dict[str, Any],
) -> None:
    with pytest.raises(InputError) as caught:
        scheduler_from_config({"_class_name": "DDIMScheduler", **wrong})
    (key,) = wrong
    assert f"DDIMScheduler with {key} = " in caught.value.message


def test_settings_of_other_classes_are_passed_over_as_diffusers_does() -> None:
    scheduler_from_config({"_class_name": "DDIMScheduler", "skip_prk_steps": True, "_x": 1})
    assert set(SCHEDULERS) == set(SETTINGS)


def test_more_steps_than_the_model_has_are_refused() -> None:
    with pytest.raises(UsageError, match="cannot make 1001 steps"):
        scheduler_from_config({"_class_name": "DDIMScheduler"}).set_timesteps(1001)
    # One timestep beyond the last: diffusers ends in an IndexError.
    beyond = {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "steps_offset": 1}
    with pytest.raises(UsageError, match="from timestep 1000 to 1, and there are 0 to 999"):
        scheduler_from_config(beyond).set_timesteps(1000)
    # Below the first: PyTorch takes the last one's noise there.
    with pytest.raises(UsageError, match="to -1, and there are 0 to 999"):
        scheduler_from_config({"_class_name": "DDIMScheduler", "steps_offset": -1}).set_timesteps(5)
    flow = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift_terminal": 0.02}
    with pytest.raises(UsageError, match="give no timesteps for 1 steps"):
        scheduler_from_config(flow).set_timesteps(1)
    with pytest.raises(UsageError, match="LCMScheduler cannot make 30 steps"):
        scheduler_from_config({"_class_name": "LCMScheduler"}).set_timesteps(30, strength=0.5)
