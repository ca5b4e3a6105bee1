"""Fresh noise for rounding: the forward process, from the last recorded samples."""

from __future__ import annotations

import numpy as np
import pytest

from mpq_deploy.calibrate.stats import CalibrationSet
from mpq_deploy.calls.betas import alphas_cumprod
from mpq_deploy.calls.trajectories import renoised
from mpq_deploy.models.spec import DenoiserSpec, InputSpec

SCHEDULER = {"_class_name": "DDIMScheduler", "beta_schedule": "linear", "num_train_timesteps": 1000}


def spec(prediction: str = "epsilon") -> DenoiserSpec:
    return DenoiserSpec(
        name="t",
        source="t",
        sample=InputSpec(name="x", shape=(2, 40, 40)),
        timestep=InputSpec(name="t"),
        prediction_type=prediction,  # type: ignore[arg-type]
        scheduler=SCHEDULER,
    )


def recorded() -> CalibrationSet:
    samples = np.random.default_rng(0).standard_normal((3, 4, 2, 40, 40)).astype(np.float32)
    return CalibrationSet(samples, np.array([900.0, 400.0, 20.0], np.float32), np.arange(4))


def test_each_timestep_has_the_forward_process_s_mean_and_variance() -> None:
    made = renoised(recorded(), spec(), 8)
    power = alphas_cumprod(SCHEDULER)
    for index, timestep in enumerate((900, 400)):
        kept = power[timestep] / power[20]
        rest = made.samples[index] - np.sqrt(kept) * np.tile(recorded().samples[-1], (8, 1, 1, 1))
        np.testing.assert_allclose(rest.std(), np.sqrt(1 - kept), rtol=0.02)
        np.testing.assert_allclose(rest.mean(), 0, atol=0.02)


def test_noise_is_fresh_at_every_timestep_and_draw_and_rows_stay_with_their_samples() -> None:
    made = renoised(recorded(), spec(), 2)
    assert made.samples.shape[1] == 8
    np.testing.assert_array_equal(made.rows, [0, 1, 2, 3, 0, 1, 2, 3])
    np.testing.assert_array_equal(made.samples[-1, :4], recorded().samples[-1])
    correlation = np.corrcoef(made.samples[0, 0].ravel(), made.samples[0, 4].ravel())[0, 1]
    assert abs(correlation) < 0.1
    np.testing.assert_array_equal(made.samples, renoised(recorded(), spec(), 2).samples)


def test_what_has_no_forward_process_stays_as_recorded() -> None:
    one = recorded()
    assert renoised(one, spec().model_copy(update={"timestep": None}), 3) is one
    assert renoised(one, spec(), 0) is one


def test_flow_matching_goes_along_straight_lines() -> None:
    """From the last sample (1 - s_0) x + s_0 e the line leads to (1 - s) x + s e': its variance says so."""
    flow = spec("flow_prediction").model_copy(update={"scheduler": {"num_train_timesteps": 1000}})
    one = recorded()
    rng = np.random.default_rng(3)
    clean = 2 * np.sign(rng.standard_normal((4, 2, 40, 40)))
    last = 0.02
    one.samples[-1] = (1 - last) * clean + last * rng.standard_normal(clean.shape)
    found = renoised(one, flow, 2)
    for step, s in enumerate((0.9, 0.4, 0.02)):
        rest = found.samples[step] - (1 - s) * np.tile(clean, (2, 1, 1, 1))
        assert np.std(rest) == pytest.approx(s, rel=0.02)
