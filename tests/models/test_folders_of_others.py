"""Folders as other tools leave them: parts of weights, variants, averages of training, optimum's exports."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from mpq_deploy.errors import ModelError, UsageError
from mpq_deploy.models.additions import Additions
from mpq_deploy.models.locate import locate, source_files
from mpq_deploy.models.open import open_denoiser
from mpq_deploy.run.stage_memory import _weight_files
from tests.graphs import denoiser_graph
from tests.pipeline.runs import build, describe, recipe_for, save_denoiser
from tests.tiny_models import (
    tiny_scheduler,
    tiny_text_pipeline_folder,
    tiny_unet,
    tiny_unet_folder,
    write_scheduler,
)

STEM = "diffusion_pytorch_model"


def without_weights(tmp_path: Path) -> Path:
    """A pipeline folder whose UNet's weights are still to be written."""
    folder = tiny_unet_folder(tmp_path)
    (folder / "unet" / f"{STEM}.safetensors").unlink()
    return folder


def older_names(unet: Path) -> None:
    """Give parts of a variant the names of earlier versions of diffusers."""

    def old(name: str) -> str:
        return name.replace(".fp16-", "-").replace(".safetensors", ".fp16.safetensors")

    index = unet / f"{STEM}.safetensors.index.fp16.json"
    values = json.loads(index.read_text(encoding="utf-8"))
    values["weight_map"] = {name: old(file) for name, file in values["weight_map"].items()}
    index.write_text(json.dumps(values), encoding="utf-8")
    for file in list(unet.glob("*.safetensors")):
        file.rename(unet / old(file.name))


@pytest.mark.torch
@pytest.mark.parametrize("variant", [None, "fp16", "older fp16"])
def test_weights_in_parts_open(tmp_path: Path, variant: str | None) -> None:
    import torch

    folder = without_weights(tmp_path)
    model = tiny_unet() if variant is None else tiny_unet().half()
    name = None if variant is None else "fp16"
    model.save_pretrained(folder / "unet", max_shard_size="10KB", variant=name)
    if variant == "older fp16":
        older_names(folder / "unet")
    parts = list((folder / "unet").glob("*.safetensors"))
    assert len(parts) > 1 and sorted(_weight_files(folder / "unet")) == sorted(parts)
    module = open_denoiser(folder).network.module  # type: ignore[attr-defined]
    given = dict(model.float().named_parameters())
    assert all(torch.equal(values, given[name]) for name, values in module.named_parameters())


@pytest.mark.torch
@pytest.mark.parametrize("name", [f"{STEM}-00001-of-00002", f"{STEM}.fp16-00001-of-00002"])
def test_parts_without_their_index_are_named(tmp_path: Path, name: str) -> None:
    folder = without_weights(tmp_path)
    tiny_unet().save_pretrained(folder / "unet")
    (folder / "unet" / f"{STEM}.safetensors").rename(folder / "unet" / f"{name}.safetensors")
    with pytest.raises(ModelError, match=r"without their index.*Copy .*index.*json"):
        open_denoiser(folder)


@pytest.mark.torch
def test_a_checkpoint_of_training_opens_without_an_index(tmp_path: Path) -> None:
    from diffusers.training_utils import EMAModel

    folder = tiny_unet_folder(tmp_path)
    (folder / "model_index.json").unlink()
    model = tiny_unet(seed=5)
    average = EMAModel(model.parameters(), model_cls=type(model), model_config=model.config)
    average.optimization_step = 123_456_789
    average.save_pretrained(folder / "unet_ema")
    denoiser = open_denoiser(folder)
    assert any("--only unet_ema" in note for note in denoiser.notes)
    chosen = open_denoiser(folder, Additions(component="unet_ema"))
    assert not any("unet_ema" in note for note in chosen.notes)
    weights = [one.network.module.conv_in.weight for one in (denoiser, chosen)]  # type: ignore[attr-defined]
    assert not bool((weights[0] == weights[1]).all())
    assert bool((weights[1] == model.conv_in.weight).all())
    assert f"unet_ema/{STEM}.safetensors" in [name for name, _ in source_files(folder)]
    shutil.rmtree(folder / "unet")
    assert open_denoiser(folder).spec.sample.shape == (3, 8, 8)


