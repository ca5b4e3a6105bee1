"""The denoising loop: batching, guidance, recording, learned variance."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mpq_deploy.calls.loop import GuidedDenoiser, denoise, initial_noise
from mpq_deploy.calls.sampler import make_sampler
from mpq_deploy.errors import ModelError
from mpq_deploy.models.spec import DenoiserSpec, InputSpec
from tests.tiny_models import tiny_scheduler

Array = np.ndarray[Any, Any]
SPEC = DenoiserSpec(
    name="made-up",
    source="test",
    sample=InputSpec(name="sample", shape=(2, 4, 4)),
    timestep=InputSpec(name="timestep"),
    conditions=(InputSpec(name="shift"),),
    scheduler=tiny_scheduler(),
)
CONDITIONS = {"shift": np.float32([0.0, 0.5, -0.5])}
ROWS = np.array([0, 1, 2, 1, 0])


def shifting(sample: Array, timestep: Any, conditions: dict[str, Array]) -> Array:
    return np.asarray(0.5 * sample + conditions["shift"][:, None, None, None], np.float32)


def run(
    spec: DenoiserSpec = SPEC, batch_size: int = 8, denoiser: Any = shifting, on_call: Any = None
) -> Array:
    sampler = make_sampler(spec.scheduler, 4)
    noise = initial_noise(spec, len(ROWS), 0)
    return denoise(
        GuidedDenoiser(denoiser, spec, CONDITIONS, on_call), sampler, noise, ROWS, batch_size
    )


def test_the_batch_size_does_not_matter() -> None:
    np.testing.assert_array_equal(run(batch_size=8), run(batch_size=2))


def test_samples_of_one_row_and_noise_are_equal_and_rows_differ() -> None:
    noise = np.repeat(initial_noise(SPEC, 1, 0), 3, axis=0)
    x = denoise(
        GuidedDenoiser(shifting, SPEC, CONDITIONS),
        make_sampler(SPEC.scheduler, 4),
        noise,
        np.array([1, 1, 2]),
        8,
    )
    np.testing.assert_array_equal(x[0], x[1])
    assert np.abs(x[0] - x[2]).max() > 1e-3


def test_more_samples_begin_with_the_same_noise() -> None:
    np.testing.assert_array_equal(initial_noise(SPEC, 2, 5), initial_noise(SPEC, 7, 5)[:2])
    assert np.abs(initial_noise(SPEC, 1, 5) - initial_noise(SPEC, 1, 6)).max() > 0.1
    assert initial_noise(SPEC, 0, 5).shape == (0, 2, 4, 4)


def test_guidance_moves_away_from_the_empty_condition() -> None:
    guided = SPEC.model_copy(update={"guidance_scale": 3.0, "uncond_row": 0})

    def by_hand(sample: Array, timestep: Any, conditions: dict[str, Array]) -> Array:
        empty = {"shift": np.zeros(len(sample), np.float32)}
        base = shifting(sample, timestep, empty)
        return base + np.float32(3.0) * (shifting(sample, timestep, conditions) - base)

    np.testing.assert_allclose(run(guided), run(denoiser=by_hand), atol=1e-6)


def test_guidance_of_scale_one_calls_once() -> None:
    assert len(calls(SPEC.model_copy(update={"uncond_row": 0}))) == 4


def calls(spec: DenoiserSpec, batch_size: int = 8) -> list[tuple[int, float, Array, Array]]:
    seen: list[tuple[int, float, Array, Array]] = []
    run(spec, batch_size, on_call=lambda *call: seen.append(call))
    return seen


def test_every_model_call_is_reported_with_what_the_model_was_fed() -> None:
    fed: list[Array] = []

    def spying(sample: Array, timestep: Any, conditions: dict[str, Array]) -> Array:
        fed.append(sample.copy())
        return shifting(sample, timestep, conditions)

    seen: list[tuple[int, float, Array, Array]] = []
    guided = SPEC.model_copy(update={"guidance_scale": 2.0, "uncond_row": 0})
    run(guided, 2, spying, lambda *call: seen.append(call))
    assert len(seen) == 4 * 3
    assert [call[0] for call in seen[:4]] == [0, 0, 0, 1]
    np.testing.assert_array_equal(seen[0][3], [0, 0, ROWS[0], ROWS[1]])
    for call, sample in zip(seen, fed, strict=True):
        np.testing.assert_array_equal(call[2], sample)
    assert seen[0][1] == make_sampler(SPEC.scheduler, 4).timesteps[0]


def test_of_a_learned_variance_only_the_mean_is_used() -> None:
    def doubled(sample: Array, timestep: Any, conditions: dict[str, Array]) -> Array:
        mean = shifting(sample, timestep, conditions)
        return np.concatenate([mean, mean * 100], axis=1)

    np.testing.assert_array_equal(run(denoiser=doubled), run())


def test_an_output_that_is_not_finite_is_named_with_its_timestep() -> None:
    def broken(sample: Array, timestep: Any, conditions: dict[str, Array]) -> Array:
        return np.full_like(sample, np.nan)

    with pytest.raises(ModelError, match="step 0"):
        run(denoiser=broken)


@pytest.mark.torch
def test_samplers_with_state_work_in_batches() -> None:
    spec = SPEC.model_copy(update={"scheduler": {"_class_name": "DPMSolverMultistepScheduler"}})
    np.testing.assert_allclose(run(spec, 8), run(spec, 2), atol=1e-6)
