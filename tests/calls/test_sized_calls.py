"""Calls of several sizes: recorded as those of each size alone, batched and measured size by size."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mpq_deploy.calls.ddim import DdimSampler
from mpq_deploy.calls.loop import GuidedDenoiser
from mpq_deploy.calls.recorded import CallSet, RecordedCalls
from mpq_deploy.calls.sampler import make_sampler
from mpq_deploy.calls.trajectories import record_trajectories, renoised
from mpq_deploy.models.spec import Array, DenoiserSpec, InputSpec
from mpq_deploy.recipe import CalibrateSettings
from mpq_deploy.system.progress import Talk
from tests.tiny_models import tiny_scheduler

SHAPES = [(2, 4, 4), (2, 6, 8), (2, 8, 2)]
SETTINGS = CalibrateSettings(timesteps=2, samples=7, steps=4, batch_size=2)


def denoiser(sample: Array, timestep: float | Array, conditions: dict[str, Array]) -> Array:
    """Something of the sample's shape that its values, the timestep and the class decide."""
    scale = 0.1 + conditions["label"].reshape(-1, 1, 1, 1) / 10
    return np.asarray(np.tanh(sample) * scale + np.float32(1e-4) * np.asarray(timestep), np.float32)


@pytest.fixture
def model() -> GuidedDenoiser:
    spec = DenoiserSpec(
        name="sized",
        source="test",
        sample=InputSpec(name="sample").with_sizes(SHAPES),
        timestep=InputSpec(name="timestep"),
        conditions=(InputSpec(name="label", dtype="int64"),),
        scheduler=tiny_scheduler(),
        guidance_scale=2.0,
        uncond_row=2,
        sizes=((4, 4), (8, 6), (2, 8)),
    )
    return GuidedDenoiser(denoiser, spec, {"label": np.arange(3)})


def recorded(model: GuidedDenoiser) -> CallSet:
    sampler = make_sampler(model.spec.scheduler, SETTINGS.steps)
    assert isinstance(sampler, DdimSampler)
    return record_trajectories(model, sampler, SETTINGS, Talk())


def test_each_sample_is_recorded_as_at_its_size_alone(model: GuidedDenoiser) -> None:
    calls = recorded(model)
    # Guidance makes two calls of each sample.
    assert calls.count == 14 and model.spec.sample.shape == (2, 8, 8)
    assert calls.sizes is not None and np.bincount(calls.sizes[0]).tolist() == [6, 4, 4]
    # The sizes take turns as long as there are calls of all.
    assert calls.sizes[0, :12].tolist() == [0, 1, 2] * 4
    for size in range(3):
        spec = model.spec.at_size(size)
        sampler = make_sampler(spec.scheduler, SETTINGS.steps)
        alone = record_trajectories(
            replace(model, spec=spec), sampler, SETTINGS, Talk(), slice(size, None, 3)
        )
        mine = calls.at_size(model.spec, size)
        np.testing.assert_array_equal(mine.rows, alone.rows)
        for step in range(2):
            for name in ("sample", "timestep", "label"):
                np.testing.assert_array_equal(
                    mine.values(name, step, slice(None)), alone.values(name, step, slice(None))
                )


def test_batches_are_of_one_size_and_have_its_shape(model: GuidedDenoiser, tmp_path: Path) -> None:
    calls = recorded(model)
    calls.save(tmp_path / "calls")
    read = CallSet.load(tmp_path / "calls")
    seen: list[int] = []
    for batch in RecordedCalls(read, model.spec).batches(3, steps=range(1)):
        assert batch.feed["sample"].shape == (len(batch.calls), *SHAPES[batch.size])
        assert set(read.sizes[0, batch.calls]) == {batch.size}  # type: ignore[index]
        seen += batch.calls.tolist()
    assert sorted(seen) == list(range(14))
    with pytest.raises(AssertionError, match="several sizes"):
        RecordedCalls(read, model.spec).feed(0, slice(None))


def test_both_parts_of_a_split_have_all_sizes(model: GuidedDenoiser) -> None:
    rounded, measured = recorded(model).split(3)
    for part in (rounded, measured):
        assert part.sizes is not None and set(part.sizes[0]) == {0, 1, 2}


def test_fresh_noise_keeps_the_sizes(model: GuidedDenoiser) -> None:
    calls = recorded(model)
    many = renoised(calls, model.spec, 2)
    assert many.sizes is not None and many.count == 28
    feed = RecordedCalls(many, model.spec).feed(0, np.array([0, 14]))
    assert feed["sample"].shape == (2, *SHAPES[0])
