"""Recorded calls come back as they were; rounding and measuring do not see the same ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from mpq_deploy.calls import shards
from mpq_deploy.calls.recorded import CallSet, InputCalls, RecordedCalls, joined
from mpq_deploy.errors import InputError, ModelError
from mpq_deploy.models.spec import Array, DenoiserSpec, InputSpec
from mpq_deploy.recipe import Recipe
from tests.calls.sets import call_set, samples_of


def recorded(calls: int) -> CallSet:
    samples = np.arange(2 * calls, dtype=np.float32).reshape(2, calls, 1)
    return call_set(samples, [9.0, 1.0], np.arange(calls))


@given(st.integers(2, 60), st.integers(1, 30))
def test_the_parts_share_no_call_and_lose_none(calls: int, measured: int) -> None:
    whole = recorded(calls)
    rounded_on, measured_on = whole.split(measured)
    if calls - measured < calls / 5:
        assert rounded_on is whole and measured_on is whole
        return
    assert len(measured_on.rows) == measured
    assert sorted([*rounded_on.rows, *measured_on.rows]) == list(range(calls))
    for part in (rounded_on, measured_on):
        # A call's samples and its condition stay together, at every timestep.
        np.testing.assert_array_equal(samples_of(part)[0, :, 0], part.rows)
        np.testing.assert_array_equal(samples_of(part)[1, :, 0], part.rows + calls)


def test_the_split_is_the_same_every_time_and_mixes_conditions() -> None:
    one, other = recorded(64).split(32), recorded(64).split(32)
    np.testing.assert_array_equal(one[0].rows, other[0].rows)
    # Conditions are dealt out in turns: no stride through the calls may pick always the same ones.
    assert {int(row) % 8 for row in one[1].rows} == set(range(8))


def test_every_condition_is_measured_equally_often() -> None:
    samples = np.zeros((2, 40, 1), np.float32)
    whole = call_set(samples, [9.0, 1.0], np.arange(40) % 8)
    for part, each in zip(whole.split(16), (3, 2), strict=True):
        np.testing.assert_array_equal(np.bincount(part.rows), [each] * 8)


def test_the_defaults_leave_calls_for_both() -> None:
    recipe = Recipe(model="emoji", budget="0.35")
    whole = recorded(recipe.calibrate.samples)
    rounded_on, measured_on = whole.split(recipe.measure.samples)
    assert not set(map(int, rounded_on.rows)) & set(map(int, measured_on.rows))
    assert len(measured_on.rows) == recipe.measure.samples


def varied() -> CallSet:
    """Two timesteps of three calls with a condition that two calls share, and one that varies."""
    rng = np.random.default_rng(5)
    made = call_set(rng.standard_normal((2, 3, 4, 2)).astype(np.float32), [900.0, 20.0], [0, 1, 0])
    text = InputCalls(rng.standard_normal((2, 5)).astype(np.float32), np.array([[0, 1, 0]] * 2))
    each = np.arange(6).reshape(2, 3)
    residual = InputCalls(rng.standard_normal((6, 3)).astype(np.float32), each)
    return replace(made, inputs={**made.inputs, "text": text, "residual": residual})


def every_value(calls: CallSet) -> dict[str, Array]:
    return {name: np.asarray(given.values[given.index]) for name, given in calls.inputs.items()}


@pytest.mark.parametrize("limit", [1, 50, 1 << 20])
def test_calls_come_back_from_their_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", limit)
    made = varied()
    made.save(tmp_path / "calls")
    found = CallSet.load(tmp_path / "calls")
    np.testing.assert_equal(every_value(found), every_value(made))
    np.testing.assert_array_equal(found.timesteps, made.timesteps)
    np.testing.assert_array_equal(found.rows, made.rows)
    # A text that two calls share is stored once.
    assert found.inputs["text"].values.shape == (2, 5)
    again = tmp_path / "again"
    found.save(again)
    for path in (tmp_path / "calls").iterdir():
        assert (again / path.name).read_bytes() == path.read_bytes()


def test_parts_of_a_set_hold_what_they_use_and_join_again() -> None:
    made = varied()
    parts = [made.take(np.array([one])) for one in range(3)]
    assert parts[0].compact().inputs["residual"].values.shape == (2, 3)
    np.testing.assert_equal(every_value(joined(parts)), every_value(made))
    np.testing.assert_equal(
        every_value(CallSet.of_arrays(made.at(np.array([1])).arrays())),
        every_value(made.at(np.array([1]))),
    )


def test_a_model_is_fed_what_was_recorded_one_timestep_each() -> None:
    spec = DenoiserSpec(
        name="tiny",
        source="test",
        sample=InputSpec(name="sample", shape=(4, 2)),
        timestep=InputSpec(name="timestep", batched=False),
        conditions=(InputSpec(name="text", shape=(5,)),),
        scheduler={},
    )
    calls = RecordedCalls(varied(), spec)
    feed = calls.feed(1, np.array([2, 0]))
    assert feed["timestep"] == 20 and feed["timestep"].shape == ()
    np.testing.assert_array_equal(feed["text"][0], feed["text"][1])
    with pytest.raises(ModelError, match="one 'timestep' per call"):
        calls.feed(np.array([0, 1]), np.array([0, 0]))
    fuller = spec.model_copy(update={"conditions": (InputSpec(name="mask"),)})
    with pytest.raises(ModelError, match="no input 'mask'"):
        RecordedCalls(varied(), fuller).feed(0, np.array([0]))


def _truncate(folder: Path) -> None:
    path = folder / "calls-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-8])


def _foreign(folder: Path) -> None:
    columns = load_file(folder / "index.safetensors")
    columns["index.text"] = columns["index.text"] + 5
    save_file(columns, folder / "index.safetensors")


def _uneven(folder: Path) -> None:
    columns = load_file(folder / "index.safetensors")
    save_file({name: column[:-1] for name, column in columns.items()}, folder / "index.safetensors")


def _lost(folder: Path) -> None:
    (folder / "calls-00000.safetensors").unlink()


@pytest.mark.parametrize("damage", [_truncate, _foreign, _uneven, _lost])
def test_damaged_calls_are_refused_in_one_line(tmp_path: Path, damage: Any) -> None:
    varied().save(tmp_path / "calls")
    damage(tmp_path / "calls")
    with pytest.raises(InputError, match="calls") as caught:
        CallSet.load(tmp_path / "calls")
    assert "\n" not in caught.value.message
