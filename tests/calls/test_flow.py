"""Flow matching: timesteps that depend on the image's size, and noise added along straight lines."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from mpq_deploy.calibrate.stats import CalibrationSet  # noqa: E402
from mpq_deploy.calls.diffusers_sampler import IMAGE_TOKENS, DiffusersSampler  # noqa: E402
from mpq_deploy.calls.trajectories import renoised  # noqa: E402
from mpq_deploy.errors import UsageError  # noqa: E402
from mpq_deploy.models.spec import DenoiserSpec, InputSpec  # noqa: E402
from tests.tiny_models import tiny_flow_scheduler  # noqa: E402

pytestmark = pytest.mark.torch


@pytest.mark.parametrize("tokens", [256, 1024, 4096])
def test_a_shift_by_image_size_is_that_of_the_pipeline(tokens: int) -> None:
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    config = tiny_flow_scheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(config)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / 5, 5), mu=calculate_shift(tokens))
    found = DiffusersSampler({**config, IMAGE_TOKENS: tokens}, 5, 0)
    np.testing.assert_allclose(found.timesteps, scheduler.timesteps.numpy(), rtol=1e-6)
    with pytest.raises(UsageError, match="by image size"):
        DiffusersSampler(config, 5, 0)


def test_noise_is_added_along_straight_lines() -> None:
    sigmas = np.array([1.0, 0.6, 0.2])
    spec = DenoiserSpec(
        name="flow",
        source="",
        sample=InputSpec(name="x", shape=(4000,)),
        timestep=InputSpec(name="t"),
        prediction_type="flow_prediction",
        scheduler=tiny_flow_scheduler(),
    )
    clean, rng = 3.0, np.random.default_rng(0)
    noise = rng.standard_normal((4, 4000))
    samples = np.stack([(1 - s) * clean + s * noise for s in sigmas]).astype(np.float32)
    recorded = CalibrationSet(samples, (1000 * sigmas).astype(np.float32), np.zeros(4, np.int64))
    drawn = renoised(recorded, spec, draws=2).samples
    # At every level the mixture is that of the forward process, whose noise has nothing to do with the recorded one.
    for sigma, level in zip(sigmas, drawn, strict=True):
        assert level.mean() == pytest.approx((1 - sigma) * clean, abs=0.03)
        assert level.std() == pytest.approx(sigma, abs=0.02)
    assert abs(np.corrcoef(drawn[0, :4].ravel(), noise.ravel())[0, 1]) < 0.03
    np.testing.assert_allclose(drawn[-1, :4], samples[-1], atol=1e-6)
