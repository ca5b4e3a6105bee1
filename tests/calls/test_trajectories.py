"""What is recorded is what the sampling loop feeds the model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mpq_deploy.calibrate.calibrate import calibrate
from mpq_deploy.calibrate.spread_calibration import CalibrationSetup
from mpq_deploy.calibrate.stats import CalibrationStats
from mpq_deploy.calls.ddim import alphas_cumprod
from mpq_deploy.calls.loop import GuidedDenoiser, denoise, initial_noise
from mpq_deploy.calls.recorded import CallSet
from mpq_deploy.calls.sampler import make_sampler
from mpq_deploy.calls.timesteps import sampled_steps
from mpq_deploy.calls.trajectories import cycled_rows, record_trajectories, renoised
from mpq_deploy.errors import ModelError, UsageError
from mpq_deploy.graph.layers import layer_graph
from mpq_deploy.graph.load import load_model
from mpq_deploy.models.spec import DenoiserSpec, FloatModel, InputSpec
from mpq_deploy.recipe import CalibrateSettings, make_recipe
from mpq_deploy.system.progress import Talk
from tests.calls.sets import call_set, samples_of
from tests.graphs import denoiser_graph
from tests.tiny_models import tiny_flow_scheduler

SCHEDULER = {"_class_name": "DDIMScheduler", "num_train_timesteps": 1000, "beta_schedule": "linear"}


def spec_of(**changes) -> DenoiserSpec:
    fields = {
        "name": "tiny",
        "source": "test",
        "sample": InputSpec(name="sample", shape=(3, 4, 4)),
        "timestep": InputSpec(name="timestep"),
        "conditions": (InputSpec(name="label", dtype="int64"),),
        "scheduler": SCHEDULER,
    }
    return DenoiserSpec(**(fields | changes))


class Counting:
    """A denoiser that answers with a fixed linear function and remembers its calls."""

    def __init__(self) -> None:
        self.calls = []

    def __call__(self, sample, timestep, conditions):
        self.calls.append((sample.copy(), float(timestep), conditions["label"].copy()))
        return 0.5 * sample + 0.01 * conditions["label"][:, None, None, None].astype(np.float32)


def test_steps_are_midpoints_of_equal_strides() -> None:
    assert sampled_steps(20, 10).tolist() == list(range(1, 20, 2))
    assert sampled_steps(20, 20).tolist() == list(range(20))
    assert sampled_steps(20, 1).tolist() == [10]
    for steps in range(1, 40):
        for count in range(1, steps + 1):
            found = sampled_steps(steps, count)
            assert len(set(found.tolist())) == count and found[0] >= 0 and found[-1] < steps
            assert np.ptp(np.diff(found)) <= 1 if count > 1 else True


def test_more_timesteps_than_steps_names_both() -> None:
    with pytest.raises(UsageError, match=r"30 timesteps .* 20 steps"):
        sampled_steps(20, 30)


def test_recorded_calls_are_those_of_the_loop_and_stop_after_the_last() -> None:
    spec, labels = spec_of(), {"label": np.arange(5)}
    options = CalibrateSettings(timesteps=3, samples=7, steps=12, batch_size=4, seed=3)
    denoiser = Counting()
    recorded = record_trajectories(
        GuidedDenoiser(denoiser, spec, labels), make_sampler(SCHEDULER, 12), options, Talk()
    )
    steps = sampled_steps(12, 3)
    assert (
        samples_of(recorded).shape == (3, 7, 3, 4, 4) and samples_of(recorded).dtype == np.float32
    )
    assert len(denoiser.calls) == 2 * (int(steps[-1]) + 1)
    every = Counting()
    rows = cycled_rows(spec, labels, 7, 3)
    sampler = make_sampler(SCHEDULER, 12)
    denoise(GuidedDenoiser(every, spec, labels), sampler, initial_noise(spec, 7, 3), rows, 4)
    for number, step in enumerate(steps):
        fed = np.concatenate([sample for sample, _, _ in every.calls[2 * step : 2 * step + 2]])
        np.testing.assert_array_equal(samples_of(recorded)[number], fed)
        assert recorded.timesteps[number] == sampler.timesteps[step]
    np.testing.assert_array_equal(recorded.rows, rows)


def test_guidance_records_both_halves() -> None:
    spec = spec_of(guidance_scale=3.0, uncond_row=2)
    options = CalibrateSettings(timesteps=2, samples=6, steps=4, batch_size=4)
    labels = {"label": np.arange(4)}
    recorded = record_trajectories(
        GuidedDenoiser(Counting(), spec, labels), make_sampler(SCHEDULER, 4), options, Talk()
    )
    assert samples_of(recorded).shape[1] == len(recorded.rows) == 12
    assert (recorded.rows == 2).sum() == 6
    assert sorted(set(recorded.rows[recorded.rows != 2].tolist())) == [0, 1, 3]
    # In a batch of four the first four calls are unconditional, of the same samples as the next four.
    np.testing.assert_array_equal(samples_of(recorded)[:, :4], samples_of(recorded)[:, 4:8])


def test_rows_are_dealt_evenly_and_depend_on_the_seed() -> None:
    spec, labels = spec_of(), {"label": np.arange(5)}
    counts = np.bincount(cycled_rows(spec, labels, 13, 0))
    assert counts.tolist() == sorted(counts.tolist(), reverse=True) or set(counts) == {2, 3}
    assert not np.array_equal(cycled_rows(spec, labels, 13, 0), cycled_rows(spec, labels, 13, 1))
    assert cycled_rows(spec_of(conditions=()), {}, 4, 0).tolist() == [0] * 4
    with pytest.raises(UsageError, match="different numbers of rows"):
        cycled_rows(spec, {"a": np.arange(3), "b": np.arange(4)}, 4, 0)


@pytest.fixture
def tiny(tmp_path: Path) -> tuple[Path, DenoiserSpec]:
    path = denoiser_graph(channels=16).save(tmp_path / "model.onnx")
    return path, spec_of(sample=InputSpec(name="sample", shape=(3, 8, 8)), conditions=())


def test_calibrate_end_to_end_is_deterministic_and_survives_the_disk(tiny, tmp_path: Path) -> None:
    path, spec = tiny
    graph = layer_graph(load_model(path))
    options = CalibrateSettings(timesteps=3, samples=4, steps=6, batch_size=3)
    recorded, stats, _ = calibrate(
        CalibrationSetup(FloatModel(path, spec, {}), options), graph, Talk(), scratch=tmp_path
    )
    again = calibrate(CalibrationSetup(FloatModel(path, spec, {}), options), graph, Talk())
    assert set(stats.activations) == set(graph.activations)
    recorded.save(tmp_path / "set")
    stats.save(tmp_path / "stats.npz")
    read = CalibrationStats.load(tmp_path / "stats.npz")
    np.testing.assert_array_equal(samples_of(CallSet.load(tmp_path / "set")), samples_of(again[0]))
    for name, one in again[1].activations.items():
        for field, value in vars(one).items():
            np.testing.assert_array_equal(getattr(read.activations[name], field), value)
        assert one.scale == float(np.float16(one.scale)) > 0
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith("session-")] == []


def test_too_many_timesteps_is_refused_before_anything_runs(tiny) -> None:
    path, spec = tiny
    options = CalibrateSettings(timesteps=30, steps=20)
    with pytest.raises(UsageError, match="30"):
        calibrate(
            CalibrationSetup(FloatModel(path, spec, {}), options),
            layer_graph(load_model(path)),
            Talk(),
        )


def test_nan_weight_is_named(tmp_path: Path) -> None:
    builder = denoiser_graph(channels=16)
    for tensor in builder.weights:
        if tensor.name == "down.conv1.weight":
            raw = bytearray(tensor.raw_data)
            raw[:4] = np.float32(np.nan).tobytes()
            tensor.raw_data = bytes(raw)
    path = builder.save(tmp_path / "model.onnx")
    spec = spec_of(sample=InputSpec(name="sample", shape=(3, 8, 8)), conditions=())
    options = CalibrateSettings(timesteps=2, samples=2, steps=4)
    with pytest.raises(ModelError, match=r"NaN or Inf at timestep .*'down.conv1'"):
        calibrate(
            CalibrationSetup(FloatModel(path, spec, {}), options),
            layer_graph(load_model(path)),
            Talk(),
        )


@pytest.mark.parametrize(
    "wrong", [{"samples": 0}, {"scale": "best"}, {"percentile": 40.0}, {"reservoir": 0}]
)
def test_wrong_options(wrong) -> None:
    with pytest.raises(UsageError):
        make_recipe({"calibrate": wrong})


def forward_spec(prediction: str = "epsilon") -> DenoiserSpec:
    return DenoiserSpec(
        name="t",
        source="t",
        sample=InputSpec(name="sample", shape=(2, 40, 40)),
        timestep=InputSpec(name="t"),
        prediction_type=prediction,  # type: ignore[arg-type]
        scheduler=SCHEDULER,
    )


def three_steps() -> CallSet:
    samples = np.random.default_rng(0).standard_normal((3, 4, 2, 40, 40)).astype(np.float32)
    return call_set(samples, [900.0, 400.0, 20.0], np.arange(4))


def test_each_timestep_has_the_forward_process_s_mean_and_variance() -> None:
    made = renoised(three_steps(), forward_spec(), 8)
    power = alphas_cumprod(SCHEDULER)
    for index, timestep in enumerate((900, 400)):
        kept = power[timestep] / power[20]
        rest = samples_of(made)[index] - np.sqrt(kept) * np.tile(
            samples_of(three_steps())[-1], (8, 1, 1, 1)
        )
        np.testing.assert_allclose(rest.std(), np.sqrt(1 - kept), rtol=0.02)
        np.testing.assert_allclose(rest.mean(), 0, atol=0.02)


def test_noise_is_fresh_at_every_timestep_and_draw_and_rows_stay_with_their_samples() -> None:
    made = renoised(three_steps(), forward_spec(), 2)
    assert samples_of(made).shape[1] == 8
    np.testing.assert_array_equal(made.rows, [0, 1, 2, 3, 0, 1, 2, 3])
    np.testing.assert_array_equal(samples_of(made)[-1, :4], samples_of(three_steps())[-1])
    correlation = np.corrcoef(samples_of(made)[0, 0].ravel(), samples_of(made)[0, 4].ravel())[0, 1]
    assert abs(correlation) < 0.1
    np.testing.assert_array_equal(
        samples_of(made), samples_of(renoised(three_steps(), forward_spec(), 2))
    )


def test_what_has_no_forward_process_stays_as_recorded() -> None:
    one = three_steps()
    assert renoised(one, forward_spec().model_copy(update={"timestep": None}), 3) is one
    assert renoised(one, forward_spec(), 0) is one


def test_flow_matching_goes_along_straight_lines() -> None:
    """From the last sample (1 - s_0) x + s_0 e the line leads to (1 - s) x + s e': its variance says so."""
    flow = forward_spec("flow_prediction").model_copy(
        update={"scheduler": {"num_train_timesteps": 1000}}
    )
    one = three_steps()
    rng = np.random.default_rng(3)
    clean = 2 * np.sign(rng.standard_normal((4, 2, 40, 40)))
    last = 0.02
    samples_of(one)[-1] = (1 - last) * clean + last * rng.standard_normal(clean.shape)
    found = renoised(one, flow, 2)
    for step, s in enumerate((0.9, 0.4, 0.02)):
        rest = samples_of(found)[step] - (1 - s) * np.tile(clean, (2, 1, 1, 1))
        assert np.std(rest) == pytest.approx(s, rel=0.02)


def test_noise_is_added_along_straight_lines() -> None:
    sigmas = np.array([1.0, 0.6, 0.2])
    spec = DenoiserSpec(
        name="flow",
        source="",
        sample=InputSpec(name="sample", shape=(4000,)),
        timestep=InputSpec(name="t"),
        prediction_type="flow_prediction",
        scheduler=tiny_flow_scheduler(),
    )
    clean, rng = 3.0, np.random.default_rng(0)
    noise = rng.standard_normal((4, 4000))
    samples = np.stack([(1 - s) * clean + s * noise for s in sigmas]).astype(np.float32)
    recorded = call_set(samples, 1000 * sigmas, np.zeros(4, np.int64))
    drawn = samples_of(renoised(recorded, spec, draws=2))
    # At every level the mixture is that of the forward process, whose noise has nothing to do with the recorded one.
    for sigma, level in zip(sigmas, drawn, strict=True):
        assert level.mean() == pytest.approx((1 - sigma) * clean, abs=0.03)
        assert level.std() == pytest.approx(sigma, abs=0.02)
    assert abs(np.corrcoef(drawn[0, :4].ravel(), noise.ravel())[0, 1]) < 0.03
    np.testing.assert_allclose(drawn[-1, :4], samples[-1], atol=1e-6)