@pytest.mark.torch
@pytest.mark.parametrize("xl", [False, True])
def test_a_text_pipeline_is_known_by_its_parts(tmp_path: Path, xl: bool) -> None:
    folder = tiny_text_pipeline_folder(tmp_path, xl=xl)
    (tmp_path / "prompts.txt").write_text("a cat\n", encoding="utf-8")
    additions = Additions(prompts=tmp_path / "prompts.txt")
    whole = open_denoiser(folder, additions)
    (folder / "model_index.json").unlink()
    parts = open_denoiser(folder, additions)
    assert parts.spec.pipeline == whole.spec.pipeline
    np.testing.assert_array_equal(
        whole.conditions.arrays["encoder_hidden_states"],
        parts.conditions.arrays["encoder_hidden_states"],
    )


def optimum_folder(tmp_path: Path, place: str = "unet", **config: Any) -> Path:
    """A folder as optimum exports it: ONNX and configurations, no YAML; sizes are left open."""
    folder = tmp_path / "exported"
    path = denoiser_graph(channels=16, size=8).save(folder / place / "model.onnx")
    model = onnx.load(path)
    for value in (*model.graph.input, *model.graph.output):
        for axis, size in enumerate(value.type.tensor_type.shape.dim):
            if axis > 1:
                size.dim_param = f"size_{axis}"
    onnx.save(model, path)
    channels = model.graph.input[0].type.tensor_type.shape.dim[1].dim_value
    values = {"_class_name": "UNet2DModel", "in_channels": channels, "sample_size": 8, **config}
    (path.parent / "config.json").write_text(json.dumps(values), encoding="utf-8")
    write_scheduler(folder, tiny_scheduler())
    return folder


def test_a_folder_of_optimum_opens_its_denoiser(tmp_path: Path) -> None:
    folder = optimum_folder(tmp_path)
    built = build(recipe_for(folder), tmp_path / "run", "export")
    spec = json.loads((built.run / "export" / "denoiser.json").read_text(encoding="utf-8"))
    assert spec["sample"]["shape"][1:] == [8, 8] and spec["prediction_type"] == "epsilon"
    names = {name for name, _ in source_files(folder)}
    assert names == {"model.onnx", "config.json", "scheduler_config.json"}


def test_its_denoiser_may_be_named_and_other_parts_not(tmp_path: Path) -> None:
    folder = optimum_folder(tmp_path)
    assert open_denoiser(folder, Additions(component="unet")).spec.sample.name == "sample"
    with pytest.raises(UsageError, match="has no component 'vae'"):
        open_denoiser(folder, Additions(component="vae"))


def test_a_yaml_beside_it_comes_first(tmp_path: Path) -> None:
    folder = optimum_folder(tmp_path)
    describe(
        folder / "unet" / "model.onnx", name="mine", sample={"name": "sample", "shape": [3, 16, 16]}
    )
    spec = open_denoiser(folder).spec
    assert spec.name == "mine" and spec.sample.shape == (3, 16, 16)


def test_a_folder_with_the_file_itself(tmp_path: Path) -> None:
    path = save_denoiser(tmp_path / "folder")
    assert locate(path.parent) == path
    assert open_denoiser(path.parent).spec.sample == open_denoiser(path).spec.sample


@pytest.mark.torch
def test_float_weights_come_before_an_export_of_them(tmp_path: Path) -> None:
    folder = tiny_unet_folder(tmp_path)
    (folder / "unet" / "model.onnx").write_bytes(b"not read")
    assert locate(folder) == folder


def test_what_a_folder_of_optimum_lacks_is_named(tmp_path: Path) -> None:
    folder = optimum_folder(tmp_path)
    shutil.rmtree(folder / "scheduler")
    with pytest.raises(UsageError, match="names no scheduler"):
        open_denoiser(folder)
    folder = optimum_folder(tmp_path, sample_size=None)
    with pytest.raises(UsageError, match="needs a YAML"):
        open_denoiser(folder)
    folder = optimum_folder(tmp_path, sample_size="8")
    with pytest.raises(ModelError, match="sample_size 8"):
        open_denoiser(folder)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("model.gguf", "already quantized: give the float checkpoint"),
        ("model.engine", "This is a built engine"),
    ],
)
def test_files_that_are_no_onnx_say_what_to_give(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(ModelError, match=said):
        locate(tmp_path / name)
