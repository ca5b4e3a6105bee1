"""Our own loop with the correction in front of the sampler: a known slope and bias disappear from the samples."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mpq_deploy.calls.corrected import corrected_sampler
from mpq_deploy.calls.loop import GuidedDenoiser, denoise, initial_noise
from mpq_deploy.calls.sampler import SamplerKind, make_sampler
from mpq_deploy.errors import UsageError
from mpq_deploy.models.spec import DenoiserSpec, InputSpec
from mpq_deploy.runtime.correction import Correction
from tests.runtime.test_corrected_scheduler import BIAS, SLOPE, identity, known

Array = np.ndarray[Any, np.dtype[Any]]


def specification(name: str = "DDIMScheduler", **changes: Any) -> DenoiserSpec:
    return DenoiserSpec(
        name="toy",
        source="test",
        sample=InputSpec(name="x", shape=(3, 4, 4)),
        timestep=InputSpec(name="t"),
        conditions=(InputSpec(name="y"),),
        scheduler={"_class_name": name, "clip_sample": False},
        **changes,
    )


def samples(
    spec: DenoiserSpec, correction: Correction | None, quantized: bool, kind: SamplerKind = "auto"
) -> Array:
    def model(x: Array, timestep: float | Array, conditions: dict[str, Array]) -> Array:
        clean = np.tanh(x * np.float32(1.2)) + conditions["y"].reshape(-1, 1, 1, 1)
        return np.asarray((1 + SLOPE) * clean + BIAS if quantized else clean, np.float32)

    sampler = make_sampler(spec.scheduler, 5, 3, kind)
    if correction is not None:
        sampler, _ = corrected_sampler(sampler, correction, spec)
    conditions = {"y": np.float32([0.0, 0.3, -0.2])}
    return denoise(
        GuidedDenoiser(model, spec, conditions),
        sampler,
        initial_noise(spec, 3, 0),
        np.array([1, 2, 1]),
        2,
    )


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_the_built_in_ddim(guidance: float) -> None:
    spec = specification(guidance_scale=guidance, uncond_row=0)
    correction = known(SLOPE, BIAS, 0.01, channels=3)
    clean = samples(spec, None, quantized=False)
    np.testing.assert_allclose(
        samples(spec, correction, quantized=True), clean, atol=1e-4 * np.abs(clean).max()
    )
    assert np.abs(samples(spec, None, quantized=True) - clean).max() > 0.01
    np.testing.assert_array_equal(samples(spec, identity(3), quantized=False), clean)


@pytest.mark.torch
@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "DDPMScheduler"])
def test_a_scheduler_of_diffusers(name: str) -> None:
    spec = specification(name)
    correction = known(SLOPE, BIAS, 0.0, channels=3)
    clean = samples(spec, None, quantized=False, kind="folder")
    found = samples(spec, correction, quantized=True, kind="folder")
    np.testing.assert_allclose(found, clean, atol=1e-4 * np.abs(clean).max())


@pytest.mark.torch
def test_it_says_what_applies() -> None:
    correction = known(SLOPE, BIAS, 0.01, channels=3)
    notes = {}
    for name, kind in (
        ("DDIMScheduler", "ddim"),
        ("DDPMScheduler", "folder"),
        ("LCMScheduler", "folder"),
    ):
        spec = specification(name)
        sampler, notes[name] = corrected_sampler(
            make_sampler(spec.scheduler, 5, 3, kind), correction, spec
        )  # type: ignore[arg-type]
        assert "corrected" in sampler.name
    assert "adds no noise" in notes["DDIMScheduler"]
    assert "comes out" in notes["DDPMScheduler"]
    assert "LCMScheduler" in notes["LCMScheduler"]


def test_another_prediction_type_is_refused() -> None:
    spec = specification()
    with pytest.raises(UsageError, match="v_prediction"):
        corrected_sampler(make_sampler(spec.scheduler, 5), known(0, 0, 0, "v_prediction", 3), spec)
