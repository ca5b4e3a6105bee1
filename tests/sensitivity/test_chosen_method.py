"""What ``measure.method: auto`` stands for, and why."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from mpq_deploy.models.spec import DenoiserSpec
from mpq_deploy.recipe import Recipe, make_recipe
from mpq_deploy.run.effort import fitted
from mpq_deploy.run.folder import RunFolder
from mpq_deploy.run.view import Run
from mpq_deploy.sensitivity.chosen_method import chosen_method
from mpq_deploy.system.progress import Talk
from tests.tiny_models import tiny_scheduler

OF_PIXELS = {
    "name": "tiny",
    "source": "tiny.onnx",
    "sample": {"name": "sample", "shape": [3, 8, 8]},
    "timestep": {"name": "timestep"},
    "output": "out",
    "prediction_type": "epsilon",
    "scheduler": tiny_scheduler(),
    "pixel_range": [-1, 1],
}


def spec(**changes: Any) -> DenoiserSpec:
    return DenoiserSpec.model_validate({**OF_PIXELS, **changes})


def recipe(**sections: Any) -> Recipe:
    """Of compute in INT8, unless ``sections`` say otherwise."""
    return make_recipe({"allocate": {"schemes": ["fp16", "w8a8", "w4a8"]}, **sections})


@pytest.fixture(autouse=True)
def with_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is chosen is the same in an installation without torch."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())


def test_compute_in_low_precision_measures_whole_trajectories() -> None:
    assert Recipe().measure.method == "auto"
    found = chosen_method(recipe(), spec())
    assert (found.name, found.calls) == ("trajectory", 12)
    assert found.text == "measure.method auto is trajectory: 12 whole trajectories of 20 steps"


def test_a_named_method_stays_as_it_is() -> None:
    for name in ("probe", "trajectory", "gain"):
        found = chosen_method(
            recipe(measure={"method": name, "calls": 1}), spec(), "several targets"
        )
        assert (found.name, found.calls, found.text) == (name, 1, "")


@pytest.mark.parametrize(
    ("sections", "changes", "shared_by", "why"),
    [
        ({"allocate": {}}, {}, "", "weights alone may be quantized"),
        ({}, {}, "several targets", "several targets share the measurement"),
        ({}, {"timestep": None}, "", "called once"),
        ({}, {"recorded": True}, "", "a script"),
        ({}, {"decoder": "decoder.onnx"}, "", "a decoder makes the images"),
        ({"measure": {"sampling": "adaptive"}}, {}, "", "adaptive"),
        ({"measure": {"timesteps": 19}}, {}, "", "19 timesteps are measured of the 20"),
        ({"calibrate": {"steps": 50}}, {}, "", "20 timesteps are measured of the 50"),
        ({"measure": {"calls": 7}}, {}, "", "7 trajectories fit in 7 calls, and it takes 8"),
        ({}, {"scheduler": {**tiny_scheduler(), "thresholding": True}}, "", "thresholding"),
    ],
)
def test_single_outputs_are_measured_where_trajectories_cannot(
    sections: dict[str, Any], changes: dict[str, Any], shared_by: str, why: str
) -> None:
    found = chosen_method(recipe(**sections), spec(**changes), shared_by)
    assert found.name == "probe" and why in found.reason


def test_without_torch_single_outputs_are_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert chosen_method(recipe(), spec()).reason == "torch is not installed"


def test_guidance_takes_half_as_many_trajectories() -> None:
    """Each has two calls at every step."""
    guided = spec(guidance_scale=3.0, uncond_row=0)
    found = chosen_method(recipe(measure={"calls": 24}), guided)
    assert (found.name, found.calls) == ("trajectory", 12)
    found = chosen_method(recipe(measure={"calls": 10}), guided)
    assert (found.name, found.calls) == ("probe", 10) and "of two calls each" in found.reason
    named = chosen_method(recipe(measure={"method": "trajectory"}), guided)
    assert named.calls == 12


def test_fewer_steps_may_be_whole() -> None:
    """A model of four steps is measured whole with four timesteps."""
    few = recipe(calibrate={"steps": 4, "timesteps": 4}, measure={"timesteps": 4})
    assert chosen_method(few, spec()).name == "trajectory"


def test_efforts_that_measure_few_timesteps_measure_single_outputs() -> None:
    found = {
        effort: chosen_method(fitted(recipe(effort=effort), lambda _: 0.0)[0], spec()).name
        for effort in ("quick", "standard", "thorough")
    }
    assert found == {"quick": "probe", "standard": "trajectory", "thorough": "trajectory"}


def test_a_run_knows_who_shares_its_measurement(tmp_path: Path) -> None:
    (tmp_path / "run" / "export").mkdir(parents=True)

    def shared(place: str) -> str:
        return Run(Recipe(), RunFolder(tmp_path / place), Talk()).shared_by

    assert shared("run") == ""
    assert shared("run/targets/rtx") == "several targets"
    assert shared("run/components/unet") == "the parts of a pipeline"
