"""Opening models: what is read from a folder, and what is said about one that cannot be opened."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpq_deploy.errors import ModelError, UsageError
from mpq_deploy.models.additions import Additions
from mpq_deploy.models.locate import bundled_demo, locate, source_files
from mpq_deploy.models.open import open_denoiser
from tests.tiny_models import (
    tiny_conditional_folder,
    tiny_onnx_with_yaml,
    tiny_scheduler,
    tiny_text_pipeline_folder,
    tiny_unet,
    tiny_unet_folder,
)

pytestmark = pytest.mark.torch
WEIGHTS = "diffusion_pytorch_model.safetensors"


def test_the_bundled_digits_open() -> None:
    denoiser = open_denoiser("digits")
    assert denoiser.spec.source == "bundled:digits" and denoiser.spec.labels == tuple("0123456789")
    assert denoiser.spec.pixel_range == (-1.0, 1.0) and denoiser.conditions.rows == 10
    assert (bundled_demo() / "model_index.json").is_file()


def test_a_class_conditional_folder(tmp_path: Path) -> None:
    denoiser = open_denoiser(tiny_unet_folder(tmp_path))
    assert [item.name for item in denoiser.spec.conditions] == ["class_labels"]
    np.testing.assert_array_equal(denoiser.conditions.arrays["class_labels"], np.arange(5))
    assert denoiser.spec.labels[0] == "class 0" and denoiser.spec.guidance_scale == 1.0


def test_an_unconditional_folder_has_one_row_and_no_array(tmp_path: Path) -> None:
    denoiser = open_denoiser(tiny_unet_folder(tmp_path, num_class_embeds=None))
    assert (
        denoiser.spec.conditions == ()
        and denoiser.conditions.rows == 1
        and not denoiser.conditions.arrays
    )


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_the_prediction_type_comes_from_the_scheduler(tmp_path: Path, prediction: str) -> None:
    scheduler = tiny_scheduler(
        _class_name="DPMSolverMultistepScheduler", prediction_type=prediction
    )
    spec = open_denoiser(tiny_unet_folder(tmp_path, scheduler=scheduler)).spec
    assert spec.prediction_type == prediction and spec.scheduler == scheduler


def test_a_bare_unet_folder_with_a_scheduler(tmp_path: Path) -> None:
    folder = tiny_unet_folder(tmp_path)
    assert open_denoiser(folder / "unet", Additions(scheduler=folder)).spec.sample.shape == (
        3,
        8,
        8,
    )
    with pytest.raises(UsageError, match="--scheduler"):
        open_denoiser(folder / "unet")


def test_a_folder_behind_links_opens(tmp_path: Path) -> None:
    folder = tiny_unet_folder(tmp_path / "real")
    link = tmp_path / "links"
    for file in folder.rglob("*.*"):
        (link / file.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
        (link / file.relative_to(folder)).symlink_to(file)
    assert open_denoiser(link).spec.sample.shape == (3, 8, 8)


def test_half_precision_weights_and_variants_open_in_float32(tmp_path: Path) -> None:
    import torch

    folder = tiny_unet_folder(tmp_path)
    (folder / "unet" / WEIGHTS).unlink()
    tiny_unet().half().save_pretrained(folder / "unet", safe_serialization=True, variant="fp16")
    module = open_denoiser(folder).network.module  # type: ignore[attr-defined]
    assert {p.dtype for p in module.parameters()} == {torch.float32}


def test_everything_that_is_missing_is_listed_at_once(tmp_path: Path) -> None:
    folder = tiny_conditional_folder(tmp_path, num_class_embeds=3)
    with pytest.raises(UsageError) as raised:
        open_denoiser(folder)
    said = str(raised.value)
    for part in (
        "--scheduler",
        "--conditions",
        "encoder_hidden_states: float32 [rows, any, 12]",
        "class_labels: int64",
    ):
        assert part in said


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"encoder_hidden_states": np.zeros((2, 7, 11))}, r"shape \(2, 7, 11\)"),
        ({"encoder_hidden_state": np.zeros((2, 7, 12))}, "Did you mean 'encoder_hidden_states'"),
        ({}, "common number of rows"),
        ({"encoder_hidden_states": np.full((2, 7, 12), np.nan)}, "NaN"),
        (
            {"encoder_hidden_states": np.zeros((2, 7, 12)), "class_labels": np.zeros(3, int)},
            "common number of rows",
        ),
        ({"encoder_hidden_states": np.zeros((2, 7, 12)), "class_labels": np.zeros(2)}, "float64"),
        ({"encoder_hidden_states": np.zeros((2, 7, 12))}, "no array 'class_labels'"),
    ],
)
def test_conditions_that_do_not_fit_are_named(
    tmp_path: Path, arrays: dict[str, Any], said: str
) -> None:
    folder = tiny_conditional_folder(tmp_path, num_class_embeds=3)
    (folder / "scheduler_config.json").write_text(json.dumps(tiny_scheduler()), encoding="utf-8")
    np.savez(tmp_path / "c.npz", **arrays)
    with pytest.raises((UsageError, ModelError), match=said):
        open_denoiser(folder, Additions(conditions=tmp_path / "c.npz"))


def test_a_conditions_file_may_name_rows_and_the_empty_one(tmp_path: Path) -> None:
    folder = tiny_conditional_folder(tmp_path)
    (folder / "scheduler_config.json").write_text(json.dumps(tiny_scheduler()), encoding="utf-8")
    states = np.zeros((2, 7, 12), np.float32)
    np.savez(
        tmp_path / "c.npz",
        encoder_hidden_states=states,
        _uncond_row=1,
        _labels=np.array(["a", "none"]),
    )
    spec = open_denoiser(folder, Additions(conditions=tmp_path / "c.npz", guidance_scale=2.0)).spec
    assert spec.uncond_row == 1 and spec.labels == ("a", "none") and spec.guidance_scale == 2.0
    np.savez(tmp_path / "d.npz", encoder_hidden_states=states)
    with pytest.raises(UsageError, match="_uncond_row"):
        open_denoiser(folder, Additions(conditions=tmp_path / "d.npz", guidance_scale=2.0))


def test_a_pickled_conditions_file_is_refused(tmp_path: Path) -> None:
    folder = tiny_conditional_folder(tmp_path)
    (folder / "scheduler_config.json").write_text(json.dumps(tiny_scheduler()), encoding="utf-8")
    np.savez(tmp_path / "c.npz", encoder_hidden_states=np.array([{}], object))
    (tmp_path / "d.npz").write_bytes(pickle.dumps([1]))
    for name in ("c.npz", "d.npz"):
        with pytest.raises(ModelError, match=name):
            open_denoiser(folder, Additions(conditions=tmp_path / name))


def test_a_text_pipeline_is_called_with_the_prompts(tmp_path: Path) -> None:
    folder = tiny_text_pipeline_folder(tmp_path)
    (tmp_path / "prompts.txt").write_text("# two\na cat\n\nthe dog\n", encoding="utf-8")
    denoiser = open_denoiser(folder, Additions(prompts=tmp_path / "prompts.txt"))
    spec = denoiser.spec
    assert spec.labels == ("a cat", "the dog") and spec.pipeline is not None and not spec.sampled
    assert spec.pipeline.calls == ({"prompt": "a cat"}, {"prompt": "the dog"})
    # One image, and its guidance.
    assert denoiser.conditions.arrays["encoder_hidden_states"].shape == (2, 8, 12)
    assert denoiser.decoder is None and spec.pixel_range is None


def test_the_prompts_give_what_the_text_model_gives(tmp_path: Path) -> None:
    import torch
    from transformers import CLIPTextModel, CLIPTokenizer

    folder = tiny_text_pipeline_folder(tmp_path)
    opened = open_denoiser(folder)
    assert len(opened.spec.labels) == 64
    tokenizer, model = (
        c.from_pretrained(folder / n)
        for c, n in ((CLIPTokenizer, "tokenizer"), (CLIPTextModel, "text_encoder"))
    )
    texts = ["", "a red bicycle leaning against a brick wall"]
    tokens = tokenizer(texts, padding="max_length", truncation=True)
    with torch.no_grad():
        expected = model(torch.tensor(tokens["input_ids"]))[0].numpy()
    states = opened.conditions.arrays["encoder_hidden_states"]
    np.testing.assert_allclose(states, expected, atol=1e-5)


def test_an_sdxl_like_folder_has_pooled_text_and_time_ids(tmp_path: Path) -> None:
    folder = tiny_text_pipeline_folder(tmp_path, xl=True)
    arrays = open_denoiser(folder).conditions.arrays
    assert {name: values.shape for name, values in arrays.items()} == {
        "encoder_hidden_states": (2, 8, 12),
        "text_embeds": (2, 6),
        "time_ids": (2, 6),
    }
    np.testing.assert_array_equal(arrays["time_ids"][0], [16, 16, 0, 0, 16, 16])


def test_an_empty_or_missing_prompts_file_is_named(tmp_path: Path) -> None:
    folder = tiny_text_pipeline_folder(tmp_path)
    (tmp_path / "empty.txt").write_text("# nothing\n", encoding="utf-8")
    for name in ("empty.txt", "none.txt"):
        with pytest.raises(UsageError, match=name):
            open_denoiser(folder, Additions(prompts=tmp_path / name))


@pytest.mark.parametrize(
    "name", ["digitz", "emoji2", "no/such/folder/at/all", "missing.onnx", "some/missing.onnx"]
)
def test_no_such_model(name: str) -> None:
    with pytest.raises(UsageError, match=name):
        open_denoiser(name)


def test_a_near_name_is_suggested() -> None:
    with pytest.raises(UsageError, match="Did you mean 'digits'"):
        locate("digit")


def test_a_folder_that_is_no_diffusers_model(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"model_index\.json"):
        open_denoiser(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}', encoding="utf-8")
    with pytest.raises(UsageError, match="UNet2DModel"):
        open_denoiser(tmp_path)
    (tmp_path / "config.json").write_text(
        '{"_class_name": "UNet2DConditionalModel"}', encoding="utf-8"
    )
    with pytest.raises(UsageError, match="Did you mean 'UNet2DConditionModel'"):
        open_denoiser(tmp_path)
    (tmp_path / "config.json").write_text('{"_class', encoding="utf-8")
    with pytest.raises(ModelError, match="JSON"):
        open_denoiser(tmp_path)
    (tmp_path / "model_index.json").write_text(
        '{"_class_name": "FluxPipeline", "transformer": []}', encoding="utf-8"
    )
    with pytest.raises(UsageError, match="transformer"):
        open_denoiser(tmp_path)


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "model.ckpt", "weights.pt"])
def test_pickled_weights_are_refused_unread(tmp_path: Path, name: str) -> None:
    folder = tiny_unet_folder(tmp_path)
    (folder / "unet" / WEIGHTS).unlink()
    (folder / "unet" / name).write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    with pytest.raises(ModelError, match="safe_serialization=True"):
        open_denoiser(folder)
    with pytest.raises(ModelError, match="refused"):
        open_denoiser(folder / "unet" / name)


def test_weights_that_are_missing_cut_or_of_another_model(tmp_path: Path) -> None:
    folder = tiny_unet_folder(tmp_path)
    file = folder / "unet" / WEIGHTS
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match="cannot be read"):
        open_denoiser(folder)
    file.write_bytes(whole)
    config = json.loads((folder / "unet" / "config.json").read_text(encoding="utf-8"))
    (folder / "unet" / "config.json").write_text(
        json.dumps({**config, "layers_per_block": 2}), encoding="utf-8"
    )
    with pytest.raises(ModelError, match=r"has the shape .*config\.json asks for"):
        open_denoiser(folder)
    (folder / "unet" / "config.json").write_text(
        json.dumps({**config, "block_out_channels": [8, 32]}), encoding="utf-8"
    )
    with pytest.raises(ModelError, match=r"has the shape .*config\.json asks for"):
        open_denoiser(folder)
    file.unlink()
    with pytest.raises(ModelError, match="no weights"):
        open_denoiser(folder)


def test_a_tensor_that_is_missing_from_the_file_is_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tiny_unet_folder(tmp_path)
    weights = load_file(folder / "unet" / WEIGHTS)
    del weights["mid_block.resnets.0.conv1.weight"]
    save_file(weights, folder / "unet" / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"mid_block\.resnets\.0\.conv1\.weight"):
        open_denoiser(folder)


def test_a_tensor_that_the_class_does_not_take_is_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tiny_unet_folder(tmp_path)
    weights = load_file(folder / "unet" / WEIGHTS)
    weights["adapter.weight"] = weights["conv_in.bias"].clone()
    save_file(weights, folder / "unet" / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"hold 1 tensors .* does not take: 'adapter\.weight'"):
        open_denoiser(folder)


def test_inpainting_and_unknown_sizes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="takes 6 channels and gives 3"):
        open_denoiser(tiny_unet_folder(tmp_path / "a", in_channels=6))
    with pytest.raises(UsageError, match="sample_size"):
        open_denoiser(tiny_unet_folder(tmp_path / "b", sample_size=None))


def test_source_files_change_with_the_model_only(tmp_path: Path) -> None:
    folder = tiny_unet_folder(tmp_path)
    names = [name for name, _ in source_files(folder)]
    assert (
        names == sorted(names)
        and f"unet/{WEIGHTS}" in names
        and "scheduler/scheduler_config.json" in names
    )
    (folder / "notes.md").write_text("read me", encoding="utf-8")
    assert [name for name, _ in source_files(folder)] == names
    path = tiny_onnx_with_yaml(tmp_path / "onnx")
    assert [name for name, _ in source_files(path)] == ["tiny.onnx", "tiny.yaml"]
    assert "unet/config.json" in [name for name, _ in source_files(None)]


@pytest.mark.torch
@pytest.mark.parametrize("entry", ["addition_embed_type", "encoder_hid_dim_type"])
def test_a_bare_unet_that_reads_images_is_refused(entry: str) -> None:
    pytest.importorskip("torch")
    from mpq_deploy.models.unet import unet_inputs

    config = {"_class_name": "UNet2DConditionModel", "block_out_channels": [8], entry: "image_proj"}
    with pytest.raises(UsageError, match=f"{entry} is 'image_proj'"):
        unet_inputs(config)
