"""Models that cannot be sampled with are refused in the export, before anything is calibrated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from mpq_deploy.errors import ModelError
from mpq_deploy.models.sampling_fit import check_output, check_timesteps
from mpq_deploy.models.spec import DenoiserSpec, InputSpec
from mpq_deploy.runtime.ort import model_feeds
from tests.graphs import GraphBuilder
from tests.pipeline.runs import build, recipe_for, save_denoiser
from tests.tiny_models import tiny_scheduler, tiny_unet_folder


def spec(
    sample: tuple[int, ...] = (4, 8, 8), dtype: str = "float32", **scheduler: Any
) -> DenoiserSpec:
    return DenoiserSpec(
        name="m",
        source="m",
        sample=InputSpec(name="sample", shape=sample),
        timestep=InputSpec.model_validate({"name": "timestep", "dtype": dtype}),
        scheduler=tiny_scheduler(**scheduler),
    )


@pytest.mark.parametrize("shape", [(2, 4, 8, 8), (2, 8, 8, 8)])
def test_noise_and_noise_with_variance_fit(shape: tuple[int, ...]) -> None:
    check_output(spec(), shape)


@pytest.mark.parametrize(
    ("sample", "shape", "said"),
    [
        ((9, 8, 8), (1, 4, 8, 8), r"\[9, 8, 8\] and gives \[4, 8, 8\]: 5 of its 9 channels"),
        ((4, 8, 8), (1, 4, 16, 16), "the shape that it takes"),
        ((4, 8, 8), (1, 12, 8, 8), "the shape that it takes"),
        ((4, 8, 8), (1, 4), "the shape that it takes"),
    ],
)
def test_other_outputs_are_refused_with_both_shapes(
    sample: tuple[int, ...], shape: tuple[int, ...], said: str
) -> None:
    with pytest.raises(ModelError, match=said):
        check_output(spec(sample), shape)


def test_a_variance_among_the_channels_of_a_sample_is_refused() -> None:
    learned = spec((6, 8, 8), _class_name="DDPMScheduler", variance_type="learned_range")
    with pytest.raises(ModelError, match="3 of these channels are noise and 3 its variance"):
        check_output(learned, (1, 6, 8, 8))
    check_output(learned, (1, 12, 8, 8))
    check_output(spec((6, 8, 8)), (1, 6, 8, 8))


def test_fractions_of_timesteps_need_a_float_input() -> None:
    euler = {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "linspace"}
    check_timesteps(spec(**euler), [20])
    check_timesteps(spec(dtype="int64"), [3, 20])
    with pytest.raises(
        ModelError, match=r"'timestep' is int64, but EulerDiscreteScheduler has 946\.421"
    ):
        check_timesteps(spec(dtype="int64", **euler), [20])
    check_timesteps(spec(dtype="int64", **{**euler, "timestep_spacing": "leading"}), [20])


def test_no_call_cuts_a_timestep_off() -> None:
    sample = np.zeros((2, 4, 8, 8), np.float32)
    assert model_feeds(spec(dtype="int64"), sample, 7.0, {})["timestep"].tolist() == [7, 7]
    with pytest.raises(ModelError, match=r"7\.5 is not a whole number"):
        model_feeds(spec(dtype="int64"), sample, 7.5, {})


def nine_to_four(folder: Path) -> Path:
    graph = GraphBuilder(opset=17)
    x = graph.input("sample", ["batch", 9, 8, 8])
    t = graph.input("timestep", ["batch"], TensorProto.INT64)
    axes = graph.weight("axes", np.array([1, 2, 3]))
    scaled = graph.op(
        "Cast", [graph.op("Unsqueeze", [t, axes], "column")], "cast", to=TensorProto.FLOAT
    )
    hidden = graph.op("Mul", [graph.conv(x, "first", 8, 9), scaled], "scaled")
    graph.conv(hidden, "last", 4, 8)
    graph.nodes[-1].output[0] = graph.output("out", ["batch", 4, 8, 8])
    return save_denoiser(folder, graph)


def test_an_onnx_file_with_an_image_among_its_channels(tmp_path: Path) -> None:
    path = nine_to_four(tmp_path)
    onnx.checker.check_model(onnx.load(path))
    with pytest.raises(ModelError, match="5 of its 9 channels are not noise"):
        build(recipe_for(path), tmp_path / "run", "export")


@pytest.mark.torch
def test_a_unet_is_refused_before_it_is_exported(tmp_path: Path) -> None:
    scheduler = tiny_scheduler(_class_name="DDPMScheduler", variance_type="learned_range")
    folder = tiny_unet_folder(tmp_path, scheduler=scheduler, in_channels=6, out_channels=6)
    with pytest.raises(ModelError, match="3 of these channels are noise"):
        build(recipe_for(folder), tmp_path / "run", "export")
    assert not (tmp_path / "run" / "export" / "model.onnx").exists()
