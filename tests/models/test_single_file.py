"""Checkpoints in one file: opened as the same model's folder, or refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402

from mpq_deploy.calls.pipeline_runs import PipelineRuns  # noqa: E402
from mpq_deploy.errors import DiskError, ModelError, UsageError  # noqa: E402
from mpq_deploy.models.additions import Additions  # noqa: E402
from mpq_deploy.models.lora_option import LoraOption  # noqa: E402
from mpq_deploy.models.open import model_folder, open_denoiser  # noqa: E402
from mpq_deploy.models.single_file import read_single_file, unpack  # noqa: E402
from mpq_deploy.recipe import load_recipe  # noqa: E402
from mpq_deploy.stages.export import inputs as export_inputs  # noqa: E402
from mpq_deploy.system.progress import Talk  # noqa: E402
from tests.compvis_names import (  # noqa: E402
    CLIP,
    UNET,
    VAE,
    compvis_file,
    compvis_tensors,
    without_weights,
)
from tests.lora_files import kohya_file  # noqa: E402
from tests.tiny_models import (  # noqa: E402
    tiny_text_pipeline_folder,
    write_text_encoder,
    write_tokenizer,
)

pytestmark = pytest.mark.torch


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_text_pipeline_folder(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def config(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return without_weights(folder, tmp_path_factory.mktemp("bare") / "config")


@pytest.fixture(scope="module")
def checkpoint(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compvis_file(folder, tmp_path_factory.mktemp("one") / "model.safetensors")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("abc\n", encoding="utf-8")
    return path


def test_it_is_the_model_of_the_folder(
    folder: Path, config: Path, checkpoint: Path, prompts: Path, tmp_path: Path
) -> None:
    expected = open_denoiser(folder, Additions(prompts=prompts))
    additions = Additions(prompts=prompts, config=config, unpacked=tmp_path / "unpacked")
    found = open_denoiser(checkpoint, additions)
    theirs, ours = (one.spec.model_dump(exclude={"name", "source"}) for one in (expected, found))
    assert ours == theirs and (found.spec.name, found.spec.source) == ("model", str(checkpoint))
    assert "is of diffusers' kind v1, configured by" in found.notes[0]
    before, after = (one.network.module.state_dict() for one in (expected, found))  # type: ignore[attr-defined]
    assert all(torch.equal(before[name], after[name]) for name in {*before, *after})
    for name, values in expected.conditions.arrays.items():
        assert np.array_equal(values, found.conditions.arrays[name])
    # The pipeline of later stages: text encoder and autoencoder are the checkpoint's.
    place, _ = model_folder(checkpoint, config, tmp_path / "unpacked", Talk())
    images = [
        PipelineRuns(one, spec.spec, spec.network.reference).image(0, 2, 5)
        for one, spec in ((folder, expected), (place, found))
    ]
    assert np.array_equal(*images)


def test_sdxls_two_text_encoders_are_told_apart(tmp_path: Path, prompts: Path) -> None:
    first, second = 6, 8
    folder = tiny_text_pipeline_folder(
        tmp_path,
        xl=True,
        cross_attention_dim=first + second,
        projection_class_embeddings_input_dim=second + 6 * 8,
    )
    tokenizer = write_tokenizer(tmp_path / "tokens")
    place, end = folder / "text_encoder_2", tokenizer.eos_token_id
    write_text_encoder(place, len(tokenizer), end, True, second, 1)
    file = compvis_file(folder, tmp_path / "xl.safetensors")
    config = without_weights(folder, tmp_path / "config")
    additions = Additions(prompts=prompts, config=config)
    found, expected = (
        open_denoiser(file, additions),
        open_denoiser(folder, Additions(prompts=prompts)),
    )
    left, right = (d.network.module.state_dict() for d in (found, expected))  # type: ignore[attr-defined]
    assert all(torch.equal(left[name], right[name]) for name in {*left, *right})
    for name, values in expected.conditions.arrays.items():
        assert np.array_equal(values, found.conditions.arrays[name]), name


def test_weights_keep_the_types_that_they_have(folder: Path, config: Path, tmp_path: Path) -> None:
    file = compvis_file(folder, tmp_path / "half.safetensors", torch.float16)
    more = {"betas": torch.ones(4), "model_ema.decay": torch.ones(1)}
    save_file({**load_file(file), **more}, file)
    place, note = unpack(file, config, tmp_path / "u", Talk())
    assert note.endswith("; its average of training (model_ema) is not used")
    stored = load_file(place / "unet" / "diffusion_pytorch_model.safetensors")
    whole = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float16}
    assert all(torch.equal(stored[name], whole[name].half()) for name in whole)


def test_what_was_written_is_kept_until_a_file_changes(
    folder: Path, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = compvis_file(folder, tmp_path / "m.safetensors")
    made = []
    original = diffusers.StableDiffusionPipeline.from_single_file.__func__

    def counted(cls: Any, *args: Any, **kwargs: Any) -> Any:
        made.append(1)
        return original(cls, *args, **kwargs)

    monkeypatch.setattr(diffusers.StableDiffusionPipeline, "from_single_file", classmethod(counted))
    for _ in range(2):
        place, _ = unpack(file, config, tmp_path / "u", Talk())
    assert len(made) == 1 and (place / "model_index.json").is_file()
    compvis_file(folder, file, torch.bfloat16)
    unpack(file, config, tmp_path / "u", Talk())
    assert len(made) == 2


def test_a_full_disk_is_said(
    folder: Path, config: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(diffusers.StableDiffusionPipeline, "save_pretrained", full)
    with pytest.raises(
        DiskError, match=r"cannot be written: .*No space left.*as large as its file"
    ):
        unpack(checkpoint, config, tmp_path / "u", Talk())
    assert not (tmp_path / "u").exists()


def test_digests_of_the_file_and_its_configuration_decide_what_is_exported_again(
    folder: Path, checkpoint: Path, tmp_path: Path
) -> None:
    config = without_weights(folder, tmp_path / "config")

    def files() -> Any:
        recipe = load_recipe(None, {"model": str(checkpoint), "config": str(config)})
        run: Any = SimpleNamespace(recipe=recipe, path=folder)
        return export_inputs(run)["model.files"]

    first = files()
    assert {"model.safetensors", "unet/config.json", "model_index.json"} <= set(first)
    path = config / "scheduler" / "scheduler_config.json"
    path.write_text(path.read_text(encoding="utf-8").replace("0.012", "0.013"), encoding="utf-8")
    assert files() != first


def test_a_lora_is_fused_into_it_too(
    folder: Path, config: Path, checkpoint: Path, prompts: Path, tmp_path: Path
) -> None:
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet")
    lora = LoraOption(kohya_file(tmp_path / "l.safetensors", {"unet": unet}, ("to_q",)))
    one = open_denoiser(checkpoint, Additions(prompts=prompts, config=config, loras=(lora,)))
    other = open_denoiser(folder, Additions(prompts=prompts, loras=(lora,)))
    left, right = (d.network.module.state_dict() for d in (one, other))  # type: ignore[attr-defined]
    assert one.spec.loras == other.spec.loras
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_a_denoiser_alone_takes_the_other_weights_of_the_folder_or_conditions(
    folder: Path, config: Path, tmp_path: Path, prompts: Path
) -> None:
    tensors = {n: v for n, v in compvis_tensors(folder).items() if n.startswith(UNET)}
    file = tmp_path / "unet.safetensors"
    save_file(tensors, file)
    with pytest.raises(
        ModelError,
        match=r"holds no weights of the vae, and neither does .*/vae\. Put them there .*--conditions",
    ):
        open_denoiser(file, Additions(config=config))
    np.savez(
        tmp_path / "c.npz",
        encoder_hidden_states=np.random.default_rng(0).standard_normal((2, 8, 12), np.float32),
    )
    lone = open_denoiser(file, Additions(config=config, conditions=tmp_path / "c.npz"))
    whole = open_denoiser(file, Additions(config=folder, prompts=prompts))
    assert lone.spec.sampled and lone.decoder is None and whole.spec.pipeline is not None
    for name, value in load_file(folder / "unet" / "diffusion_pytorch_model.safetensors").items():
        assert torch.equal(lone.network.module.state_dict()[name], value)  # type: ignore[attr-defined]
        assert torch.equal(whole.network.module.state_dict()[name], value)  # type: ignore[attr-defined]


def test_without_a_configuration_the_hubs_is_looked_for(
    checkpoint: Path, config: Path, folder: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def snapshot(name: str, allow_patterns: list[str]) -> str:
        asked.update(name=name, patterns=allow_patterns)
        return str(config)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    found = open_denoiser(checkpoint, Additions(prompts=prompts))
    assert asked["name"] == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert not [one for one in asked["patterns"] if "safetensors" in one or "bin" in one]
    assert found.notes[0].endswith("configured by stable-diffusion-v1-5/stable-diffusion-v1-5")


def test_without_a_configuration_it_says_whose_is_needed(
    checkpoint: Path,
    config: Path,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def offline(*args: Any, **kwargs: Any) -> str:
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(
        UsageError,
        match=r"holds only weights, and the configuration of its kind, v1, was not found\. Give --config FOLDER: "
        r"the folder of its pipeline in diffusers' layout.*such as those of stable-diffusion-v1-5/",
    ):
        open_denoiser(checkpoint)
    with pytest.raises(UsageError, match=r"--config .* has neither model_index\.json or config"):
        open_denoiser(checkpoint, Additions(config=tmp_path))
    with pytest.raises(UsageError, match="is not a folder with"):
        open_denoiser(checkpoint, Additions(config=tmp_path / "none"))
    with pytest.raises(UsageError, match="has its own configuration"):
        open_denoiser(folder, Additions(config=config))
    lacking = without_weights(folder, tmp_path / "lacking")
    for path in (lacking / "tokenizer").iterdir():
        path.unlink()
    (lacking / "tokenizer").rmdir()
    with pytest.raises(UsageError, match=r"has no tokenizer\. Give the folder of its pipeline"):
        open_denoiser(checkpoint, Additions(config=lacking))


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a lacking weight": (
        {f"{UNET}out.2.weight": None},
        r"lack 1 that it needs: 'conv_out\.weight'",
    ),
    "a lacking text encoder's weight": (
        {f"{CLIP}text_model.final_layer_norm.bias": None},
        r"lack 1 that it needs: '\S*final_layer_norm\.bias'",
    ),
    "a lacking autoencoder's": ({f"{VAE}decoder.conv_out.bias": None}, r"lack 1 that it needs"),
    "another shape": ({f"{UNET}out.2.bias": torch.zeros(7)}, r"does not fit the configuration in"),
    "codes": (
        {f"{UNET}out.2.weight": torch.zeros(4, 8, 3, 3, dtype=torch.int8)},
        r"is already quantized: 1 of its tensors are codes or scales, such as .* \(I8\)",
    ),
    "scales of FP8": (
        {f"{UNET}out.2.weight_scale": torch.ones(1)},
        r"is already quantized: .*Give the float checkpoint",
    ),
    "layers beside": (
        {f"{UNET}motion.0.weight": torch.zeros(5, 3)},
        r"holds 15 values more under model\.diffusion_model\. than a UNet2DConditionModel",
    ),
    "a LoRA": ({"lora_unet_x.lora_down.weight": torch.ones(2, 2)}, r"hold an unfused LoRA"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_file_that_is_not_the_model_is_refused(
    folder: Path, config: Path, tmp_path: Path, kind: str
) -> None:
    changes, message = WRONG[kind]
    file = compvis_file(folder, tmp_path / "m.safetensors", **changes)
    with pytest.raises(ModelError, match=message) as caught:
        open_denoiser(file, Additions(config=config, unpacked=tmp_path / "u"))
    assert "\n" not in str(caught.value) and caught.value.hint
    assert not (tmp_path / "u").exists()


def test_files_of_no_denoiser_and_pickles_are_refused(
    folder: Path, config: Path, checkpoint: Path, tmp_path: Path
) -> None:
    save_file({"layers.0.weight": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(
        ModelError, match=r"is not a checkpoint that diffusers knows; it holds 'layers"
    ):
        read_single_file(tmp_path / "other.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(checkpoint.read_bytes()[:2000])
    with pytest.raises(ModelError, match=r"cannot be read.*The file is damaged"):
        open_denoiser(tmp_path / "cut.safetensors")
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet")
    lora = kohya_file(tmp_path / "l.safetensors", {"unet": unet}, ("to_q",))
    with pytest.raises(UsageError, match=r"is a LoRA, not a model.*and --lora "):
        open_denoiser(lora)
    with pytest.raises(
        UsageError, match=r"holds the weights of a model folder.*Give the folder: .*unet"
    ):
        open_denoiser(folder / "unet" / "diffusion_pytorch_model.safetensors")
    (tmp_path / "model.ckpt").write_bytes(b"x")
    with pytest.raises(ModelError, match="Pickled checkpoints are refused"):
        open_denoiser(tmp_path / "model.ckpt")
    pickled = without_weights(folder, tmp_path / "pickled")
    (pickled / "text_encoder" / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(
        ModelError, match=r"text_encoder holds pickled weights \(pytorch_model\.bin\)"
    ):
        open_denoiser(checkpoint, Additions(config=pickled))
    foreign = without_weights(folder, tmp_path / "foreign")
    index = json.loads((foreign / "model_index.json").read_text(encoding="utf-8"))
    index["text_encoder"] = ["mine", "Encoder"]
    (foreign / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(UsageError, match="neither diffusers nor transformers"):
        open_denoiser(checkpoint, Additions(config=foreign))
    large = without_weights(folder, tmp_path / "large")
    unet = json.loads((large / "unet" / "config.json").read_text(encoding="utf-8"))
    changed = json.dumps({**unet, "in_channels": 10**9})
    (large / "unet" / "config.json").write_text(changed, encoding="utf-8")
    with pytest.raises(ModelError, match=r"'in_channels' is 1,000,000,000, but the largest"):
        open_denoiser(checkpoint, Additions(config=large))
